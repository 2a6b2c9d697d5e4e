from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import device_fakes
import numpy as np
import pytest
from artifact_fakes import channel_means, write_artifact

from edgekd.benchmark.evaluate.logits import predict_suite
from edgekd.benchmark.subjects import Suite
from edgekd.core.errors import EdgekdError
from edgekd.core.predictor import in_batches
from edgekd.targets.session import open_session


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "artifact", channel_means().SerializeToString())


def test_runs_any_batch(folder: Path) -> None:
    session = open_session(folder, threads=1)
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    logits = session.run(images)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, images.mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(session.run(images[:1]), logits[:1])
    assert (session.provider, session.threads) == ("CPUExecutionProvider", 1)
    assert session.load_ms > 0


def test_a_file_made_for_one_image_answers_any_number_in_batches(tmp_path: Path) -> None:
    """As the accuracy run asks: many at once."""
    free, single = (
        open_session(device_fakes.write_artifact(tmp_path / str(batch), batch=batch), threads=1)
        for batch in ("batch", 1)
    )
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    assert (free.largest_batch, single.largest_batch) == (None, 1)
    np.testing.assert_allclose(single.run(images), free.run(images), rtol=1e-6)
    subject = device_fakes.artifact_subject(tmp_path / "1")
    suite = Suite("id", device_fakes.write_images(tmp_path / "images", 7), np.arange(7))
    [logits], [wanted] = (
        predict_suite([one], suite, batch=4)
        for one in (subject, device_fakes.artifact_subject(tmp_path / "batch"))
    )
    np.testing.assert_allclose(logits, wanted, rtol=1e-6)


def test_pieces_are_no_larger_than_the_file_takes() -> None:
    asked: list[int] = []

    def run(images: np.ndarray) -> np.ndarray:
        asked.append(len(images))
        return images[:, 0, 0].astype(np.float32)

    images = np.arange(7 * 3, dtype=np.uint8).reshape(7, 1, 1, 3)
    np.testing.assert_array_equal(in_batches(run, images, 3), images[:, 0, 0])
    np.testing.assert_array_equal(in_batches(run, images, None), images[:, 0, 0])
    assert asked == [3, 3, 1, 7]


def test_a_file_that_takes_no_single_image_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match="takes exactly 4 images at a time"):
        open_session(device_fakes.write_artifact(tmp_path / "four", batch=4), threads=1)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 16, 16, 3), np.float32),
        np.zeros((1, 3, 16, 16), np.uint8),
        np.zeros((16, 16, 3), np.uint8),
        np.zeros((0, 16, 16, 3), np.uint8),
    ],
    ids=["float", "NCHW", "no batch", "empty"],
)
def test_wrong_input_is_refused(folder: Path, images: np.ndarray) -> None:
    with pytest.raises(EdgekdError, match="takes uint8"):
        open_session(folder, threads=1).run(images)


def test_altered_file_is_refused(folder: Path) -> None:
    content = bytearray((folder / "model.onnx").read_bytes())
    content[-1] ^= 1
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(EdgekdError, match="SHA-256"):
        open_session(folder)


def test_corrupt_model_with_the_right_hash_is_one_sentence(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "corrupt", channel_means().SerializeToString()[:60])
    with pytest.raises(EdgekdError, match="cannot load") as caught:
        open_session(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["ir", "opset"])
def test_a_file_from_the_future_is_refused(tmp_path: Path, what: str) -> None:
    model = channel_means()
    if what == "ir":
        model.ir_version = 999
    else:
        model.opset_import[0].version = 999
    with pytest.raises(EdgekdError, match=r"needs a newer ONNX Runtime"):
        open_session(write_artifact(tmp_path / "future", model.SerializeToString()))


def test_no_artifact_and_no_threads_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match="There is no artifact"):
        open_session(tmp_path)
    with pytest.raises(EdgekdError, match="0 threads"):
        open_session(folder, threads=0)


def test_session_needs_no_torch() -> None:
    code = """
import sys, edgekd.targets.session
print([name for name in ('torch', 'timm', 'onnx', 'nncf') if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
