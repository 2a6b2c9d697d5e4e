"""Who is measured, and on what: the models (subjects) and the sets of test images (suites) of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.measure.counting import Counted
from edgekd.benchmark.results.rows import HERE, Family, Kind
from edgekd.core.predictor import Predictor
from edgekd.core.preprocess import Preprocess
from edgekd.data.image_set import ImageSet
from edgekd.targets.devices.result import ArtifactResult
from edgekd.targets.session import Placement
from edgekd.targets.timing.stopwatch import MIN_BUFFERS

Logits = dict[tuple[str, int], NDArray[np.float32]]
"""(subject's key, position of the suite) → `[n, C]`, columns in the suite's class order."""
PromptVariant = tuple[Predictor, tuple[str, ...]]
"""A model with other prompts, and the classes of its predictions, in the order of its logits."""
_FAMILIES: dict[str, Family] = {
    "id": "id", "val": "val", "test": "test", "seen": "seen", "adapted": "adapted", "ood": "domain", "clean": "clean",
    "corruption": "corruption", "cue": "cue-conflict", "vocab": "vocabulary", "unknown": "unknown",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Measured:
    """The results of one artifact on a device.

    Attributes:
        logits: position of the suite → float32 `[n, C]`, columns in the suite's class order.
        facts: about the device, for the report.
        same_pixels: share of the compared images that the device prepared bit for bit as this machine does.
    """

    result: ArtifactResult
    logits: Mapping[int, NDArray[np.float32]]
    facts: dict[str, Any]
    same_pixels: float | None


@dataclass(frozen=True, eq=False)
class Subject:
    """A model under measurement.

    Attributes:
        name: `teacher`, `torch`, or the artifact's name; unique within its run.
        classes: names in the order of the logits.
        folder: of an artifact.
        identity: two subjects with the same non-empty identity are the same model (the teacher of two runs), which is
            measured once and shown once.
        threads: those of `predict`, where the caller sets them; artifacts report their own.
        measured: results of a `device`; `predict` is then only a comparison.
        variants: name of a prompt variant → the model with it.
        placement: returns which nodes run where; None where the runtime does not report it.
        with_classes: of a file that ends in an embedding: class names and their unit vectors float32 `[C, D]` in the
            student's space → the predictor among these.
        here: False where the runtime of an artifact is not on this machine.
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
    variants: Mapping[str, PromptVariant] = field(default_factory=dict)
    counted: Counted | None = None
    with_classes: Callable[[tuple[str, ...], NDArray[np.float32]], Predictor] | None = None
    here: bool = True

    @property
    def who(self) -> tuple[str, str]:
        """Run and name, as rows of a report have them."""
        return self.run, self.name

    @property
    def key(self) -> str:
        """Same for subjects that are the same model."""
        return f"{self.kind}:{self.identity}" if self.identity else f"{self.run}/{self.name}"


@dataclass(frozen=True, eq=False)
class Suite:
    """Images to measure on.

    Attributes:
        name: `id`, `val`, `corruption:<name>:<severity>`, or `<kind>:<name>` with the other kinds of `_FAMILIES`.
        indices: int64 `[n]` into `images`.
        run: only subjects of this run are measured on it; None for all.
        family: None derives it from the name.
        remarks: for readers of the report, one sentence each.
        texture: int64 `[n]`, class of each image's texture where `labels` are those of its shape (cue conflict).
        corruption: name and severity (1–5), see `corruptions.corrupt`.
        variant: name of the prompt variant that classifies it; `images.classes` then ends in the names added.
        base: name of the suite it is compared with: of a prompt variant that with the run's own prompts, of unknown
            images (all labels −1) that with the known ones.
        own_metrics: int64 predictions `[n]` → the data set's own metrics by name, computed by `own_metrics_by`.
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
    variant: str | None = None
    base: str | None = None
    own_metrics: Callable[[NDArray[np.int64]], dict[str, float]] | None = None
    own_metrics_by: str = ""
    excluded: Mapping[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> Family:
        """The family, by the name's first word where none was given."""
        return self.family or _FAMILIES[self.name.partition(":")[0]]

    @property
    def labels(self) -> NDArray[np.int64]:
        """Int64 `[n]`, index into `images.classes`."""
        return self.images.labels[self.indices]

    @property
    def domain_of(self) -> NDArray[np.int64]:
        """Int64 `[n]`, index into `images.domains`."""
        return self.images.domain_of[self.indices]

    def holds(self, subject: Subject) -> bool:
        """Return whether the subject is measured on it: one of its run that has its prompt variant."""
        return self.concerns(subject) and (self.variant is None or self.variant in subject.variants)

    def concerns(self, subject: Subject) -> bool:
        """Return whether the suite is for the subject's run."""
        return self.run in (None, subject.run)


def clock_places(suites: Sequence[Suite]) -> tuple[int, NDArray[np.int64]]:
    """Return the suite whose images are timed (`id` where there is one), and 64 indices into its images."""
    number = next((number for number, suite in enumerate(suites) if suite.name == "id"), 0)
    indices = suites[number].indices
    return number, indices[np.linspace(0, len(indices) - 1, MIN_BUFFERS).round().astype(int)]
