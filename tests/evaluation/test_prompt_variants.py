"""The same images with other prompts: which models can take them, and the rows of the report by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_fakes import (
    CLASSES,
    SHORT,
    fake_measurements,
    four_subjects,
    id_and_ood,
    model,
    paint_images,
    subject,
)

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.evaluate.accuracy import FIXED
from edgekd.benchmark.evaluate.predictions import predict_suite
from edgekd.benchmark.rescore import rescore
from edgekd.benchmark.results.storage import read_report
from edgekd.benchmark.subjects import Suite
from edgekd.core.errors import EdgekdError
from edgekd.core.predictor import Predictor
from edgekd.distill.models.teachers import ClipTeacher, load_teacher
from edgekd.evaluation.prompt_variants import VariantSpec, read_variant, with_prompt_variants


def test_lines_are_names_or_templates(tmp_path: Path) -> None:
    path = tmp_path / "w.txt"
    path.write_text("a sketch of a {}\n\nfox\n fox \nwolf\n")
    assert read_variant("w", path) == VariantSpec("w", ("fox", "wolf"), ("a sketch of a {}",))
    path.write_text("fox\n")
    assert read_variant("w", path).templates is None
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "two.txt").write_text("a {} or {}\n")
    for name, message in (("empty", "no words"), ("two", "several"), ("absent", "no vocabulary")):
        with pytest.raises(EdgekdError, match=message):
            read_variant("w", tmp_path / f"{name}.txt")


@pytest.fixture(scope="module")
def teacher() -> ClipTeacher:
    return load_teacher("toy")


def test_own_vectors_stay_and_new_templates_make_new_ones(teacher: ClipTeacher) -> None:
    own = teacher.text_bank(("circle", "star"), ("a photo of a {}",))
    described = replace(own, vectors=own.vectors.flip(0), text_centre=own.vectors.mean(dim=0))
    longer = VariantSpec("w", ("Star", "ring"), None).bank(teacher, described)
    assert longer.classes == ("circle", "star", "ring")
    assert torch.equal(longer.vectors[:2], described.vectors)  # not made again from the names
    assert torch.allclose(longer.vectors[2:], teacher.text_bank(("ring",), own.templates).vectors)
    assert longer.text_centre is described.text_centre
    other = VariantSpec("w", (), ("a drawing of a {}",)).bank(teacher, described)
    expected = teacher.text_bank(own.classes, ("a drawing of a {}",)).vectors
    assert torch.allclose(other.vectors, expected)
    assert not torch.allclose(other.vectors, own.vectors)


class Embedding:
    """A student whose embedding of every image is `towards`."""

    embeds, head, mean = True, None, torch.zeros(1)

    def __init__(self, towards: torch.Tensor) -> None:
        self.towards = towards

    def eval(self) -> None:
        pass

    def scores(self, views: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        return self.towards.expand(len(views), -1) @ bank.T


def test_only_heads_of_text_take_variants(teacher: ClipTeacher, tmp_path: Path) -> None:
    bank = teacher.text_bank(CLASSES, ("a photo of a {}",))
    bird = teacher.text_bank(("bird",), bank.templates).vectors
    run = SimpleNamespace(name="r", teacher="toy")
    loaded: Any = SimpleNamespace(run=run, bank=bank, student=Embedding(bird))
    suites = [*id_and_ood(paint_images()), Suite("val", paint_images(), np.arange(9))]
    file = subject("fp32", "artifact", model(0), folder=tmp_path)
    subjects = [subject("torch", "torch", model(0)), file]
    (tmp_path / "w.txt").write_text("Cat\nbird\n")
    given = [f"new={tmp_path / 'w.txt'}"]
    found, again = with_prompt_variants([loaded], subjects, suites, given)
    assert [one.name for one in again[4:]] == ["vocab:new", "vocab:new/photo", "vocab:new/sketch"]
    assert again[4].images.classes == (*CLASSES, "bird")  # "Cat" is a class already
    assert again[4].kind == "vocabulary"
    assert again[4].remarks == ("the images of id, with 1 added class name that no image has.",)
    assert [again[4].holds(one) for one in found] == [True, False]
    assert [again[0].holds(one) for one in found] == [True, True]
    [logits] = predict_suite(found[:1], again[4])
    assert (logits.argmax(axis=1) == 3).all()  # every image looks like a bird to it

    def with_classes(classes: tuple[str, ...], vectors: np.ndarray) -> Predictor:
        np.testing.assert_allclose(vectors[classes.index("bird")], bird[0], atol=1e-6)
        return lambda pixels: np.repeat(bird.numpy() @ vectors.T, len(pixels), axis=0)

    embedding = replace(file, name="fp32-embedding", with_classes=with_classes)
    with_more = replace(embedding, name="with a class added", classes=(*CLASSES, "fish"))
    found, _ = with_prompt_variants([loaded], [embedding, with_more], suites, given)
    assert [again[4].holds(one) for one in found] == [True, False]
    [logits] = predict_suite(found[:1], again[4])
    assert (logits.argmax(axis=1) == 3).all()
    loaded.bank = None
    with pytest.raises(EdgekdError, match="None of these models"):
        with_prompt_variants([loaded], subjects, suites, given)


def test_the_report_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a name added the torch student calls every fifth image by it; it was wrong on every second before."""
    fake_measurements(monkeypatch, {"r/onnxruntime-fp32": 2.0, "r/onnxruntime-int8": 3.0})
    longer = (*CLASSES, "bird")
    suites = id_and_ood(paint_images())
    variant = VariantSpec("new", ("bird",), None).suite(suites[0])
    suites.append(variant)

    def predict(pixels: np.ndarray) -> np.ndarray:
        logits = np.zeros((len(pixels), 4), dtype=np.float32)
        number = pixels[:, 0, 0, 1].astype(int)
        logits[np.arange(len(pixels)), np.where(number % 5 == 0, 3, pixels[:, 0, 0, 0])] = 4.0
        return logits

    subjects = four_subjects(tmp_path)
    subjects[1] = replace(subjects[1], variants={"vocab:new": (predict, longer)})
    report = run_benchmark(subjects, suites, tmp_path / "out", speed=SHORT)
    assert read_report(report.folder) == report
    rows = {row.subject: row for row in report.vocabularies}
    row = rows["torch"]
    assert (row.top1, row.base_top1, row.to_added, row.added) == (0.8, 0.5, 0.2, 1)
    fixed = rows["onnxruntime-int8"]
    assert (fixed.top1, fixed.reason) == (None, FIXED["artifact"])
    assert report.summary[1].ood_avg == pytest.approx(0.5)  # counts for nothing else
    assert "| torch student | vocab:new | 80.0 [" in (report.folder / "report.md").read_text()
    assert rescore(tmp_path / "out").vocabularies == report.vocabularies
