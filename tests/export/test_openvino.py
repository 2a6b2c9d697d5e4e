"""The target `openvino`, through the real runtime; skipped where the extra is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_fakes import ONE_THREAD
from device_fakes import BRIEF, run_agent, two_suites, write_images
from export_fakes import SIZE, Block, export_parts, pictures
from torch import nn

from edgekd.benchmark import device as devices
from edgekd.benchmark.evaluate.logits import predict_suite
from edgekd.benchmark.subjects import Subject
from edgekd.core.errors import EdgekdError, NotHere
from edgekd.core.manifest import Artifact, read_artifact
from edgekd.core.preprocess import Preprocess
from edgekd.core.readers import sha256_file
from edgekd.export.graph import Deployable, torch_logits
from edgekd.targets.devices.payload import write_agent
from edgekd.targets.session import open_session

openvino = pytest.importorskip("openvino", reason='needs pip install "edgekd[openvino]"')


def build() -> Deployable:
    torch.manual_seed(1)
    return Deployable(Block(), nn.Linear(16, 4), Preprocess(size=SIZE)).eval()


def export(folder: Path, precision: str, **changes: object) -> Artifact:
    arguments: dict[str, object] = {
        "target": "openvino",
        "precision": precision,
        "classes": ("a", "b", "c", "d"),
        "preprocess": Preprocess(size=SIZE),
        "calibration": pictures(24),
        "calibration_ids": [str(i) for i in range(24)],
        "parity_images": pictures(64, seed=1),
        "facts": {"student": "test"},
    }
    return export_parts(build(), folder, **arguments | changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("openvino")
    for precision in ("fp32", "fp16", "int8"):
        export(home / precision, precision)
    return {precision: home / precision for precision in ("fp32", "fp16", "int8")}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 5e-3)])
def test_float_files_compute_the_model(
    folders: dict[str, Path], precision: str, tolerance: float
) -> None:
    images = pictures(9, seed=5)
    session = open_session(folders[precision], threads=1, spinning=False)
    np.testing.assert_allclose(session.run(images), torch_logits(build(), images), atol=tolerance)
    assert session.threads == 1
    assert session.provider.startswith("OpenVINO 20")
    parity = read_artifact(folders[precision]).parity
    assert parity["passed"] is True
    assert parity["run_by"] == session.provider


def test_int8_file_is_int8_and_close(folders: dict[str, Path]) -> None:
    artifact = read_artifact(folders["int8"])
    assert artifact.quantization is not None
    assert artifact.quantization["calibration_images"] == 24
    assert artifact.quantization["ids"][3] == "3"
    quantized, in_float = (
        artifact.quantization["quantized_layers"],
        artifact.quantization["float_layers"],
    )
    assert quantized + len(in_float) == 6
    assert quantized >= 4, (
        "stem, depthwise, pointwise and head; squeeze-and-excite is NNCF's choice"
    )
    model = openvino.Core().read_model(folders["int8"] / "model.xml")
    kinds = [
        str(node.get_element_type())
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Constant"
    ]
    assert sum("int8_t" in kind and "uint8_t" not in kind for kind in kinds) >= 4, kinds
    assert str(model.input(0).get_element_type()) == "<Type: 'uint8_t'>"
    images = pictures(100, seed=2)
    reference, candidate = (
        torch_logits(build(), images),
        open_session(folders["int8"], threads=1).run(images),
    )
    centred = reference - reference.mean(axis=0)
    assert not np.array_equal(reference, candidate)
    assert np.square(candidate - reference).mean() < 0.2 * np.square(centred).mean()


def test_answers_do_not_share_memory(folders: dict[str, Path]) -> None:
    session = open_session(folders["fp32"], threads=1)
    first = session.run(pictures(2, seed=7))
    kept = first.copy()
    session.run(pictures(2, seed=8))
    np.testing.assert_array_equal(first, kept)


def test_file_holds_its_own_metadata_and_no_paths(folders: dict[str, Path]) -> None:
    model = openvino.Core().read_model(folders["fp32"] / "model.xml")
    assert json.loads(model.get_rt_info(["edgekd", "classes"]).astype(str)) == ["a", "b", "c", "d"]
    for folder in folders.values():
        assert sorted(path.name for path in folder.iterdir()) == [
            "artifact.json",
            "labels.txt",
            "model.bin",
            "model.xml",
        ]
        assert str(Path(__file__).parents[2]) not in (folder / "model.xml").read_text(
            encoding="utf-8"
        )


def test_nncf_is_told_not_to_report() -> None:
    code = """
