"""Who is measured, and on what: the models (subjects) and the sets of test images (suites) of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.measure.counting import Counted
from edgekd.benchmark.measure.measured import Measured
from edgekd.benchmark.report.rows import HERE, Family, Kind
from edgekd.core.predictor import Predictor
from edgekd.core.preprocess import Preprocess
from edgekd.data.image_set import ImageSet
from edgekd.targets.session import Placement

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
