from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from artifact_fakes import rehash
from benchmark_fakes import ONE_THREAD
from device_fakes import (
    BRIEF,
    artifact_subject,
    check_measured,
    plant_absence,
    two_suites,
    write_images,
)
from export_fakes import SIZE, block_model, export_block, logits, pictures, write_onnx
from test_mixed import budget, spoilt

from edgekd.benchmark import device as devices
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import Artifact, read_artifact
from edgekd.export.graph import torch_logits
from edgekd.export.quantize import openvino as ov_int8
from edgekd.export.quantize.openvino import Rounded, layers_in_float, revert_to_float
from edgekd.export.quantize.search import quantize_within
from edgekd.targets.session import open_session

pytestmark = pytest.mark.usefixtures("graphs_once")

openvino = pytest.importorskip("openvino", reason='needs pip install "edgekd[openvino]"')


def export_openvino(folder: Path, precision: str, **changes: object) -> Artifact:
    return export_block(folder, "openvino", precision, **changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("openvino")
    for precision in ("fp32", "fp16", "int8"):
        export_openvino(home / precision, precision)
    return {precision: home / precision for precision in ("fp32", "fp16", "int8")}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 5e-3)])
def test_float_files_compute_the_model(
    folders: dict[str, Path], precision: str, tolerance: float
) -> None:
    images = pictures(9, seed=5)
    session = open_session(folders[precision], threads=1, spinning=False)
    found, expected = session.run(images), torch_logits(block_model(), images)
    session.run(pictures(9, seed=8))  # the next output has memory of its own
    np.testing.assert_allclose(found, expected, atol=tolerance)
    assert session.threads == 1
    assert session.provider.startswith("OpenVINO 20")
    parity = read_artifact(folders[precision]).parity
    assert parity["passed"] is True
    assert parity["run_by"] == session.provider


def test_int8_file_is_int8_and_close(folders: dict[str, Path]) -> None:
    facts = read_artifact(folders["int8"]).quantization
    assert facts is not None
    assert (facts["calibration_images"], facts["ids"][3]) == (24, "3")
    assert facts["quantized_layers"] + len(facts["float_layers"]) == 6
    # Stem, depthwise, pointwise and head. Squeeze-and-excite is a choice of NNCF.
    assert facts["quantized_layers"] >= 4
    model = openvino.Core().read_model(folders["int8"] / "model.xml")
    constants = [node for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]
    kinds = [str(node.get_element_type()) for node in constants]
    assert kinds.count("<Type: 'int8_t'>") >= 4, kinds
    assert str(model.input(0).get_element_type()) == "<Type: 'uint8_t'>"
    images = pictures(100, seed=2)
    reference = torch_logits(block_model(), images)
    candidate = open_session(folders["int8"], threads=1).run(images)
    assert not np.array_equal(reference, candidate)
    assert np.square(candidate - reference).mean() < 0.2 * reference.var(axis=0).mean()


def test_a_signal_after_sessions_have_gone_is_handled(folders: dict[str, Path]) -> None:
    """OpenVINO handles signals on a stack of its own, which must not be freed in the process's use."""
    script = """
import os, signal, sys
from pathlib import Path
from edgekd.targets.session import open_session
first, second = (open_session(Path(p), threads=1, spinning=False) for p in sys.argv[1:])
del first
del second
signal.signal(signal.SIGTERM, lambda number, frame: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
"""
    words = [sys.executable, "-c", script, folders["fp32"], folders["int8"]]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_file_holds_its_own_metadata_and_no_paths(folders: dict[str, Path]) -> None:
    model = openvino.Core().read_model(folders["fp32"] / "model.xml")
    assert json.loads(model.get_rt_info(["edgekd", "classes"]).astype(str)) == ["a", "b", "c", "d"]
    own = str(Path(__file__).parents[2])
    for folder in folders.values():
        names = {path.name for path in folder.iterdir()}
        assert names == {"artifact.json", "labels.txt", "model.bin", "model.xml"}
        assert own not in (folder / "model.xml").read_text(encoding="utf-8")


def test_nncf_does_not_report_to_its_makers() -> None:
    code = "from edgekd.export.quantize import openvino; openvino.import_nncf(); "
    code += "from nncf.telemetry.wrapper import telemetry; print(type(telemetry).__name__)"
    clean = {key: value for key, value in os.environ.items() if key != "NNCF_CI"}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=clean)
    assert done.stdout.strip() == "MagicMock"


