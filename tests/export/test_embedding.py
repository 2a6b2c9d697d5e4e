from __future__ import annotations

import json
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
from artifact_fakes import BANK_FACTS
from device_fakes import be_brief
from export_fakes import CLASSES, PREPROCESS, Backbone, export_parts, pictures
from PIL import Image
from study_data import draw_domains, tiny_settings

import edgekd
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import Artifact, read_artifact
from edgekd.export.graph import Deployable, UnitHead, torch_logits
from edgekd.export.quantize.search import AccuracyBudget
from edgekd.targets.agent.model import open_model
from edgekd.targets.bank import ClassBank, read_bank, unit
from edgekd.targets.session import open_session

pytestmark = pytest.mark.usefixtures("graphs_once")

DIM = 6


def build() -> Deployable:
    torch.manual_seed(0)
    return Deployable(Backbone(), UnitHead(torch.nn.Linear(8, DIM), DIM, 0.3), PREPROCESS).eval()


def bank() -> ClassBank:
    """Class vectors where the student's embeddings are: each the embedding of one image."""
    vectors = unit(torch_logits(build(), pictures(3, seed=7)))
    return ClassBank(CLASSES, vectors, 200.0, None, dict(BANK_FACTS))


def export(folder: Path, target: str, precision: str, **changes: Any) -> Artifact:
    # The images are noise, the network random.
    least = 80 if precision == "int8" else None
    arguments: dict[str, Any] = {
        "target": target, "precision": precision, "classes": CLASSES, "preprocess": PREPROCESS,
        "calibration": pictures(32), "parity_images": pictures(64, seed=1), "facts": {"student": "test"},
        "min_agreement": least, "bank": bank(),
    }  # fmt: skip
    return export_parts(build(), folder, **arguments | changes)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedding") / "onnxruntime-fp32-embedding"
    export(folder, "onnxruntime", "fp32")
    return folder


def test_fp32_file_gives_the_students_directions(fp32: Path, tmp_path: Path) -> None:
    images, session = pictures(10, seed=5), open_session(fp32, threads=1)
    expected = torch_logits(build(), images)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(session.embed(images), expected, atol=1e-5)
    np.testing.assert_allclose(session.run(images), 200 * expected @ bank().vectors.T, atol=2e-3)
    artifact = read_artifact(fp32)
    assert (artifact.outputs[0].name, artifact.outputs[0].shape) == ("embedding", ("batch", DIM))
    assert artifact.bank == "bank.npz"
    assert list(artifact.files) == ["model.onnx", "edgekd-agent.pyz", "bank.npz"]
    # Class names in the file would be wrong after the first change.
    inside = {entry.key for entry in onnx.load(fp32 / "model.onnx").metadata_props}
    assert inside == {"preprocess", "provenance"}
    export(tmp_path / "a", "onnxruntime", "fp32", input="float", fp32_path=fp32 / "model.onnx")
    floats = open_session(tmp_path / "a", threads=1).embed(images)
    np.testing.assert_allclose(floats, expected, atol=1e-5)
    agent = open_model(tmp_path / "a", threads=1)
    assert agent.embed is not None
    np.testing.assert_array_equal(agent.embed(images), floats)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_quantized_files_hold_parity_in_logits(fp32: Path, tmp_path: Path, target: str) -> None:
    images, path = pictures(16, seed=3), fp32 / "model.onnx"
    plain = export(tmp_path / "a", target, "int8", fp32_path=path)
    assert plain.parity["passed"]
    assert plain.parity["cosine"] > 0.99
    graph = onnx.load(tmp_path / "a" / "model.onnx").graph
    assert graph.output[0].name == plain.outputs[0].name == "embedding"
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    tail = [node for node in graph.node if node.op_type in ("ReduceL2", "Div")]
    assert len(tail) >= 2
    assert not any("Quantize" in name for node in tail for name in node.input), "a length in 8 bits"
    labels = open_session(fp32, threads=1).run(images).argmax(axis=1)
    budget = AccuracyBudget(images, labels, images, max_drop_id=100, max_drop_ood=100)
    searched = export(tmp_path / "b", target, "int8", fp32_path=path, budget=budget)
    assert searched.quantization is not None
    assert searched.quantization["mixed"]["images"] == 16
    assert searched.files["model.onnx"] == plain.files["model.onnx"]  # nothing is kept in float


def added(folder: Path, tmp_path: Path) -> None:
    """Assert that a class from images that the file tells apart is recognised, and that the others stay."""
    rng = np.random.default_rng(0)
    stripes = np.zeros((12, 32, 32, 3), dtype=np.uint8)
    stripes[:, :, ::2] = (220, 10, 220)
    stripes += rng.integers(0, 30, stripes.shape, dtype=np.uint8)
    (tmp_path / "stripes").mkdir()
    for number in range(6):
        Image.fromarray(stripes[number]).save(tmp_path / "stripes" / f"{number}.png")
    other, known = pictures(32, seed=9), len(CLASSES)
    before = open_session(folder, threads=1).run(other)
    artifact = edgekd.add_class(folder, "stripes", images=[tmp_path / "stripes"])
    session = open_session(folder, threads=1)
    np.testing.assert_array_equal(session.run(other)[:, :known], before)
    assert (session.run(stripes[6:]).argmax(axis=1) == known).mean() > 0.8  # chance is a quarter
    assert (session.run(other).argmax(axis=1) < known).mean() > 0.5
    assert artifact.bank is not None
    assert read_bank(folder / artifact.bank).facts["added"][0]["recognised_left_out"] >= 5


