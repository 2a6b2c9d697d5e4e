"""The test kit in an artifact: its Python program passes on the file it was made of, and fails on another."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from device_fakes import write_artifact
from PIL import Image

from edgekd.artifacts.kit import write_kit
from edgekd.configs.export import ExportConfig
from edgekd.core.errors import EdgekdError


def pictures(count: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        image = Image.fromarray(rng.integers(0, 256, (30 + number, 41, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, "PNG" if number % 2 else "JPEG")
        found.append(buffer.getvalue())
    return found


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    return write_kit(write_artifact(tmp_path / "artifact"), pictures(4))


def classify(kit: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "classify.py"]
    return subprocess.run(line, cwd=kit, capture_output=True, text=True, check=False)


def test_the_program_gives_the_same_pixels_and_logits(kit: Path) -> None:
    done = classify(kit)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("largest difference of pixels 0,") == 4
    assert (kit / "2.jpeg").read_bytes() == pictures(4)[2]
    # The artifact's logits are channel means of the pixels.
    pixels = np.stack([np.asarray(Image.open(kit / f"{number}.ppm")) for number in range(4)])
    assert pixels.shape == (4, 16, 16, 3)
    logits = np.fromfile(kit / "logits.bin", "<f4").reshape(4, 3)
    np.testing.assert_allclose(logits, pixels.mean(axis=(1, 2)), rtol=1e-5)


def test_the_program_fails_on_other_logits(kit: Path) -> None:
    facts = json.loads((kit / "kit.json").read_text())
    logits = np.fromfile(kit / "logits.bin", "<f4")
    (logits + np.float32(2 * facts["tolerance"])).tofile(kit / "logits.bin")
    assert classify(kit).returncode == 1


def onnxruntime_folder(folder: Path) -> Path:
    """ONNX Runtime's headers and library: a release's, named in ONNXRUNTIME, else a stand-in and the package's."""
    if "ONNXRUNTIME" in os.environ:
        return Path(os.environ["ONNXRUNTIME"])
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"), None)
    if library is None:
        pytest.skip("ONNX Runtime's package has no shared library here")
    (folder / "lib").mkdir(parents=True)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1", library.name):
        (folder / "lib" / name).symlink_to(library)
    (folder / "include").symlink_to(Path(__file__).parent / "onnxruntime_header")
    return folder


@pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None,
    reason="needs cmake and a C++ compiler",
)
def test_the_cpp_program_builds_and_compares(kit: Path, tmp_path: Path) -> None:
    facts = json.loads((kit / "kit.json").read_text())
    place = f"-DONNXRUNTIME={onnxruntime_folder(tmp_path / 'onnxruntime')}"
    subprocess.run(["cmake", "-S", ".", "-B", "build", place], cwd=kit, check=True)
    subprocess.run(["cmake", "--build", "build"], cwd=kit, check=True)
    line = ["build/classify", "../model.onnx", ".", "4", str(facts["tolerance"])]
    subprocess.run(line, cwd=kit, check=True)
    logits = np.fromfile(kit / "logits.bin", "<f4")
    (logits + np.float32(2 * facts["tolerance"])).tofile(kit / "logits.bin")
    assert subprocess.run(line, cwd=kit, check=False).returncode == 1


def test_a_kit_without_pictures_or_pixels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match="no test images"):
        write_kit(write_artifact(tmp_path / "artifact"), [])
    for given in ({"input": "float"}, {"head": "embedding"}):
        with pytest.raises(EdgekdError, match="test kit"):
            ExportConfig.load(test_kit=True, **given)