def test_what_cannot_be_opened_or_written_is_named(
    folders: dict[str, Path], fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = shutil.copytree(folders["fp32"], tmp_path / "broken")
    os.truncate(broken / "model.xml", 500)
    rehash(broken)
    with pytest.raises(EdgekdError, match="cannot load") as caught:
        open_session(broken)
    assert "\n" not in str(caught.value)
    rehash(broken, openvino="2099.1.0")
    with pytest.raises(EdgekdError, match=r"2099\.1\.0"):
        open_session(broken)
    shutil.rmtree(broken)
    for version in ("2024.6.0-1-abc", "2027.0.0-1-abc"):
        with monkeypatch.context() as patch:
            patch.setattr(openvino, "__version__", version)
            with pytest.raises(EdgekdError, match=version[:6]):
                open_session(folders["fp32"])
            with pytest.raises(EdgekdError, match=version[:6]):
                export_openvino(tmp_path / "a", "fp32")

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")  # OpenVINO's words on a full disk

    monkeypatch.setattr(openvino, "save_model", full)
    with pytest.raises(EdgekdError, match="could not write its files"):
        export_openvino(tmp_path / "a", "fp32")
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(EdgekdError) as caught:
        SCHEME.calibrate(fp32, pictures(2), "minmax")
    assert "edgekd[openvino]" in caught.value.hint
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EdgekdError) as caught:
        open_session(folders["fp32"])
    assert "edgekd[openvino]" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_weights_and_images_that_cannot_be_quantized_are_refused(tmp_path: Path) -> None:
    model: Any = block_model()
    with torch.no_grad():
        model.backbone.pointwise.weight[0] = float("nan")
    with pytest.raises(EdgekdError, match="not finite"):
        export_openvino(tmp_path / "a", "int8", model=model)
    with pytest.raises(EdgekdError, match="alike"):
        export_openvino(tmp_path / "a", "int8", calibration=np.repeat(pictures(1), 8, axis=0))
    for precision, wanted in (("fp16", "fp8"), ("fp32", "bf16")):
        with pytest.raises(EdgekdError, match=r"no inference_precision|own logits"):
            export_openvino(tmp_path / "a", precision, inference_precision=wanted)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("own_cache")