from edgekd.export.quantize import openvino as ov_int8
ov_int8.import_nncf()
from nncf.telemetry.wrapper import telemetry
print(type(telemetry).__name__)
"""
    clean = {key: value for key, value in os.environ.items() if key != "NNCF_CI"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean
    )
    assert done.stdout.strip() == "MagicMock", (
        "NNCF would tell its makers' server about this export"
    )


def test_missing_package_is_a_sentence(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(NotHere, match="OpenVINO is not on this machine") as caught:
        open_session(folders["fp32"])
    assert "edgekd[openvino]" in caught.value.hint


@pytest.mark.parametrize("version", ["2024.6.0-1-abc", "2027.0.0-1-abc"])
def test_unknown_releases_are_refused(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(openvino, "__version__", version)
    with pytest.raises(EdgekdError, match=version[:6]):
        open_session(folders["fp32"])
    with pytest.raises(EdgekdError, match=version[:6]):
        export(tmp_path / "a", "fp32")
    assert list(tmp_path.iterdir()) == []


def damaged(folders: dict[str, Path], home: Path, **details: str) -> Path:
    """A copy whose graph was cut short before its hash was taken."""
    home.mkdir()
    for file in folders["fp32"].iterdir():
        (home / file.name).write_bytes(file.read_bytes())
    text = (home / "model.xml").read_text(encoding="utf-8")
    (home / "model.xml").write_text(text[: len(text) // 2], encoding="utf-8")
    artifact = read_artifact(home, check_hashes=False)
    files = {**artifact.files, "model.xml": sha256_file(home / "model.xml")}
    artifact.model_copy(update={"files": files, "details": {**artifact.details, **details}}).write(
        home
    )
    return home


def test_damaged_and_newer_files_are_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match="cannot load") as caught:
        open_session(damaged(folders, tmp_path / "damaged"))
    assert "\n" not in str(caught.value)
    with pytest.raises(EdgekdError, match=r"written by OpenVINO 2099\.1\.0"):
        open_session(damaged(folders, tmp_path / "newer", openvino="2099.1.0"))


def test_files_that_cannot_be_written_are_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")  # OpenVINO's words on a full disk

    monkeypatch.setattr(openvino, "save_model", full)
    with pytest.raises(EdgekdError, match="could not write its files") as caught:
        export(tmp_path / "a", "fp32")
    assert "Is the disk full?" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_diverged_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    with torch.no_grad():
        model.backbone.pointwise.weight[0] = float("nan")  # type: ignore[union-attr, index, operator]
    monkeypatch.setattr(sys.modules[__name__], "build", lambda: model)
    with pytest.raises(EdgekdError, match="not finite"):
        export(tmp_path / "a", "int8")
    assert list(tmp_path.iterdir()) == []


def test_alike_calibration_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match="alike"):
        export(tmp_path / "a", "int8", calibration=np.repeat(pictures(1), 8, axis=0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("own_cache")
def test_an_agent_with_nothing_but_the_runtimes_gives_the_same_answers(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO in FP32 and INT8 and an ONNX file in one job, in processes that cannot load what edgekd needs."""
    absent = ("torch", "timm", "pydantic", "typer", "rich", "platformdirs", "onnx", "nncf", "scipy")
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n"
    )
    monkeypatch.setattr(devices, "QUICK", BRIEF)
    onnx = tmp_path / "artifacts" / "onnx"
    export(onnx, "fp32", target="onnxruntime")
    subjects = []
    for folder in (folders["fp32"], folders["int8"], onnx):
        session = open_session(folder, threads=1, spinning=False)
        one = session.artifact
        subjects.append(
            Subject(
                one.name,
                "r",
                "artifact",
                one.precision,
                one.preprocess,
                session.run,
                one.classes,
                folder,
            )
        )
    suites = two_suites(replace(write_images(tmp_path / "images", 24), classes=("a", "b", "c")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "planted"))
    found = devices.on_devices(subjects, suites, ["local"], ONE_THREAD)
    assert [one.name for one in found] == [
        "openvino-fp32@local",
        "openvino-int8@local",
        "onnxruntime-fp32@local",
    ]
    for one, original in zip(found, subjects, strict=True):
        assert one.measured is not None
        for n, suite in enumerate(suites):
            [here] = predict_suite([original], suite)
            # One image at a time there, twelve here: sums in another order, and with INT8 a rounding may flip.
            tolerance = 0.02 if "int8" in one.name else 1e-4
            np.testing.assert_allclose(one.measured.logits[n], here, atol=tolerance * np.ptp(here))
            np.testing.assert_array_equal(
                one.measured.logits[n].argmax(axis=1), here.argmax(axis=1)
            )
        assert one.measured.result.placement is not None
        [clock] = one.measured.result.model
        assert clock.threads == 1
        assert clock.provider.startswith(
            "OpenVINO 20" if "openvino" in one.name else "CPUExecutionProvider"
        )
    assert found[0].measured is not None
    assert found[0].measured.facts["versions"]["openvino"] is not None


