"""A finished run: its student predicts as its exported file does, and the demo has teacher, student and file."""

from __future__ import annotations

import numpy as np
import pytest

import edgekd
from edgekd.core.manifest import Run
from edgekd.data.image_set import load_images
from edgekd.inference.demo import models_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = edgekd.train(smoke=True, size=32, out=tmp_path_factory.mktemp("run") / "toy")
    assert run.folder is not None
    edgekd.export(run.folder)
    return run


def test_student_and_file_predict_the_same(run: Run) -> None:
    assert run.folder is not None
    images = load_images("toy")
    some = [images.read(index) for index in range(0, len(images), 40)]
    student = edgekd.load(run.folder).predict(some)
    file = edgekd.load(run.folder / "artifacts" / "onnxruntime-fp32").predict(some)
    assert [one.label for one in student] == [one.label for one in file]
    for a, b in zip(student, file, strict=True):
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-4)
        assert sum(a.probabilities) == pytest.approx(1)


def test_the_demo_has_every_model(run: Run) -> None:
    assert run.folder is not None
    models = models_of(run.folder)
    assert [model.name for model in models] == [
        "teacher, zero-shot",
        "student, torch",
        "onnxruntime-fp32",
    ]
    (alone,) = models_of(run.folder / "artifacts" / "onnxruntime-fp32")
    image = load_images("toy").read(0)
    assert alone.predict(image) == models[2].predict(image)


def test_a_run_shows_itself_in_a_notebook(run: Run) -> None:
    assert run.student in run._repr_html_()
    hostile = run.model_copy(update={"name": "<script>"})
    assert "<script>" not in hostile._repr_html_()
