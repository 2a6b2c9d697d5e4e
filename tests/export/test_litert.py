"""The target `litert`, through LiteRT itself; skipped where the extra is not installed."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from device_fakes import BRIEF, run_agent, two_suites, write_images
from export_fakes import SIZE, block_model, export_block, pictures
from PIL import Image

from edgekd.artifacts.kit import write_kit
from edgekd.benchmark import device as devices
from edgekd.benchmark.evaluate.logits import predict_suite
from edgekd.benchmark.subjects import Subject
from edgekd.core.errors import EdgekdError, NotHere
from edgekd.core.manifest import read_artifact
from edgekd.core.readers import sha256_file
from edgekd.export.artifact import torch_logits
from edgekd.targets.devices.payload import write_agent
from edgekd.targets.session import open_session

PACKAGES = ("litert_torch", "ai_edge_quantizer", "ai_edge_litert")
needs_litert = pytest.mark.skipif(
    not all(map(find_spec, PACKAGES)), reason='needs pip install "edgekd[litert]"'
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("litert")
    found = {}
    for precision in ("fp32", "fp16", "int8", "int8-weights"):
        export_block(found.setdefault(precision, home / precision), "litert", precision)
    return found


@needs_litert
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 5e-3)])
def test_float_files_compute_the_model(
    folders: dict[str, Path], precision: str, tolerance: float
) -> None:
    images = pictures(3, seed=5)  # a file takes one at a time
    session = open_session(folders[precision], threads=1)
    np.testing.assert_allclose(
        session.run(images), torch_logits(block_model(), images), atol=tolerance
    )
    artifact = read_artifact(folders[precision])
    assert artifact.parity["run_by"] == session.provider
    assert artifact.inputs[0].shape == (1, SIZE, SIZE, 3)


@needs_litert
def test_the_classes_are_a_file_within_the_model(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        with zipfile.ZipFile(folder / "model.tflite") as archive:
            assert archive.read("labels.txt") == (folder / "labels.txt").read_bytes()


@needs_litert
@pytest.mark.parametrize("precision", ["int8", "int8-weights"])
def test_files_of_8_bits_are_small_and_close(folders: dict[str, Path], precision: str) -> None:
    images = pictures(100, seed=2)
    reference = torch_logits(block_model(), images)
    candidate = open_session(folders[precision], threads=1).run(images)
    centred = reference - reference.mean(axis=0)
    assert not np.array_equal(reference, candidate)
    assert np.square(candidate - reference).mean() < 0.2 * np.square(centred).mean()
    sizes = {name: (folders[name] / "model.tflite").stat().st_size for name in ("fp32", precision)}
    assert sizes[precision] < sizes["fp32"]


@needs_litert
def test_int8_is_integer_with_its_scale_behind_the_logits(folders: dict[str, Path]) -> None:
    from ai_edge_litert.interpreter import Interpreter

    artifact = read_artifact(folders["int8"])
    assert artifact.outputs[0].dtype == "int8"
    assert artifact.quantization is not None
    assert artifact.quantization["calibration_images"] == 24
    interpreter = Interpreter(str(folders["int8"] / "model.tflite"))
    interpreter.allocate_tensors()
    assert interpreter.get_input_details()[0]["dtype"] == np.uint8
    [answer] = interpreter.get_output_details()
    assert answer["dtype"] == np.int8
    logits = open_session(folders["int8"]).run(pictures(8, seed=3))
    steps = logits / answer["quantization"][0]
    np.testing.assert_allclose(steps, steps.round(), atol=1e-3)


@needs_litert
def test_a_damaged_file_is_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["fp32"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.tflite").write_bytes(b"TFL3" * 8)
    artifact = read_artifact(tmp_path, check_hashes=False)
    files = {**artifact.files, "model.tflite": sha256_file(tmp_path / "model.tflite")}
    artifact.model_copy(update={"files": files}).write(tmp_path)
    with pytest.raises(EdgekdError, match="cannot load") as caught:
        open_session(tmp_path)
    assert "\n" not in str(caught.value)


@needs_litert
@pytest.mark.usefixtures("own_cache")
def test_an_agent_with_nothing_but_the_runtime_gives_the_same_answers(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = ("torch", "timm", "pydantic", "typer", "rich", "onnx", "litert_torch")
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n"
    )
    monkeypatch.setattr(devices, "QUICK", BRIEF)
    session = open_session(folders["int8"], threads=1)
    one = session.artifact
    subject = Subject(
        one.name, "r", "artifact", one.precision, one.preprocess, session.run, one.classes, folders["int8"]
    )  # fmt: skip
    suites = two_suites(replace(write_images(tmp_path / "images", 24), classes=("a", "b", "c")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "planted"))
    [found] = devices.on_device([subject], suites, "local", quick=True, threads=1)
    assert found.measured is not None
    for n, suite in enumerate(suites):
        [here] = predict_suite([subject], suite)
        np.testing.assert_array_equal(found.measured.logits[n], here)
    assert found.measured.model[0].provider.startswith("LiteRT 2")


@needs_litert
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_program_of_its_test_kit_passes(
    folders: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    encoded = []
    for image in pictures(3, seed=4):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    shutil.copytree(folders[precision], tmp_path / "artifact")
    kit = write_kit(tmp_path / "artifact", encoded)
    done = subprocess.run(
        [sys.executable, "classify.py"], cwd=kit, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(NotHere) as caught:
        export_block(tmp_path / "a", "litert", "fp32")
    assert "edgekd[litert]" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    write_agent(tmp_path / "agent.pyz")
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "ai_edge_litert.py").write_text("raise ImportError('no such wheel')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "planted"))
    described = '[{"format": "tflite", "details": {}}]'
    code, [told] = run_agent(sys.executable, tmp_path / "agent.pyz", "able", described)
    assert code == 0
    [[message, hint]] = told["able"]  # type: ignore[misc]
    assert message == "The device's Python cannot load ai-edge-litert (no such wheel)."
    assert "pip install ai-edge-litert" in hint
