"""Logits of subjects on suites: every image is read once for all who are measured on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgekd.benchmark.subjects import Logits, PromptVariant, Subject, Suite
from edgekd.core.ahead import batched, map_ahead
from edgekd.core.console import say
from edgekd.core.errors import EdgekdError, check_known
from edgekd.core.preprocess import Preprocess
from edgekd.data.image_set import ImageSet
from edgekd.data.images import UnreadableImage

Pixels = dict[str, NDArray[np.uint8]]
"""Hash of a `Preprocess` → pixels."""


def predict_suites(subjects: Sequence[Subject], suites: Sequence[Suite]) -> tuple[Logits, Logits]:
    """Return the logits of every subject, and of files that a device ran those on this machine."""
    logits: Logits = {}
    local: Logits = {}
    for number, suite in enumerate(suites):
        models = {one.key: one for one in subjects if suite.holds(one)}
        if models and (suite.corruption is None or suite.corruption[1] == 1):
            name = suite.name
            if suite.corruption is not None:
                name = name.replace(":1", " at severities 1–5")
            where = name if suite.run is None else f"{name} of {suite.run}"
            say(f"accuracy on {where}: {len(suite.indices)} images, {len(models)} models")
        able = [one for one in models.values() if one.here]
        for one, result in zip(able, predict_suite(able, suite) if able else (), strict=True):
            (logits if one.measured is None else local)[one.key, number] = result
        for one in models.values():
            if one.measured is not None:
                logits[one.key, number] = one.measured.logits[number]
    return logits, local


def predict_suite(
    subjects: Sequence[Subject], suite: Suite, *, batch: int = 64
) -> list[NDArray[np.float32]]:
    """Return logits `[n, classes of the suite]` of each subject, in the order of `suite.indices`.

    Each image is read once, and prepared once for each different `Preprocess`. A model that has more classes than the
    suite is masked to the suite's (the convention of ImageNet-A and -R).

    Raises:
        EdgekdError: a class that a subject does not have, an unreadable image, logits of the wrong shape or not finite.
    """
    columns = [columns_of(subject, suite) for subject in subjects]
    preprocesses = {subject.preprocess.hash: subject.preprocess for subject in subjects}
    parts: list[list[NDArray[np.float32]]] = [[] for _ in subjects]
    images = map_ahead(
        lambda index: _read(suite.images, index, preprocesses, suite.corruption),
        suite.indices.tolist(),
        2 * batch,
    )
    for ready in batched(images, batch):
        pixels = {name: np.stack([one[name] for one in ready]) for name in preprocesses}
        for subject, chosen, part in zip(subjects, columns, parts, strict=True):
            predict, classes = _model(subject, suite)
            logits = predict(pixels[subject.preprocess.hash])  # [B, C]
            _check(logits, (len(ready), len(classes)), subject, suite)
            part.append(np.asarray(logits[:, chosen], dtype=np.float32))
    return [np.concatenate(part) for part in parts]


def prepare(image_set: ImageSet, index: int, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Return one image as a model takes it, uint8 `[size, size, 3]`."""
    return _read(image_set, index, {"": preprocess})[""]


def _read(
    images: ImageSet,
    index: int,
    preprocesses: Mapping[str, Preprocess],
    corruption: tuple[str, int] | None = None,
) -> Pixels:
    try:
        image = images.read(index)
    except UnreadableImage as error:
        raise EdgekdError(
            f"The image {images.ids[index]} can no longer be read: {error.reason}.",
            "Restore it, or load the data again so that it is left out.",
        ) from error
    if corruption is None:
        return {name: preprocess.pixels(image) for name, preprocess in preprocesses.items()}
    return dict(_corrupted(image, images.keys[index], preprocesses, corruption))


def _corrupted(
    image: Image.Image,
    key: str,
    preprocesses: Mapping[str, Preprocess],
    corruption: tuple[str, int],
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Corrupt at 224 pixels, as ImageNet-C does, then resize for each model without another crop."""
    from edgekd.data.corruptions import SIZE, corrupt  # imports scipy

    done: dict[str, Image.Image] = {}
    for name, preprocess in preprocesses.items():
        at_size = preprocess.square(SIZE)
        if at_size.hash not in done:
            done[at_size.hash] = Image.fromarray(corrupt(at_size.pixels(image), *corruption, key))
        squash = preprocess.model_copy(update={"resize": "squash"})
        yield name, squash.pixels(done[at_size.hash])


def columns_of(subject: Subject, suite: Suite) -> NDArray[np.int64]:
    """Return which of the subject's logits are the suite's classes, in their order, int64 `[C]`."""
    who = f"{subject.name} of run {subject.run}"
    return columns_among(_model(subject, suite)[1], suite.images.classes, who)


def columns_among(known: Sequence[str], wanted: Sequence[str], who: str) -> NDArray[np.int64]:
    """Return the place of each wanted class among those known, int64 `[wanted]`; one missing is an `EdgekdError`."""
    place = {name: column for column, name in enumerate(known)}
    for name in wanted:
        check_known(name, place, f'The data has a class "{name}" that {who} was not made for.')
    return np.asarray([place[name] for name in wanted], dtype=np.int64)


def _model(subject: Subject, suite: Suite) -> PromptVariant:
    """Return the predictor and the classes with which the subject classifies the suite."""
    if suite.variant is None:
        return subject.predict, subject.classes
    return subject.variants[suite.variant]


def _check(
    logits: NDArray[np.float32], wanted: tuple[int, int], subject: Subject, suite: Suite
) -> None:
    who = f"{subject.name} of run {subject.run}"
    if logits.shape != wanted:
        raise EdgekdError(
            f"{who} returned logits of shape {list(logits.shape)}, not {list(wanted)}.",
            "Its class list does not belong to its weights: export it again.",
        )
    if not np.isfinite(logits).all():
        raise EdgekdError(
            f"{who} returned logits that are not finite on {suite.name}.",
            "Its weights or its quantization are broken: compare it with the FP32 artifact.",
        )
