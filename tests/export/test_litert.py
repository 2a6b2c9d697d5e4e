from __future__ import annotations

import io
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from artifact_fakes import rehash
from benchmark_fakes import ONE_THREAD
from device_fakes import (
    BRIEF,
    artifact_subject,
    check_measured,
    plant,
    plant_absence,
    run_agent,
    two_suites,
    write_images,
)
from export_fakes import block_model, export_block, pictures
from PIL import Image

from edgekd.artifacts.kit import write_kit
from edgekd.benchmark import device as devices
from edgekd.core.errors import EdgekdError, NotHere
from edgekd.core.manifest import read_artifact
from edgekd.export.artifact import torch_logits
from edgekd.targets.devices.payload import write_agent
from edgekd.targets.session import open_session

PACKAGES = {
    "litert": ("litert_torch", "ai_edge_quantizer", "ai_edge_litert"),
    "executorch": ("executorch", "executorch.exir", "executorch.runtime"),
}


def needs(target: str) -> None:
    for package in PACKAGES[target]:
        pytest.importorskip(package, reason=f'needs pip install "edgekd[{target}]"')


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`exported(target, precision)` is the folder of an artifact, made once."""
    home = tmp_path_factory.mktemp("exported")

    def make(target: str, precision: str) -> Path:
        needs(target)
        folder = home / f"{target}-{precision}"
        if not folder.exists():
            export_block(folder, target, precision)
        return folder

    return make


@pytest.mark.parametrize(
    ("target", "precision", "tolerance"),
    [("litert", "fp32", 1e-5), ("litert", "fp16", 5e-3), ("executorch", "fp32", 1e-5)],
)
def test_float_files_compute_the_model(
    exported: Callable[[str, str], Path], target: str, precision: str, tolerance: float
) -> None:
    images, folder = pictures(3, seed=5), exported(target, precision)
    session = open_session(folder)
    np.testing.assert_allclose(
        session.run(images), torch_logits(block_model(), images), atol=tolerance
    )
    assert read_artifact(folder).parity["run_by"] == session.provider


@pytest.mark.parametrize(
    ("target", "precision"),
    [("litert", "int8"), ("litert", "int8-weights"), ("executorch", "int8")],
)
def test_files_of_8_bits_are_small_and_close(tmp_path: Path, target: str, precision: str) -> None:
    needs(target)
    images, model = pictures(100, seed=2), block_model(width=64)  # its weights fill the file
    reference = torch_logits(model, images)
    for each in ("fp32", precision):
        export_block(tmp_path / each, target, each, model=model)
    candidate = open_session(tmp_path / precision).run(images)
    assert not np.array_equal(reference, candidate)
    assert np.square(candidate - reference).mean() < 0.2 * reference.var(axis=0).mean()
    files = [next((tmp_path / each).glob("model.*")) for each in ("fp32", precision)]
    assert files[1].stat().st_size < files[0].stat().st_size


@pytest.mark.parametrize(
    ("target", "name"), [("litert", "model.tflite"), ("executorch", "model.pte")]
)
def test_damage(
    exported: Callable[[str, str], Path], tmp_path: Path, target: str, name: str
) -> None:
    folder = Path(shutil.copytree(exported(target, "fp32"), tmp_path / "a"))
    (folder / name).write_bytes(b"TFL3" * 8)
    rehash(folder)
    with pytest.raises(EdgekdError, match="cannot load") as caught:
        open_session(folder)
    assert "\n" not in str(caught.value)


def test_ranges_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    needs("litert")
    model = block_model()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = torch.nan
    with pytest.raises(EdgekdError, match="not finite on the calibration images"):
        export_block(tmp_path / "a", "litert", "int8", model=model)


@pytest.mark.parametrize("target", PACKAGES)
def test_int8_stays_close_with_odd_ranges(target: str, tmp_path: Path) -> None:
    needs(target)
    model = block_model()
    with torch.no_grad():
        model.backbone.stem.weight.mul_(20)  # most of its range is beyond the clip
        model.head.bias.add_(100)
    artifact = export_block(tmp_path / "a", target, "int8", model=model, min_agreement=0)
    assert artifact.outputs[0].dtype == "float32"
    images = pictures(50, seed=2)
    reference = torch_logits(model, images)
    error = open_session(tmp_path / "a").run(images) - reference
    assert np.square(error).mean() < 0.02 * reference.var(axis=0).mean()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_its_test_kit(exported: Callable[[str, str], Path], tmp_path: Path, precision: str) -> None:
    encoded = []
    for image in pictures(3, seed=4):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    folder = Path(shutil.copytree(exported("litert", precision), tmp_path / "artifact"))
    kit = write_kit(folder, encoded)
    words = [sys.executable, "classify.py"]
    done = subprocess.run(words, cwd=kit, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.usefixtures("own_cache")
def test_an_agent_with_nothing_but_litert_gives_the_same_logits(
    exported: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "QUICK", BRIEF)
    subject = artifact_subject(exported("litert", "int8"))
    suites = two_suites(replace(write_images(tmp_path / "images", 24), classes=("a", "b", "c")))
    absent = ("torch", "timm", "pydantic", "onnx", "litert_torch")
    plant_absence(monkeypatch, tmp_path / "planted", *absent)
    [found] = devices.on_devices([subject], suites, ["local"], ONE_THREAD)
    check_measured([found], ([subject], suites), "local", share=0)
    assert found.measured is not None
    assert found.measured.result.model[0].provider.startswith("LiteRT 2")


@pytest.mark.parametrize("target", PACKAGES)
def test_a_missing_package(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PACKAGES[target]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(NotHere) as caught:
        export_block(tmp_path / "a", target, "fp32")
    assert f"edgekd[{target}]" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_an_agent_names_a_missing_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_agent(tmp_path / "agent.pyz")
    broken = "raise ImportError('no such wheel')"
    plant(monkeypatch, tmp_path / "planted", "ai_edge_litert", broken)
    described = '[{"format": "tflite", "details": {}}]'
    code, [told] = run_agent(sys.executable, tmp_path / "agent.pyz", "able", described)
    [[message, hint]] = told["able"]  # type: ignore[misc]
    assert (code, "cannot load ai-edge-litert (no such wheel)" in message) == (0, True)
    assert "pip install ai-edge-litert" in hint


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_classes_are_in_the_model(exported: Callable[[str, str], Path], precision: str) -> None:
    folder = exported("litert", precision)
    with zipfile.ZipFile(folder / "model.tflite") as archive:
        assert archive.read("labels.txt") == (folder / "labels.txt").read_bytes()
