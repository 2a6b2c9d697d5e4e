"""Logits of subjects on suites: every image is read once for all who are measured on it."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgekd.benchmark.subjects import Subject, Suite
from edgekd.core.errors import EdgekdError, did_you_mean
from edgekd.core.preprocess import Preprocess
from edgekd.data.image_set import ImageSet
from edgekd.data.images import UnreadableImage


def predict_suite(
    subjects: Sequence[Subject], suite: Suite, *, batch: int = 64
) -> list[NDArray[np.float32]]:
    """Logits `[n, classes of the suite]` of each subject, in the order of `suite.indices`.

    Each image is read once, by threads that work ahead of the models, and prepared once for each different
    `Preprocess`. A model that knows more classes than the suite is masked to the suite's (the convention of ImageNet-A
    and -R); columns follow the suite's class order.

    Raises:
        EdgekdError: a class that a subject does not know, an image that has become unreadable, logits of the wrong
            shape or not finite.
    """
    columns = [columns_of(subject, suite) for subject in subjects]
    predicts = [
        subject.predict if suite.wording is None else subject.wordings[suite.wording][0]
        for subject in subjects
    ]
    preprocesses = {subject.preprocess.hash: subject.preprocess for subject in subjects}
    parts: list[list[NDArray[np.float32]]] = [[] for _ in subjects]
    for pixels in _batches(suite, preprocesses, batch):
        for subject, predict, chosen, part in zip(subjects, predicts, columns, parts, strict=True):
            logits = predict(pixels[subject.preprocess.hash])  # [B, C]
            _check(logits, subject, suite, len(pixels[subject.preprocess.hash]))
            part.append(np.asarray(logits[:, chosen], dtype=np.float32))
    return [np.concatenate(part) for part in parts]


def prepare(image_set: ImageSet, index: int, preprocess: Preprocess) -> NDArray[np.uint8]:
    """One image as a model takes it, uint8 `[size, size, 3]`."""
    return _read(image_set, index, {"": preprocess})[""]


def _batches(
    suite: Suite, preprocesses: dict[str, Preprocess], batch: int
) -> Iterator[dict[str, NDArray[np.uint8]]]:
    workers = os.cpu_count() or 1
    waiting: deque[Future[dict[str, NDArray[np.uint8]]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        remaining = iter(suite.indices.tolist())
        ready: list[dict[str, NDArray[np.uint8]]] = []
        for index in itertools.islice(remaining, 2 * batch):
            waiting.append(pool.submit(_read, suite.images, index, preprocesses, suite.corruption))
        while waiting:
            ready.append(waiting.popleft().result())
            following = next(remaining, None)
            if following is not None:
                waiting.append(
                    pool.submit(_read, suite.images, following, preprocesses, suite.corruption)
                )
            if len(ready) == batch or not waiting:
                yield {
                    name: np.stack([one[name] for one in ready]) for name in preprocesses
                }  # [B, H, W, 3]
                ready = []
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read(
    images: ImageSet,
    index: int,
    preprocesses: dict[str, Preprocess],
    corruption: tuple[str, int] | None = None,
) -> dict[str, NDArray[np.uint8]]:
    try:
        image = images.read(index)
    except UnreadableImage as error:
        raise EdgekdError(
            f"The image {images.ids[index]} can no longer be read: {error.reason}.",
            "Restore it, or load the data again so that it is left out.",
        ) from error
    if corruption is None:
        return {name: preprocess.pixels(image) for name, preprocess in preprocesses.items()}
    return _corrupted(image, images.keys[index], preprocesses, corruption)


def _corrupted(
    image: Image.Image, key: str, preprocesses: dict[str, Preprocess], corruption: tuple[str, int]
) -> dict[str, NDArray[np.uint8]]:
    """Corrupted at 224 pixels, as ImageNet-C is, then brought to each model's size without another crop."""
    from edgekd.benchmark.evaluate.corruptions import SIZE, corrupt  # brings scipy

    done: dict[str, Image.Image] = {}
    found = {}
    for name, preprocess in preprocesses.items():
        at_size = preprocess.square(SIZE)
        if at_size.hash not in done:
            done[at_size.hash] = Image.fromarray(corrupt(at_size.pixels(image), *corruption, key))
        found[name] = preprocess.model_copy(update={"resize": "squash"}).pixels(done[at_size.hash])
    return found


def columns_of(subject: Subject, suite: Suite) -> NDArray[np.int64]:
    """Which of the subject's logits are the suite's classes, in their order, int64 `[C]`."""
    return columns_among(
        _classes(subject, suite), suite.images.classes, f"{subject.name} of run {subject.run}"
    )


def columns_among(known: Sequence[str], wanted: Sequence[str], who: str) -> NDArray[np.int64]:
    """Place of each wanted class among those known, int64 `[len(wanted)]`.

    Raises:
        EdgekdError: one that `who` does not know.
    """
    place = {name: column for column, name in enumerate(known)}
    for name in wanted:
        if name not in place:
            raise EdgekdError(
                f'The data has a class "{name}" that {who} was not made for.',
                did_you_mean(name, known),
            )
    return np.asarray([place[name] for name in wanted], dtype=np.int64)


def _classes(subject: Subject, suite: Suite) -> tuple[str, ...]:
    return subject.classes if suite.wording is None else subject.wordings[suite.wording][1]


def _check(logits: NDArray[np.float32], subject: Subject, suite: Suite, rows: int) -> None:
    wanted = (rows, len(_classes(subject, suite)))
    if logits.shape != wanted:
        raise EdgekdError(
            f"{subject.name} of run {subject.run} returned logits of shape {list(logits.shape)}, not {list(wanted)}.",
            "Its class list does not belong to its weights: export it again.",
        )
    if not np.isfinite(logits).all():
        raise EdgekdError(
            f"{subject.name} of run {subject.run} returned logits that are not finite on {suite.name}.",
            "Its weights or its quantization are broken: compare it with the FP32 artifact.",
        )
