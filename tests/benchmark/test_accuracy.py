"""Logits of subjects on suites: read once, in order, of the right classes."""

from __future__ import annotations

import numpy as np
import pytest
from benchmark_fakes import CLASSES, LARGE, SMALL, Paint, model, paint_images, subject
from PIL import Image

from edgekd.benchmark.evaluate.logits import predict_suite, prepare
from edgekd.benchmark.subjects import Suite
from edgekd.core.errors import EdgekdError
from edgekd.data.images import UnreadableImage


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


def test_prepare_is_the_shared_preprocess() -> None:
    images = paint_images(9)
    assert (prepare(images, 5, LARGE) == LARGE.pixels(images.read(5))).all()
    assert images.classes == CLASSES
