from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from artifact_fakes import write_artifact
from benchmark_fakes import LARGE, ONE_THREAD, SHORT, SMALL, Paint, model, paint_images, subject
from PIL import Image

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.evaluate.metrics import log_softmax
from edgekd.benchmark.evaluate.predictions import predict_suite
from edgekd.benchmark.subjects import Suite
from edgekd.core.errors import EdgekdError
from edgekd.data.images import UnreadableImage
from edgekd.targets.session import open_session
from edgekd.targets.timing import stopwatch
from edgekd.targets.timing.stopwatch import END_TO_END_QUICK, QUICK


@pytest.mark.parametrize("batch", [7, 500])
def test_logits_follow_the_order_of_the_suite(batch: int) -> None:
    images = paint_images()
    indices = np.random.default_rng(0).permutation(120)[:50]
    suite = Suite("id", images, indices)
    [logits] = predict_suite([subject("torch", "torch", model(0))], suite, batch=batch)
    assert logits.shape == (50, 3)
    assert logits.dtype == np.float32
    assert (logits.argmax(axis=1) == images.labels[indices]).all()
    assert (suite.labels == images.labels[indices]).all()
    # A model of more classes is masked to those of the suite.
    many = subject("a", "artifact", model(0, classes=4), classes=("dog", "horse", "cat", "fish"))
    [masked] = predict_suite([many], suite, batch=batch)
    chosen = np.array([2, 0, 3])[:, None] == images.labels[indices]
    np.testing.assert_array_equal(masked, 4.0 * chosen.T)


def test_each_image_is_read_once_for_all_subjects_and_preprocesses() -> None:
    images = paint_images()
    assert isinstance(images.reader, Paint)
    reader, seen, reads = images.reader, [], []

    def watching(pixels: np.ndarray) -> np.ndarray:
        seen.append(pixels.shape)
        reads.append(int(reader.reads.sum()))
        return model(0)(pixels)

    subjects = [
        subject("teacher", "teacher", watching, preprocess=LARGE),
        subject("torch", "torch", model(0), preprocess=SMALL),
        subject("int8", "artifact", model(3), preprocess=SMALL),
    ]
    found = predict_suite(subjects, Suite("id", images, np.arange(90)), batch=8)
    assert reader.reads.tolist() == [1] * 90 + [0] * 30
    assert seen == [(8, 32, 32, 3)] * 11 + [(2, 32, 32, 3)]
    assert (found[1].argmax(axis=1) == found[2].argmax(axis=1)).sum() == 60
    assert 8 <= reads[0] <= 8 * 3 + 1, "reading runs ahead, but not away"


def test_what_has_no_accuracy_is_refused() -> None:
    images = paint_images(9)
    suite = Suite("id", images, np.arange(9))

    def broken(pixels: np.ndarray) -> np.ndarray:
        return np.full((len(pixels), 3), np.nan, dtype=np.float32)

    def reader(index: int) -> Image.Image:
        if index == 4:
            raise UnreadableImage("missing")
        return Image.new("RGB", (8, 8))

    for one, message in (
        (subject("int8", "artifact", model(0), classes=("cat", "dogs", "fish")), 'class "dog"'),
        (subject("int8", "artifact", model(0, classes=5)), r"shape \[9, 5\], not \[9, 3\]"),
        (subject("int8", "artifact", broken), "not finite on id"),
    ):
        with pytest.raises(EdgekdError, match=message):
            predict_suite([one], suite)
    object.__setattr__(images, "reader", reader)
    with pytest.raises(EdgekdError, match=r"all/dog/4\.png can no longer be read: missing"):
        predict_suite([subject("torch", "torch", model(0))], suite, batch=2)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """Logits are the mean red, green and blue."""
    return write_artifact(tmp_path / "onnxruntime-fp32")


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"warmup_s": 0.01, "runs": 30, "seconds": 0.05, "block_s": 0.005}
    monkeypatch.setattr(stopwatch, "QUICK", replace(QUICK, **short))
    monkeypatch.setattr(stopwatch, "END_TO_END_QUICK", replace(END_TO_END_QUICK, **short))


@pytest.mark.usefixtures("brief")
def test_the_file_itself_is_measured(artifact: Path, tmp_path: Path) -> None:
    images = paint_images(30)
    one = subject(artifact.name, "artifact", open_session(artifact).run, folder=artifact)
    suites = [Suite("id", images, np.arange(30))]
    report = run_benchmark([one], suites, tmp_path / "out", speed=ONE_THREAD)
    colours = np.stack([images.labels, np.arange(30), np.zeros(30)], axis=1).astype(np.float32)
    [row], [latency] = report.accuracy, report.latency
    assert row.top1 == pytest.approx((colours.argmax(axis=1) == images.labels).mean())
    nll = -log_softmax(colours)[np.arange(30), images.labels].mean()
    assert row.nll == pytest.approx(nll, rel=1e-5)
    assert (latency.provider, latency.threads, latency.quick) == ("CPUExecutionProvider", 1, True)
    assert latency.n >= 30
    assert latency.load_ms is not None
    # Decoding a PNG and resizing it takes longer than the mean of 768 numbers, and needs numpy and Pillow in memory.
    assert latency.end_to_end_p50_ms is not None
    assert 0 < latency.p50_ms < latency.end_to_end_p50_ms < 100
    assert latency.peak_rss_mb is not None
    assert 20 < latency.peak_rss_mb < 1000
    with np.load(tmp_path / "out" / "latency.npz") as kept:
        whole = kept[f"end_to_end_ms/{one.run}/{one.name}"]
    assert len(whole) >= 30
    assert latency.end_to_end_p50_ms in whole
    size = (artifact / "model.onnx").stat().st_size
    assert report.summary[0].size_mb == pytest.approx(size / 1e6)


def test_an_altered_artifact_is_refused_and_nothing_is_written(
    artifact: Path, tmp_path: Path
) -> None:
    one = subject(artifact.name, "artifact", open_session(artifact).run, folder=artifact)
    (artifact / "model.onnx").write_bytes((artifact / "model.onnx").read_bytes() + b" ")
    suites = [Suite("id", paint_images(9), np.arange(9))]
    with pytest.raises(EdgekdError, match="not the file that was exported"):
        run_benchmark([one], suites, tmp_path / "out", speed=SHORT)
    assert not (tmp_path / "out").exists()
