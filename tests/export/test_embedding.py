"""Exports that end in an embedding: every writer keeps the logits, and classes are added to real files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_fakes import export_parts
from PIL import Image
from test_export import PREPROCESS, Backbone, pictures

import edgekd
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import Artifact, read_artifact
from edgekd.export.graph import Deployable, UnitHead, torch_logits
from edgekd.export.quantize.search import AccuracyBudget
from edgekd.targets.bank import ClassBank, read_bank, unit
from edgekd.targets.session import open_session

CLASSES = ("cat", "dog", "élan")
DIM = 6


def build() -> Deployable:
    torch.manual_seed(0)
    return Deployable(Backbone(), UnitHead(torch.nn.Linear(8, DIM), DIM, 0.3), PREPROCESS).eval()


def bank() -> ClassBank:
    """Class vectors where the student's embeddings are: each the embedding of one picture."""
    vectors = unit(torch_logits(build(), pictures(3, seed=7)))
    facts = {
        "teacher": "toy",
        "teacher_id": "t",
        "templates": ["a {}"],
        "described": False,
        "added": [],
    }
    return ClassBank(CLASSES, vectors, 200.0, None, facts)


def export(folder: Path, target: str, precision: str, **changes: Any) -> Artifact:
    arguments: dict[str, Any] = {
        "target": target,
        "precision": precision,
        "classes": CLASSES,
        "preprocess": PREPROCESS,
        "calibration": pictures(32),
        "parity_images": pictures(64, seed=1),
        "facts": {"student": "test"},
        "min_agreement": 80
        if precision == "int8"
        else None,  # the pictures are noise, the network random
        "bank": bank(),
    }
    return export_parts(build(), folder, **arguments | changes)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedding") / "onnxruntime-fp32-embedding"
    export(folder, "onnxruntime", "fp32")
    return folder


def test_fp32_file_gives_the_students_directions(fp32: Path) -> None:
    images, session = pictures(10, seed=5), open_session(fp32, threads=1)
    expected = torch_logits(build(), images)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(session.embed(images), expected, atol=1e-5)
    np.testing.assert_allclose(session.run(images), 200 * expected @ bank().vectors.T, atol=2e-3)
    artifact = read_artifact(fp32)
    assert artifact.outputs[0].name == "embedding"
    assert artifact.outputs[0].shape == ("batch", DIM)
    assert (artifact.bank, list(artifact.files)) == (
        "bank.npz",
        ["model.onnx", "edgekd-agent.pyz", "bank.npz"],
    )
    inside = {entry.key for entry in onnx.load(fp32 / "model.onnx").metadata_props}
    assert inside == {"preprocess", "provenance"}, (
        "class names in the file would be wrong after the first change"
    )


@pytest.mark.parametrize(
    ("target", "precision"),
    [("onnxruntime", "fp16"), ("onnxruntime", "int8"), ("tensorrt", "fp16"), ("tensorrt", "int8")],
)
def test_onnx_dialects_hold_parity_in_logits(
    fp32: Path, tmp_path: Path, target: str, precision: str
) -> None:
    artifact = export(tmp_path / "a", target, precision, fp32_path=fp32 / "model.onnx")
    assert artifact.parity["passed"]
    assert artifact.parity["cosine"] > 0.99
    assert artifact.outputs[0].name == "embedding"
    graph = onnx.load(tmp_path / "a" / "model.onnx").graph
    assert graph.output[0].name == "embedding"
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    rounded = {
        name for node in graph.node if node.op_type == "QuantizeLinear" for name in node.output
    }
    readers = [node.op_type for node in graph.node if set(node.input) & rounded]
    assert not set(readers) - {"DequantizeLinear"}
    tail = [node for node in graph.node if node.op_type in ("ReduceL2", "Div")]
    assert len(tail) >= 2
    assert not any("Quantize" in name for node in tail for name in node.input), "a length in 8 bits"


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_the_search_for_layers_in_float_sees_classes_and_leaves_none(
    fp32: Path, tmp_path: Path, target: str
) -> None:
    images = pictures(16, seed=3)
    labels = open_session(fp32, threads=1).run(images).argmax(axis=1)
    budget = AccuracyBudget(images, labels, images, max_drop_id=100, max_drop_ood=100)
    artifact = export(tmp_path / "a", target, "int8", fp32_path=fp32 / "model.onnx", budget=budget)
    assert artifact.quantization is not None
    assert artifact.quantization["mixed"]["images"] == 16
    plain = export(tmp_path / "b", target, "int8", fp32_path=fp32 / "model.onnx")
    assert artifact.files["model.onnx"] == plain.files["model.onnx"], (
        "with nothing kept in float the files are equal"
    )


