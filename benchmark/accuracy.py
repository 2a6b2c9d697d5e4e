"""Who is measured, on what, and the logits that come out: every image is read once for all who are measured on it."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgekd.benchmark.counting import Counted
from edgekd.benchmark.measured import Measured
from edgekd.benchmark.report.rows import HERE, Family, Kind
from edgekd.data import ImageSet
from edgekd.errors import EdgekdError, did_you_mean
from edgekd.images import UnreadableImage
from edgekd.predictor import Predictor
from edgekd.preprocess import Preprocess
from edgekd.targets.placement import Placement

Wording = tuple[Predictor, tuple[str, ...]]
"""How a model answers when asked in other words, and the classes it then tells apart, in the order of its logits."""
_FAMILIES: dict[str, Family] = {
    "id": "id", "val": "val", "test": "test", "seen": "seen", "adapted": "adapted", "ood": "domain", "clean": "clean",
    "corruption": "corruption", "cue": "cue-conflict", "vocab": "vocabulary", "unknown": "unknown",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Subject:
    """A model under measurement.

    Attributes:
        name: `teacher`, `torch`, or the artifact's name; unique within its run.
        run: name of the training run it belongs to.
        kind: teacher zero-shot, the student in torch, or an exported file.
        precision: `fp32`, `fp16` or `int8`.
        preprocess: how its pixels are made.
        predict: uint8 `[B, H, W, 3]` → float32 logits `[B, C]`.
        classes: C class names, in the order of the logits.
        folder: the artifact's folder; None for teacher and torch student.
        identity: two subjects with the same non-empty identity are the same model (the teacher of two runs): it is
            measured once and shown once.
        threads: threads `predict` works with, where the caller knows; artifacts are asked themselves.
        device: where the numbers come from; `local` is this machine.
        measured: what a device found out; `predict` is then only a comparison.
        wordings: name of a changed vocabulary → how it answers then and among which classes; a model whose classes
            are part of its weights or of its file has none.
        placement: asks an artifact's runtime which nodes run where; None where it does not tell.
        counted: parameters and multiply-accumulates of one answer; None where nobody can count them.
        reworded: of a file that ends in an embedding: names of classes and their unit vectors float32 `[C, D]` in the
            student's space → how it answers among these.
        here: False where the runtime of an artifact is not on this machine, so that only a device answers.
    """

    name: str
    run: str
    kind: Kind
    precision: str
    preprocess: Preprocess
    predict: Predictor
    classes: tuple[str, ...]
    folder: Path | None = None
    identity: str = ""
    threads: int | None = None
    device: str = HERE
    measured: Measured | None = None
    placement: Callable[[], Placement | None] = lambda: None
    wordings: Mapping[str, Wording] = field(default_factory=dict)
    counted: Counted | None = None
    reworded: Callable[[tuple[str, ...], NDArray[np.float32]], Predictor] | None = None
    here: bool = True

    @property
    def key(self) -> str:
        """Same for subjects that are the same model."""
        return f"{self.kind}:{self.identity}" if self.identity else f"{self.run}/{self.name}"


@dataclass(frozen=True, eq=False)
class Suite:
    """Images to measure on.

    Attributes:
        name: `id`, `val`, `test:<name>`, `seen:<name>`, `adapted:<name>`, `ood:<name>`, `clean:<name>`,
            `corruption:<name>:<severity>`, `cue:<name>`, `unknown:<name>`.
        images: where they come from.
        indices: int64 `[n]` into `images`.
        run: only subjects of this run are measured on it (runs that left out different domains); None for all.
        family: what kind of images they are, see `findings.Family`; None derives it from the name.
        remarks: what a reader must know about these images, one sentence each.
        corruption: name and severity (1–5) of what every image goes through first, see `corruptions.corrupt`.
        wording: name of the changed vocabulary that it is asked with; `images.classes` then ends in the names added.
        base: name of the suite it is set against: of a changed vocabulary that with the same images and the run's own
            words, of unknown images (all labels −1) that with the known ones.
        own_metrics: int64 answers `[n]` (index into `images.classes`) → the data set's own metrics by name.
        own_metrics_by: who computes them.
        texture: int64 `[n]`, class of each image's texture where `labels` are those of its shape (cue conflict).
        excluded: role in training → images left out, since the run has seen their content in it.
    """

    name: str
    images: ImageSet
    indices: NDArray[np.int64]
    run: str | None = None
    family: Family | None = None
    remarks: tuple[str, ...] = ()
    texture: NDArray[np.int64] | None = None
    corruption: tuple[str, int] | None = None
    wording: str | None = None
    base: str | None = None
    own_metrics: Callable[[NDArray[np.int64]], dict[str, float]] | None = None
    own_metrics_by: str = ""
    excluded: Mapping[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> Family:
        """The family, by the name's first word where none was given."""
        if self.family is not None:
            return self.family
        return _FAMILIES[self.name.partition(":")[0]]

    @property
    def labels(self) -> NDArray[np.int64]:
        """Int64 `[n]`, index into `images.classes`."""
        return self.images.labels[self.indices]

    @property
    def domain_of(self) -> NDArray[np.int64]:
        """Int64 `[n]`, index into `images.domains`."""
        return self.images.domain_of[self.indices]

    def holds(self, subject: Subject) -> bool:
        """Whether the subject is measured on it: one of its run that can speak its vocabulary."""
        return self.concerns(subject) and (self.wording is None or self.wording in subject.wordings)

    def concerns(self, subject: Subject) -> bool:
        return self.run is None or self.run == subject.run


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
    from edgekd.benchmark.corruptions import SIZE, corrupt  # brings scipy

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