@pytest.mark.parametrize(
    ("target", "precision"),
    [("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "int8")],
)
def test_a_class_is_added(fp32: Path, tmp_path: Path, target: str, precision: str) -> None:
    if target == "openvino":
        openvino = pytest.importorskip("openvino", reason='needs pip install "edgekd[openvino]"')
    export(tmp_path / "a", target, precision, fp32_path=fp32 / "model.onnx")
    if target == "openvino":
        nodes = openvino.Core().read_model(tmp_path / "a" / "model.xml").get_ordered_ops()
        *_, last = (node for node in nodes if node.get_type_name() in ("Divide", "NormalizeL2"))
        inputs = [last.input_value(place).get_node() for place in range(last.get_input_size())]
        assert "FakeQuantize" not in [node.get_type_name() for node in inputs], "a length in 8 bits"
    added(tmp_path / "a", tmp_path)
    classifies(tmp_path / "a", tmp_path)


def test_core_ml_package_gives_the_embedding(tmp_path: Path) -> None:
    coremltools = pytest.importorskip("coremltools", reason='needs pip install "edgekd[coreml]"')
    artifact = export(tmp_path / "a", "coreml", "fp32")
    assert artifact.parity["passed"]
    assert artifact.parity["max_error_relative"] < 1e-4
    package = str(tmp_path / "a" / "model.mlpackage")
    described = coremltools.models.utils.load_spec(package).description
    assert [output.name for output in described.output] == ["embedding"]
    assert list(described.output[0].type.multiArrayType.shape) == [1, DIM]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A run with a text head and one without, two steps each."""
    home = tmp_path_factory.mktemp("runs")
    settings = tiny_settings(draw_domains(home / "data"), tiny_teacher)
    for recipe in ("vl2v-adip", "erm"):
        edgekd.train(**settings, recipe=recipe, out=home / recipe, test_domain="sketch")
    return home


def test_a_run_through_every_verb(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_brief(monkeypatch)
    [artifact] = edgekd.export(runs / "vl2v-adip", head="embedding")
    assert artifact.name == "onnxruntime-fp32-embedding"
    assert artifact.folder is not None
    folder, first = artifact.folder, read_bank(artifact.folder / str(artifact.bank))
    changed = edgekd.add_class(folder, "bird")  # by the run's own teacher
    assert changed.classes == ("cat", "dog", "bird")
    now = read_bank(folder / str(changed.bank))
    assert now.facts["added"][0]["templates"] == list(first.facts["templates"])
    np.testing.assert_array_equal(now.vectors[:2], first.vectors)
    assert [link["passed"] for link in edgekd.verify(folder)] == [True]
    options: dict[str, Any] = {"quick": True, "examples": False}
    report = edgekd.benchmark(runs / "vl2v-adip", out=tmp_path / "report", **options)
    assert {row.subject for row in report.accuracy} == {"teacher", "torch", artifact.name}
    # Far from its run, on images of all three classes.
    moved = tmp_path / "alone" / folder.name
    shutil.move(folder, moved)
    data = draw_domains(tmp_path / "birds", ("cat", "dog", "bird"), count=1)
    alone = edgekd.benchmark(moved, data=str(data), out=tmp_path / "two", **options)
    assert {row.n for row in alone.accuracy} == {3}  # of each of three domains
    [link] = edgekd.verify(moved, data=str(runs / "data"))
    assert link["passed"]
    # A trained classifier has no embedding.
    for head in ("embedding", "logits"):
        with pytest.raises(EdgekdError):
            edgekd.export(runs / "erm", head=head)
    assert not (runs / "erm" / "artifacts").exists()


def test_documented_lines_are_all_that_numpy_needs(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    [code] = [block for block in blocks if "bank" in block]
    assert "edgekd" not in code
    shutil.copytree(fp32, tmp_path / "onnxruntime-int8-embedding")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/export.md", "exec"), names)
    expected = open_session(fp32, threads=1).run(np.zeros((1, 32, 32, 3), dtype=np.uint8))
    np.testing.assert_allclose(names["logits"], expected, rtol=1e-4)
    assert capsys.readouterr().out.strip() == CLASSES[expected[0].argmax()]


def classifies(folder: Path, tmp_path: Path) -> None:
    """The agent in the artifact's folder names the class that a session here names."""
    Image.fromarray(pictures(1)[0]).save(tmp_path / "picture.jpg")
    words = [sys.executable, "edgekd-agent.pyz", "classify", ".", str(tmp_path / "picture.jpg")]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    session = open_session(folder, threads=1)
    pixels = session.artifact.preprocess.pixels(Image.open(tmp_path / "picture.jpg"))
    expected = session.artifact.classes[session.run(pixels[None])[0].argmax()]
    assert json.loads(done.stdout)["found"] == expected
