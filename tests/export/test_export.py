from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from export_fakes import CLASSES, PREPROCESS, build, export, logits, pictures

from edgekd.configs.export import ExportConfig
from edgekd.core.errors import EdgekdError, GateFailed
from edgekd.core.manifest import Artifact, read_artifact
from edgekd.export.graph import torch_logits
from edgekd.export.parity import check
from edgekd.export.quantize.search import AccuracyBudget
from edgekd.export.run import int8_speed
from edgekd.targets import profiles
from edgekd.targets.agent.model import open_model
from edgekd.targets.registry import artifact_name
from edgekd.targets.session import open_session

pytestmark = pytest.mark.usefixtures("graphs_once")


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "onnxruntime-fp32"
    export(build(), folder, "fp32")
    return folder


def test_fp32_artifact_computes_the_model_and_describes_it(fp32: Path) -> None:
    artifact, images = read_artifact(fp32), pictures(10, seed=5)
    found = open_session(fp32, threads=1).run(images)
    np.testing.assert_allclose(found, torch_logits(build(), images), atol=1e-5)
    assert (artifact.parity["passed"], artifact.parity["n"]) == (True, 64)
    assert artifact.quantization is None
    assert {path.name for path in fp32.iterdir()} == {"artifact.json", "labels.txt", "model.onnx"}
    entries = onnx.load(fp32 / "model.onnx").metadata_props
    inside = {entry.key: json.loads(entry.value) for entry in entries}
    assert inside["classes"] == list(CLASSES)
    assert inside["preprocess"] == artifact.preprocess.model_dump(mode="json")
    assert inside["provenance"]["student"] == "test"


