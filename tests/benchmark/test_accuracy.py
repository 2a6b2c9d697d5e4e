from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from artifact_fakes import write_artifact
from benchmark_fakes import (
    LARGE,
    ONE_THREAD,
    SHORT,
    SMALL,
    Paint,
    model,
    paint_images,
    subject,
)
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


@pytest.mark.parametrize("batch", [1, 7, 64, 500])
def test_logits_follow_the_order_of_the_suite(batch: int) -> None:
    images = paint_images()
    indices = np.random.default_rng(0).permutation(120)[:50]
    suite = Suite("id", images, indices)
    [logits] = predict_suite([subject("torch", "torch", model(0))], suite, batch=batch)
    assert logits.shape == (50, 3)
    assert logits.dtype == np.float32
    assert (logits.argmax(axis=1) == images.labels[indices]).all()
    assert (suite.labels == images.labels[indices]).all()


def test_each_image_is_read_once_for_all_subjects_and_preprocesses() -> None:
    images = paint_images()
    seen: list[tuple[int, ...]] = []

    def watching(pixels: np.ndarray) -> np.ndarray:
        seen.append(pixels.shape)
        return model(0)(pixels)

    subjects = [
        subject("teacher", "teacher", watching, preprocess=LARGE),
        subject("torch", "torch", model(0), preprocess=SMALL),
        subject("int8", "artifact", model(3), preprocess=SMALL),
    ]
    found = predict_suite(subjects, Suite("id", images, np.arange(30)), batch=16)
    assert isinstance(images.reader, Paint)
    assert images.reader.reads[:30].tolist() == [1] * 30
    assert images.reader.reads[30:].sum() == 0
    assert seen == [(16, 32, 32, 3), (14, 32, 32, 3)]
    assert (found[1].argmax(axis=1) == found[2].argmax(axis=1)).sum() == 20


def test_reading_runs_ahead_but_not_away() -> None:
    images = paint_images(120)
    assert isinstance(images.reader, Paint)
    reads_at_first_batch: list[int] = []

    def watching(pixels: np.ndarray) -> np.ndarray:
        reads_at_first_batch.append(int(images.reader.reads.sum()))  # type: ignore[attr-defined]
        return model(0)(pixels)

    predict_suite(
        [subject("torch", "torch", watching)], Suite("id", images, np.arange(120)), batch=8
    )
    assert 8 <= reads_at_first_batch[0] <= 8 * 3 + 1


def test_a_model_of_more_classes_is_masked_to_those_of_the_suite() -> None:
    images = paint_images(9)
    many = ("horse", "dog", "cat", "fish")

    def predict(pixels: np.ndarray) -> np.ndarray:
        return np.tile(np.array([9, 1, 2, 3], dtype=np.float32), (len(pixels), 1))

    [logits] = predict_suite(
        [subject("a", "artifact", predict, classes=many)], Suite("id", images, np.arange(9))
    )  # fmt: skip
    assert logits[0].tolist() == [2.0, 1.0, 3.0]


def test_a_class_the_model_does_not_know_is_refused() -> None:
    with pytest.raises(
        EdgekdError, match='class "dog" that int8 of run r was not made for'
    ) as caught:
        predict_suite(
            [subject("int8", "artifact", model(0), classes=("cat", "dogs", "fish"))],
            Suite("id", paint_images(9), np.arange(9)),
        )
    assert caught.value.hint == 'Did you mean "dogs"?'


def test_logits_of_another_width_and_not_finite_ones_are_refused() -> None:
    suite = Suite("id", paint_images(9), np.arange(9))
    with pytest.raises(EdgekdError, match=r"shape \[9, 5\], not \[9, 3\]"):
        predict_suite([subject("int8", "artifact", model(0, classes=5))], suite)

    def broken(pixels: np.ndarray) -> np.ndarray:
        return np.full((len(pixels), 3), np.nan, dtype=np.float32)

    with pytest.raises(EdgekdError, match="not finite on id"):
        predict_suite([subject("int8", "artifact", broken)], suite)


def test_an_image_gone_since_it_was_listed_is_named() -> None:
    images = paint_images(9)

    def reader(index: int) -> Image.Image:
        if index == 4:
            raise UnreadableImage("missing")
        return Image.new("RGB", (8, 8))

    object.__setattr__(images, "reader", reader)
    with pytest.raises(EdgekdError, match=r"all/dog/4\.png can no longer be read: missing"):
        predict_suite(
            [subject("torch", "torch", model(0))], Suite("id", images, np.arange(9)), batch=2
        )


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