@pytest.mark.parametrize("wanted", ["f32", "bf16"])
def test_the_inference_precision_is_the_files_own(wanted: str, tmp_path: Path) -> None:
    if wanted not in processor_precisions():
        with pytest.raises(EdgekdError, match=f"wants {wanted}"):
            export(tmp_path / "a", "fp16", inference_precision=wanted)
        return
    artifact = export(tmp_path / "a", "fp16", inference_precision=wanted)
    assert artifact.details["inference_precision"] == wanted
    session = open_session(tmp_path / "a", threads=1, spinning=False)
    assert session.provider.endswith(f"CPU, {wanted}")
    error = np.abs(session.run(pictures(9)) - torch_logits(build(), pictures(9))).max()
    assert error < 5e-3


def processor_precisions() -> set[str]:
    found = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return {"f32"} | ({"bf16"} if "BF16" in found else set())


def test_an_inference_precision_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for precision, wanted, reason in (
        ("fp16", "fp8", "no inference precision"),
        ("fp32", "bf16", "the student's own logits"),
    ):
        with pytest.raises(EdgekdError, match=reason):
            export(tmp_path / "a", precision, inference_precision=wanted)
    assert not (tmp_path / "a").exists()


def test_an_agent_says_which_runtime_it_lacks(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_agent(tmp_path / "agent.pyz")
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "openvino.py").write_text(
        "raise ImportError('libopenvino.so is missing')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "planted"))
    code, [told] = run_agent(
        sys.executable, tmp_path / "agent.pyz", "classify", str(folders["fp32"]), __file__
    )
    assert code == 2
    message, hint = told["error"]  # type: ignore[misc]
    assert message == "The device's Python cannot load openvino (libopenvino.so is missing)."
    assert "pip install 'openvino>=2025.0,<2027'" in hint
    (tmp_path / "planted" / "openvino.py").write_text("__version__ = '2024.6.0-1-abc'")
    code, [told] = run_agent(
        sys.executable, tmp_path / "agent.pyz", "classify", str(folders["fp32"]), __file__
    )
    message, hint = told["error"]  # type: ignore[misc]
    assert "OpenVINO 2024.6 is installed" in message
    assert "pip install 'openvino>=2025.0,<2027'" in hint