@pytest.mark.parametrize(
    ("target", "precision"), [("onnxruntime", "int8"), ("openvino", "int8"), ("tensorrt", "fp16")]
)
def test_the_same_model_is_the_same_file(
    tmp_path: Path, target: str, precision: str, graphs_once: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekd.export.onnx.write.to_proto", graphs_once)
    if target == "openvino":
        pytest.importorskip("openvino")
    first, again = (
        export(build(), tmp_path / name, precision, target, parity_keys=["a"] * 64)
        for name in ("a", "b")
    )
    assert (first.files, first.quantization) == (again.files, again.quantization)


def test_int8_records_its_calibration_and_is_calibrated_by_mse_where_minmax_fails(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = iter([{"passed": False, "reason": "a test"}, {}])
    monkeypatch.setattr("edgekd.export.artifact.check", lambda *given: check(*given) | next(fails))
    artifact = export(build(), tmp_path / "a", "int8", fp32_path=fp32 / "model.onnx")
    assert artifact.quantization is not None
    assert artifact.quantization["calibrator"] == "mse"
    assert artifact.quantization["calibration_images"] == 32
    assert artifact.quantization["ids"][1] == "image 1"
    assert artifact.parity["passed"] is True
    assert artifact.parity["cosine"] > 0.99
    assert read_artifact(tmp_path / "a") == artifact
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    nodes = onnx.load(tmp_path / "a" / "model.onnx").graph.node
    assert any(node.op_type == "QuantizeLinear" for node in nodes)


def test_a_failed_gate_keeps_the_file_aside(fp32: Path, tmp_path: Path) -> None:
    path, folder = fp32 / "model.onnx", tmp_path / "a"

    def refused(precision: str = "int8", **changes: Any) -> str:
        with pytest.raises(GateFailed) as caught:
            export(build(seed=9), folder, precision, fp32_path=path, **changes)
        assert caught.value.exit_code == 1
        return caught.value.hint

    refused("fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["a.failed"]
    assert read_artifact(tmp_path / "a.failed").parity["passed"] is False
    hint = refused()
    kept = read_artifact(tmp_path / "a.failed").parity
    assert kept["passed"] is False
    for way in ("--max-drop-id 1.0", "--calibration-images 300"):
        assert way in hint
    assert "--calibration-images" not in refused(calibration=pictures(100))
    assert "--calibrator percentile" in refused(calibrator="minmax")
    assert "--calibrator" not in refused(calibrator="mse")
    none = np.zeros(8, dtype=np.int64)
    limits = AccuracyBudget(pictures(8), none, pictures(8), 100.0, 100.0, min_agreement=0)
    assert "--max-drop" not in refused(budget=limits)
    percent = int(hint.partition("--min-agreement ")[2].rstrip("."))
    # The threshold of the hint must pass.
    assert percent <= 100 * kept["top1_agreement"] < percent + 1
    artifact = export(build(seed=9), folder, "int8", fp32_path=path, min_agreement=percent)
    assert (artifact.parity["passed"], artifact.parity["min_agreement"]) == (True, percent / 100)


@pytest.mark.parametrize(
    ("precision", "changes", "message"),
    [
        ("int8", {"calibration": None}, "needs calibration images"),
        ("fp32", {"parity_images": pictures(1)[:0]}, "no images for the parity check"),
        ("int4", {}, "int4"),
        ("int8", {"calibrator": "mes"}, "mse"),
        ("fp16", {"calibrator": "mse"}, "no ranges to choose"),
        ("int8", {"calibrator": "mse", "target": "openvino"}, "openvino has no calibrator"),
        ("fp32", {"min_agreement": 50}, "--min-agreement"),
        ("fp32", {"target": "onnxruntim"}, "There is no target"),
    ],
)
def test_impossible_wishes_leave_nothing_behind(
    fp32: Path, tmp_path: Path, precision: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(EdgekdError, match=message):
        export(build(), tmp_path / "a", precision, fp32_path=fp32 / "model.onnx", **changes)
    assert list(tmp_path.iterdir()) == []


def test_int8_is_timed_beside_fp32(fp32: Path, tmp_path: Path) -> None:
    int8 = export(build(), tmp_path / "onnxruntime-int8", "int8", fp32_path=fp32 / "model.onnx")
    assert int8_speed(int8) is None
    shutil.copytree(fp32, tmp_path / "onnxruntime-fp32")
    other = int8.model_copy(update={"name": "openvino-int8", "target": "openvino"})
    for artifact in (int8, other):
        assert "onnxruntime-fp32" in str(int8_speed(artifact))
    shutil.copytree(fp32, tmp_path / "openvino-fp32")
    assert "openvino-fp32" in str(int8_speed(other))


def test_what_a_killed_export_left_goes_with_a_later_one(fp32: Path, tmp_path: Path) -> None:
    old, new = (tmp_path / f".tmp-0123456789a{digit}-a" for digit in "bc")
    for folder in (old, new):
        (folder / "search-x").mkdir(parents=True)
        (folder / "search-x" / "trial.onnx").write_bytes(b"half")
    yesterday = time.time() - 25 * 3600
    for path in (*old.rglob("*"), old):
        os.utime(path, (yesterday, yesterday))
    export(build(), tmp_path / "a", "fp32", fp32_path=fp32 / "model.onnx")
    # The other may be at work.
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, "a"]
    with pytest.raises(EdgekdError, match="exists"):
        export(build(), tmp_path / "a", "fp32", fp32_path=fp32 / "model.onnx")


IMAGES = pictures(40, seed=7)


def float_file(
    folder: Path, precision: str = "fp32", target: str = "onnxruntime", **changes: Any
) -> Artifact:
    model = changes.pop("model", None) or build()
    return export(model, folder, precision, target=target, input="float", **changes)


def by_hand(images: np.ndarray) -> np.ndarray:
    """What other programs do, in float64."""
    centred = images.astype(np.float64) / 255 - np.array(PREPROCESS.mean)
    return (centred / np.array(PREPROCESS.std)).transpose(0, 3, 1, 2).astype(np.float32)


@pytest.fixture(scope="module")
def floats(fp32: Path) -> Path:
    float_file(fp32.with_name("floats"), fp32_path=fp32 / "model.onnx")
    return fp32.with_name("floats")


def test_the_file_takes_what_other_programs_feed(floats: Path, fp32: Path) -> None:
    artifact = read_artifact(floats)
    [taken] = artifact.inputs
    assert (taken.name, taken.dtype, taken.shape) == ("image", "float32", ("batch", 3, 32, 32))
    assert taken.layout.startswith("NCHW RGB, normalised")
    assert artifact.input == "float"
    nodes = onnx.load(floats / "model.onnx").graph.node
    assert [node.op_type for node in nodes] == ["Conv", "Relu", "ReduceMean", "Gemm"]
    expected, close = torch_logits(build(), IMAGES), {"rtol": 0, "atol": 1e-5}
    session = open_session(floats, threads=1)
    np.testing.assert_allclose(logits(floats / "model.onnx", by_hand(IMAGES)), expected, **close)
    np.testing.assert_allclose(session.run(IMAGES), expected, **close)
    with pytest.raises(EdgekdError, match=r"takes uint8 \[B, 32, 32, 3\], not float32"):
        session.run(by_hand(IMAGES))  # type: ignore[arg-type]
    agents = open_model(floats, threads=1).run(IMAGES[:1])
    np.testing.assert_array_equal(agents, session.run(IMAGES[:1]))


@pytest.mark.parametrize(
    ("target", "precision"),
    [("onnxruntime", "fp16"), ("onnxruntime", "int8"), ("tensorrt", "int8")],
)
def test_float_input_changes_no_layer(
    fp32: Path, tmp_path: Path, target: str, precision: str
) -> None:
    base = fp32 / "model.onnx"
    plain = export(build(), tmp_path / "plain", precision, target=target, fp32_path=base)
    floats = float_file(tmp_path / "floats", precision, target, fp32_path=base)
    assert floats.parity["passed"] is True
    assert floats.quantization == plain.quantization
    models = [onnx.load(tmp_path / name / "model.onnx") for name in ("plain", "floats")]
    before, after = (Counter(node.op_type for node in model.graph.node) for model in models)
    kept_cast = (target, precision) != ("onnxruntime", "int8")  # from bytes became one from float32
    gone = Counter(Reshape=2, Mul=1, Add=1, Transpose=1, Cast=0 if kept_cast else 1)
    assert before - after == gone
    assert after - before == Counter()


def test_openvino_takes_floats_and_an_accuracy_budget(fp32: Path, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason='needs pip install "edgekd[openvino]"')
    expected, base, images = (
        torch_logits(build(), IMAGES),
        fp32 / "model.onnx",
        pictures(48, seed=3),
    )
    labels = torch_logits(build(), images).argmax(axis=1)
    limits = AccuracyBudget(images, labels, images, 0.0, 0.0, min_agreement=1.0)
    artifact = float_file(tmp_path / "a", "int8", "openvino", budget=limits, fp32_path=base)
    assert artifact.parity["passed"] is True
    assert artifact.quantization is not None
    assert artifact.quantization["mixed"]["agreement"] == 1.0
    taken = openvino.Core().read_model(tmp_path / "a" / "model.xml").input(0)
    assert str(taken.get_element_type()) == "<Type: 'float32'>"
    assert taken.partial_shape[1].get_length() == 3
    found = open_session(tmp_path / "a", threads=1).run(IMAGES)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.05 * np.ptp(expected))
    agents = open_model(tmp_path / "a", threads=1).run(IMAGES[:1])
    np.testing.assert_allclose(agents, found[:1], atol=1e-6)


def test_names_and_words(tmp_path: Path) -> None:
    name = artifact_name("openvino", "int8", embedding=True, input="float")
    assert name == "openvino-int8-embedding-float-input"
    assert artifact_name("onnxruntime", "int8", padding=False) == "onnxruntime-int8-unpadded"
    for words in (
        {"padding": False},
        {"padding": False, "precision": "int8", "target": "openvino"},
        {"input": "flaot"},
        {"target": "coreml", "input": "float"},
    ):
        with pytest.raises(EdgekdError):
            ExportConfig.load(**words)


NPU = """
name = "my-npu"
summary = "A board of mine"
runtime = "ONNX Runtime, CPU"
precisions = ["int8"]
input = "float"
because = {runtime = "page", precisions = "page", input = "page"}
sources.page = {title = "The board's page", url = "https://example.org/board"}
"""


def test_a_profile_may_demand_floats(tmp_path: Path) -> None:
    path = tmp_path / "my-npu.toml"
    path.write_text(NPU)
    inputs = [
        profiles.follow_profile(ExportConfig(profile=profile, input=given), {"input"}).input
        for profile in (None, str(path), "raspberry-pi-5")
        for given in (None, "uint8", "float")
    ]
    assert inputs == [None, "uint8", "float", "float", "uint8", "float", None, "uint8", "float"]
    for text in (NPU.replace(', input = "page"', ""), NPU.replace('"float"', '"nchw"')):
        path.write_text(text)
        with pytest.raises(EdgekdError):
            profiles.load_profile(path)
