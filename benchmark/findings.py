"""Findings of a report besides its plain rows: suites, gates, corruption tables, cue conflicts, comparisons."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgekd.benchmark.measure.intervals import Interval

HERE = "local"
"""`device` of everything that this process measures, or a process it starts."""
Family = Literal["id", "test", "seen", "adapted", "domain", "folder", "subset", "clean", "corruption", "cue-conflict",
                 "val", "vocabulary", "unknown"]  # fmt: skip
"""What kind of images a suite has.

`id` held-out images of the training domains; `test` an in-domain hold-out that was given; `seen` other images of
training domains; `adapted` images of a domain that training saw without labels; `domain` a domain that training left
out; `folder` other images; `subset` other images of only some of the subject's classes;
`clean` ID images of just the classes of a subset suite; `corruption` ID images, corrupted; `cue-conflict` shape of one
class and texture of another; `vocabulary` images of another suite, asked in other words; `unknown` images of no class
that the subject knows; `val` ID validation, from which only temperatures come.
"""


class Frozen(BaseModel):
    """Base of everything in a report."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Short = Annotated[str, Field(max_length=256)]


class State(BaseModel):
    """What changes while measuring (`environment.state`)."""

    load_average: float | None
    cpu_mhz: float | None
    temperature_c: float | None = Field(ge=-273, le=1000)
    throttle_count: int | None
    throttle_flags: Short | None
    power_mode: Short | None


class Machine(BaseModel):
    """What was measured on (`environment.describe`), with the states before and after."""

    cpu: Short | None
    features: list[Short] = Field(max_length=256)
    cores: int | None = Field(ge=1, le=10**6)
    usable_cores: int = Field(ge=1, le=10**6)
    machine: Short
    system: Short
    governor: Short | None
    python: Short
    versions: dict[Short, Short | None] = Field(max_length=256)
    before: State
    after: State


class SuiteRow(Frozen):
    """One suite: which images, and what a reader must know about them."""

    suite: str
    run: str | None
    """Only subjects of this run are measured on it; None for all."""
    family: Family
    data: str
    n: int
    classes: int
    domains: tuple[str, ...]
    remarks: tuple[str, ...]
    excluded: dict[str, int] = Field(default_factory=dict)
    """Role in training (`train`, `val`, `unlabelled`) → images left out, since the run has seen their content in it;
    `tested`: since another suite of an unseen domain has them."""


class Scaled(Frozen):
    """Calibration after dividing the logits by the subject's temperature, fitted on ID validation only."""

    ece: float
    adaptive_ece: float
    nll: float
    brier: float


class GateRow(Frozen):
    """One gate on one artifact. A gate that could not be evaluated has no value and has not passed."""

    expression: str
    run: str | None
    subject: str | None
    """None where no artifact was measured."""
    metric: str
    operator: Literal["<=", ">=", "<", ">"]
    limit: float
    value: float | None
    passed: bool
    reason: str | None
    """Why it could not be evaluated."""


class EnergyRow(Frozen):
    """Energy of the measured blocks of one artifact, from a declared sensor."""

    sensor: str
    covers: str
    """Whose energy it is: the processor's, a board's, a rail's, the whole device's."""
    joules_per_image: float
    """Idle power included."""
    joules_per_image_above_idle: float | None
    """Less idle power times the same time."""
    mean_w: float
    idle_w: float | None
    """Before any model was loaded; of several processes the mean."""
    seconds: float


class ThroughputRow(Frozen):
    """Images per second of one artifact at one batch size and thread count; the numbers are None where it refused."""

    run: str
    subject: str
    device: str = HERE
    """Where it was taken."""
    batch: int
    threads: int | None
    """As the runtime says; None where it refused and was to choose."""
    images_per_s: float | None = None
    images_per_s_ci95: Interval | None = None
    calls: int = 0
    """Of the model, each with a whole batch."""
    settled: bool | None = None
    reason: str | None = None
    """Why there is no number, such as a file that takes one image at a time."""


class PlacementRow(Frozen):
    """Where the nodes of one artifact ran. A report is only written when all ran where they were asked to."""

    run: str
    subject: str
    asked: str
    """Provider or device that was to run everything."""
    nodes: dict[str, dict[str, int]] | None
    """Provider → kind of operator → nodes; None where the runtime does not tell."""
    told_by: str
    """What was asked, or why nothing could be."""
    device: str