def added(folder: Path, tmp_path: Path) -> None:
    """A class from images that the file tells apart: recognised, and the others stay as they were."""
    rng = np.random.default_rng(0)
    stripes = np.zeros((12, 32, 32, 3), dtype=np.uint8)
    stripes[:, :, ::2] = (250, 10, 240)
    stripes = np.clip(stripes + rng.integers(0, 30, stripes.shape), 0, 255).astype(np.uint8)
    (tmp_path / "stripes").mkdir()
    for number in range(6):
        Image.fromarray(stripes[number]).save(tmp_path / "stripes" / f"{number}.png")
    other = pictures(32, seed=9)
    before = open_session(folder, threads=1).run(other)
    artifact = edgekd.add_class(folder, "stripes", images=[tmp_path / "stripes"])
    session = open_session(folder, threads=1)
    np.testing.assert_array_equal(session.run(other)[:, : len(CLASSES)], before)
    seen = session.run(stripes[6:]).argmax(axis=1) == CLASSES.index("élan") + 1
    assert seen.mean() > 0.8, "chance is a quarter"
    assert (session.run(other).argmax(axis=1) < len(CLASSES)).mean() > 0.5
    assert artifact.bank is not None
    assert read_bank(folder / artifact.bank).facts["added"][0]["recognised_left_out"] >= 5


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_class_is_added_to_a_file_of_onnx_runtime(
    fp32: Path, tmp_path: Path, precision: str
) -> None:
    export(tmp_path / "a", "onnxruntime", precision, fp32_path=fp32 / "model.onnx")
    added(tmp_path / "a", tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_class_is_added_to_a_file_of_openvino(fp32: Path, tmp_path: Path, precision: str) -> None:
    openvino = pytest.importorskip("openvino", reason='needs pip install "edgekd[openvino]"')
    export(tmp_path / "a", "openvino", precision, fp32_path=fp32 / "model.onnx")
    if precision == "int8":
        nodes = openvino.Core().read_model(tmp_path / "a" / "model.xml").get_ordered_ops()
        divide = next(
            node for node in reversed(nodes) if node.get_type_name() in ("Divide", "NormalizeL2")
        )
        makers = {
            divide.input_value(place).get_node().get_type_name()
            for place in range(divide.get_input_size())
        }
        assert "FakeQuantize" not in makers
    added(tmp_path / "a", tmp_path)
    classifies(tmp_path / "a", tmp_path)


def test_core_ml_package_gives_the_embedding(tmp_path: Path) -> None:
    coremltools = pytest.importorskip("coremltools", reason='needs pip install "edgekd[coreml]"')
    artifact = export(tmp_path / "a", "coreml", "fp16")
    assert artifact.parity["passed"]
    assert [spec.name for spec in artifact.outputs] == ["embedding"]
    described = coremltools.models.utils.load_spec(
        str(tmp_path / "a" / "model.mlpackage")
    ).description
    assert [output.name for output in described.output] == ["embedding"]
    assert list(described.output[0].type.multiArrayType.shape) == [1, DIM]
    assert described.predictedFeatureName == ""
    [entry] = [link for name, link in artifact.details["links"].items() if name.startswith("torch")]
    assert entry["max_error_relative"] < 1e-3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A run with a text head and one without, two steps each."""
    home = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    for domain in ("photo", "sketch"):
        for name, tint in (("cat", (90, 0, 0)), ("dog", (0, 0, 90))):
            for number in range(12):
                path = home / "data" / domain / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((rng.integers(0, 160, (32, 32, 3)) + tint).astype(np.uint8)).save(
                    path
                )
    for recipe in ("vl2v-adip", "erm"):
        settings: dict[str, Any] = {
            "student": "test_efficientnet", "recipe": recipe, "teacher": f"local-dir:{tiny_teacher}",
            "data": str(home / "data"), "pretrained": "scratch", "size": 32, "steps": 2, "batch_size": 8, "views": 1,
            "out": home / recipe, "test_domain": "sketch", "accelerator": "cpu",
        }  # fmt: skip
        edgekd.train(**settings)
    return home


def test_a_run_is_exported_added_to_verified_and_measured(runs: Path, tmp_path: Path) -> None:
    [artifact] = edgekd.export(runs / "vl2v-adip", head="embedding")
    assert artifact.name == "onnxruntime-fp32-embedding"
    folder = artifact.folder
    assert folder is not None
    assert artifact.bank is not None
    first = read_bank(folder / artifact.bank)
    changed = edgekd.add_class(folder, "bird")  # the run's own teacher is asked
    assert changed.classes == ("cat", "dog", "bird")
    now = read_bank(folder / str(changed.bank))
    assert now.facts["added"][0]["templates"] == list(first.facts["templates"])
    np.testing.assert_array_equal(now.vectors[:2], first.vectors)
    assert [link["passed"] for link in edgekd.verify(folder)] == [True]
    report = edgekd.benchmark(
        runs / "vl2v-adip", quick=True, out=tmp_path / "report", examples=False
    )
    assert {row.subject for row in report.accuracy} == {"teacher", "torch", artifact.name}
    # Far from its run, on images of all three classes.
    (tmp_path / "alone").mkdir()
    os.rename(folder, tmp_path / "alone" / folder.name)
    for name in ("cat", "dog", "bird"):
        target = tmp_path / "birds" / name
        target.mkdir(parents=True)
        for number in range(3):
            Image.open(
                runs / "data" / "sketch" / ("cat" if name == "bird" else name) / f"{number}.png"
            ).save(target / f"{number}.png")
    alone = edgekd.benchmark(
        tmp_path / "alone" / folder.name,
        data=str(tmp_path / "birds"),
        quick=True,
        out=tmp_path / "two",
        examples=False,
    )
    assert {row.n for row in alone.accuracy} == {9}
    [link] = edgekd.verify(tmp_path / "alone" / folder.name, data=str(runs / "data"))
    assert link["passed"]


def test_a_trained_classifier_has_no_embedding(runs: Path) -> None:
    with pytest.raises(EdgekdError, match="so there is no embedding to end in") as caught:
        edgekd.export(runs / "erm", head="embedding")
    assert "such as vl2v-adip" in caught.value.hint
    assert caught.value.exit_code == 2
    assert not (runs / "erm" / "artifacts").exists()
    with pytest.raises(EdgekdError, match='no head "logits"'):
        edgekd.export(runs / "erm", head="logits")


def test_documented_lines_are_all_that_numpy_needs(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    [code] = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        if "bank" in block
    ]
    assert "edgekd" not in code
    shutil.copytree(fp32, tmp_path / "onnxruntime-int8-embedding")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/export.md", "exec"), names)
    expected = open_session(fp32, threads=1).run(np.zeros((1, 32, 32, 3), dtype=np.uint8))
    np.testing.assert_allclose(names["logits"], expected, rtol=1e-4)
    assert capsys.readouterr().out.strip() == CLASSES[expected[0].argmax()]


def test_agent_in_the_folder_runs_as_documented(fp32: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    lines = re.findall(r"^python3 edgekd-agent.pyz (\w+) ", text, re.MULTILINE)
    assert lines == ["add", "classify"]
    classifies(fp32, tmp_path)


def classifies(folder: Path, tmp_path: Path) -> None:
    """The agent in the artifact's folder names the class that a session here names."""
    Image.fromarray(pictures(1)[0]).save(tmp_path / "picture.jpg")
    done = subprocess.run(
        [sys.executable, "edgekd-agent.pyz", "classify", ".", str(tmp_path / "picture.jpg")],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    session = open_session(folder, threads=1)
    pixels = session.artifact.preprocess.pixels(Image.open(tmp_path / "picture.jpg"))
    assert (
        json.loads(done.stdout)["found"]
        == session.artifact.classes[session.run(pixels[None])[0].argmax()]
    )