def test_an_agent_with_nothing_but_the_runtimes_gives_the_same_answers(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO in FP32 and INT8 in one job, in processes that cannot load what edgekd needs."""
    absent = ("torch", "timm", "pydantic", "typer", "rich", "platformdirs", "onnx", "nncf", "scipy")
    monkeypatch.setattr(devices, "QUICK", BRIEF)
    subjects = [artifact_subject(folders[precision]) for precision in ("fp32", "int8")]
    suites = two_suites(replace(write_images(tmp_path / "images", 24), classes=("a", "b", "c")))
    plant_absence(monkeypatch, tmp_path / "planted", *absent)
    found = devices.on_devices(subjects, suites, ["local"], ONE_THREAD)
    check_measured(found[:1], (subjects[:1], suites), "local", share=1e-4)
    check_measured(found[1:], (subjects[1:], suites), "local", share=0.02)
    for one in found:
        assert one.measured is not None
        assert one.measured.result.model[0].provider.startswith("OpenVINO 20")
        assert one.measured.facts["versions"]["openvino"] is not None


@pytest.mark.parametrize("wanted", ["f32", "bf16"])
def test_the_inference_precision_is_the_files_own(wanted: str, tmp_path: Path) -> None:
    capable = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if wanted == "bf16" and "BF16" not in capable:
        with pytest.raises(EdgekdError, match=f"wants {wanted}"):
            export_openvino(tmp_path / "a", "fp16", inference_precision=wanted)
        return
    artifact = export_openvino(tmp_path / "a", "fp16", inference_precision=wanted)
    assert artifact.details["inference_precision"] == wanted
    session = open_session(tmp_path / "a", threads=1, spinning=False)
    assert session.provider.endswith(f"CPU, {wanted}")
    error = np.abs(session.run(pictures(9)) - torch_logits(block_model(), pictures(9))).max()
    assert error < 5e-3


SCHEME = ov_int8.OpenVinoInt8({"classes": "[]"})


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spoilt(tmp_path_factory.mktemp("ov") / "fp32.onnx")


@pytest.fixture(scope="module")
def rounded(fp32: Path) -> Rounded:
    return SCHEME.calibrate(fp32, pictures(24), "minmax")


def kinds_without_int8(rounded: Rounded, fp32: Path, images: np.ndarray, path: Path) -> set[str]:
    """Kinds of the operations with every unit in float, whose outputs must be those of the FP32 file."""
    everything = [name for unit in SCHEME.groups(rounded) for name in unit.nodes]
    assert SCHEME.write(rounded, path, in_float=everything)["quantized_layers"] == 0
    full = logits(fp32, images)
    # Its weights are stored in 16 bits, 11 of them for the digits.
    assert np.abs(SCHEME.open(path)(images) - full).max() < 2e-3 * np.abs(full).max()
    return {node.get_type_name() for node in openvino.Core().read_model(path).get_ordered_ops()}


def test_units_hold_what_int8_changes(fp32: Path, rounded: Rounded, tmp_path: Path) -> None:
    units = SCHEME.groups(rounded)
    layers = [unit.name for unit in units if unit.weighted]
    assert {"stem", "depthwise", "pointwise", "head"} <= set(layers)
    assert any(unit.name.startswith("Add after ") for unit in units)
    assert len({unit.nodes[0] for unit in units}) == len(units)
    left = kinds_without_int8(rounded, fp32, pictures(8), tmp_path / "none.xml")
    assert "FakeQuantize" not in left


def test_the_search_keeps_what_the_gate_needs(fp32: Path, tmp_path: Path) -> None:
    def within(name: str, drop: float) -> dict[str, Any]:
        gate = budget(fp32, max_drop_id=drop)
        return quantize_within(fp32, tmp_path / name, pictures(24), gate, scheme=SCHEME)["mixed"]

    loose = within("loose.xml", 100)
    assert loose["kept_in_float"] == []
    assert loose["drop_id_points"] > 0, "the model must be one that INT8 hurts"
    tight = within("tight.xml", loose["drop_id_points"] / 2)
    assert tight["kept_in_float"]
    images = budget(fp32)
    found = SCHEME.open(tmp_path / "tight.xml")(images.pixels).argmax(axis=1)
    assert tight["drop_id_points"] == pytest.approx(100 * (found != images.labels).mean(), abs=1e-3)
    assert tight["drop_id_points"] <= loose["drop_id_points"] / 2
    sizes = {path.name: path.stat().st_size / 1e6 for path in tmp_path.iterdir()}
    assert sorted(sizes) == ["loose.bin", "loose.xml", "tight.bin", "tight.xml"]
    added = sum(size if "tight" in name else -size for name, size in sizes.items())
    assert tight["cost_mb"] == pytest.approx(added, abs=1e-3)


def textured(n: int, seed: int = 0) -> np.ndarray:
    """Smooth pictures with grain: of smooth ones alone, a deep random network sees little but its own rounding."""
    grain = np.random.default_rng(seed).integers(0, 128, (n, SIZE // 2, SIZE // 2, 3))
    return (pictures(n, seed) // 2 + grain.repeat(2, axis=1).repeat(2, axis=2)).astype(np.uint8)


@pytest.fixture(scope="module")
def body() -> Any:
    torch.manual_seed(0)
    made = timm.create_model("test_vit", num_classes=0, depth=2, img_size=SIZE, patch_size=8)
    for parameter in made.parameters():
        # As initialised, vectors are 0 and 1, and many of them one constant in the file.
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return made


@pytest.fixture(scope="module")
def transformer(body: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(body, body.num_features, tmp_path_factory.mktemp("vit") / "fp32.onnx")


@pytest.fixture(scope="module")
def rounded_transformer(transformer: Path) -> Rounded:
    return SCHEME.calibrate(transformer, textured(24), "minmax")


def kinds_ahead(model: object, layer: str) -> set[str]:
    """Kinds of the operations that what `layer` reads comes through, back to the last that computes."""
    node, kinds = next(n for n in model.get_ordered_ops() if n.get_friendly_name() == layer), set()
    while True:
        node = node.input_value(0).get_node()
        kinds.add(node.get_type_name())
        if node.get_type_name() not in ("Reshape", "Transpose", "Gather", "FakeQuantize"):
            return kinds


def test_a_transformer_rounds_its_layers_and_nothing_else(
    rounded_transformer: Rounded, transformer: Path, tmp_path: Path
) -> None:
    units = SCHEME.groups(rounded_transformer)
    assert all(unit.weighted for unit in units), "neither layer norms nor sums of tokens"
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    blocks = [f"blocks.{block}.{layer}" for block in (0, 1) for layer in layers]
    named = [unit.name for unit in units if " after " not in unit.name]
    assert named == ["patch_embed.proj", *blocks, "head"]
    products = [unit.name for unit in units if " after " in unit.name]
    assert products == [f"MatMul after blocks.{block}.attn.qkv" for block in (0, 1)]
    # What reaches a layer through a transpose counts.
    found, whole = {unit.name: unit for unit in units}, rounded_transformer.model
    # Of the two products of attention NNCF leaves the one behind the softmax alone.
    assert len(layers_in_float(whole)) == 2
    assert not {unit.nodes[0] for unit in units} & set(layers_in_float(whole))
    for name in ("patch_embed.proj", "blocks.0.attn.proj", "head"):
        lead = found[name].nodes[0]
        assert "FakeQuantize" in kinds_ahead(whole, lead)
        model = whole.clone()
        revert_to_float(model, rounded_transformer.full, found[name].nodes)
        assert "FakeQuantize" not in kinds_ahead(model, lead)
        assert lead in layers_in_float(model)
    path = tmp_path / "none.xml"
    left = kinds_without_int8(rounded_transformer, transformer, textured(8), path)
    assert "FakeQuantize" not in left