class CorruptionRow(Frozen):
    """One subject on the 15 corruptions of ImageNet-C at severities 1–5. Fractions are 0–1."""

    run: str
    subject: str
    n: int
    """Images in each of the cells."""
    top1: dict[str, tuple[float, ...]]
    """Corruption → top-1 at severity 1, 2, 3, 4, 5."""
    robust_accuracy: float
    """Unweighted mean of the cells."""
    mce: float | None
    """Mean over corruptions of (mean error over severities / the denominator's); 1 is as good as the denominator."""
    mce_denominators: str | None
    """Whose errors the denominators are."""


class CueConflictRow(Frozen):
    """How one subject decides between shape and texture (Geirhos et al. 2019)."""

    run: str
    subject: str
    suite: str
    n: int
    """Images whose shape and texture are of different classes."""
    shape: float
    """Fraction decided for the shape's class."""
    texture: float
    shape_bias: float | None
    """shape / (shape + texture); None when it never names either."""
    shape_bias_ci95: Interval | None


class VocabularyRow(Frozen):
    """One subject when the words it is asked in change; the numbers are None where it cannot be asked so."""

    run: str
    subject: str
    suite: str
    base: str
    """The suite with the same images and the run's own words."""
    n: int
    added: int
    """Class names that no image has."""
    top1: float | None
    top1_ci95: Interval | None
    base_top1: float | None
    """Top-1 on `base`."""
    to_added: float | None
    """Fraction of images answered with an added name."""
    reason: str | None
    """Why it cannot be asked so."""


class AurocCost(Frozen):
    """AUROC of the torch student minus that of the artifact, on the same images; positive is a loss."""

    value: float
    ci95: Interval
    """Paired bootstrap: known and unknown images drawn on their own, the same for both models."""


class DetectionRow(Frozen):
    """How well one score tells known from unknown images, see `detection`. Fractions are 0–1."""

    auroc: float
    auroc_ci95: Interval
    aupr_out: float
    """Unknown images are positive; chance is their share."""
    aupr_in: float
    """Known images are positive."""
    fpr95: float
    """Unknown images above the threshold that 95 % of the known ones pass."""
    auroc_cost: AurocCost | None
    """Artifacts only; None without a torch student."""


class UnknownRow(Frozen):
    """One subject on images of no class that it knows, set against in-domain test images."""

    run: str
    subject: str
    suite: str
    inside: str
    """The suite of known images."""
    n: int
    n_inside: int
    confidence: float
    """Mean largest softmax probability on the unknown images, where every answer is wrong."""
    confidence_inside: float
    msp: DetectionRow
    """By the largest softmax probability."""
    mls: DetectionRow
    """By the largest logit."""
    device: str = HERE


class OwnMetricsRow(Frozen):
    """One subject by the metrics that a data set defines for itself."""

    run: str
    subject: str
    suite: str
    told_by: str
    metrics: dict[str, float]


class SpeedRow(Frozen):
    """Two exported files of one run on one device: p50 of A / p50 of B, and whether it may be stated as a speed."""

    a_run: str
    a: str
    b_run: str
    b: str
    device: str = HERE
    ratio: float
    """Below 1, A is faster."""
    ci95: Interval
    withheld: str | None
    """Why no claim about speed is made; None where it holds."""


class SuiteComparison(Frozen):
    """Accuracy of A minus accuracy of B on the same images of one suite."""

    suite: str
    n: int
    a: float
    b: float
    value: float
    ci95: Interval
    mcnemar_p: float
    agreement: float


class Comparison(Frozen):
    """Two artifacts beside each other: latency from blocks that took turns, accuracy on the same images."""

    a_run: str
    a: str
    b_run: str
    b: str
    p50_a_ms: float
    p50_b_ms: float
    p50_ratio: float
    """p50 of A / p50 of B: below 1, A is faster."""
    p50_ratio_ci95: Interval
    withheld: str | None = None
    """Why no claim about speed is made of it; None where it holds."""
    turns: int
    """Pairs of blocks that the interval is drawn from."""
    processes: int
    accuracy: tuple[SuiteComparison, ...]
