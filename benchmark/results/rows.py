"""The rows of a report about one subject, with the definition of every number.

Each metric is declared once, as a field with `metric`. Evaluation, tables, gates, charts, the definitions in reports
and the JSON Schema (`python -m edgekd.benchmark.results.schema`) are derived from the declaration.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from edgekd.benchmark.evaluate import metrics
from edgekd.benchmark.results.metric import Better, metric
from edgekd.targets.timing.speed import Timing

HERE = "local"
"""Value of `device` for results from this machine."""
Kind = Literal["teacher", "torch", "artifact"]
Family = Literal["id", "seen", "test", "domain", "folder", "subset", "adapted", "clean", "corruption", "cue-conflict",
                 "val", "vocabulary", "unknown"]  # fmt: skip
"""Kind of images of a suite.

`id`: held-out images of the training domains. `test`: given in-domain test images. `seen`: other images of training
domains. `domain`: the domain left out of training. `folder`: other images. `subset`: other images of only some of the
classes. `adapted`: a domain with unlabelled training images. `clean`: ID images of only the classes of a subset suite.
`corruption`: corrupted ID images. `cue-conflict`: shape of one class and texture of another. `vocabulary`: images of
another suite with other prompts. `unknown`: images of none of the classes. `val`: ID validation images, used only to
fit temperatures.
"""
Interval = tuple[float, float]
"""95 % interval."""
Fraction = Annotated[float, Field(ge=0, le=1)]
Time = Annotated[float, Field(ge=0, le=1e12)]
Count = Annotated[int, Field(ge=0)]
HIGHER: Better = "higher"
LOWER: Better = "lower"
_NO_OOD = "no unseen domain was measured"
_NO_ID = "no in-domain images were measured"
_NO_TORCH = "the torch student was not measured on these images"
_NO_VAL = "there were no ID validation images to fit a temperature on"
_NO_COUNT = "its graph format is not supported"
_HENDRYCKS = "Hendrycks & Dietterich 2019"


class Frozen(BaseModel):
    """Base of all models of a report; numbers are finite."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        populate_by_name=True,
        use_attribute_docstrings=True,
        ser_json_inf_nan="null",
    )


class Row(Frozen):
    """Base of rows about one subject: a run's teacher, its torch student, or an exported file."""

    run: str
    subject: str

    @property
    def who(self) -> tuple[str, str]:
        """Run and subject."""
        return self.run, self.subject


class Change(Frozen):
    """A difference with the interval of a paired bootstrap."""

    value: float
    ci95: Interval


class Difference(Change):
    """Paired difference of accuracies on the same images, as an unweighted mean over suites.

    The interval is a bootstrap with 10,000 draws of images within each suite.
    """

    mcnemar_p: Fraction = metric("p", "p", source="McNemar 1947")
    """Exact two-sided McNemar test over all images."""


class Calibration(Frozen):
    """Calibration of the logits as the subject returns them."""

    ece: Fraction = metric("ECE", better=LOWER, source="Guo et al. 2017", compute=metrics.ece)
    """Expected calibration error: Σ n_b/N · |accuracy − confidence| over 15 bins of equal width of the largest softmax
    probability, closed on the right."""
    adaptive_ece: Fraction = metric(
        "adaptive ECE", better=LOWER, source="Nixon et al. 2019", compute=metrics.adaptive_ece
    )
    """ECE with 15 bins of equal numbers of images."""
    nll: Time = metric("NLL", better=LOWER, compute=metrics.nll)
    """Mean negative log-likelihood of the label, in nats."""
    brier: Annotated[float, Field(ge=0, le=2)] = metric(
        "Brier", better=LOWER, source="Brier 1950", compute=metrics.brier
    )
    """Mean of Σ_c (p_c − y_c)² over images, 0 to 2."""


class AccuracyRow(Row, Calibration):
    """One subject on one suite."""

    suite: str
    n: Count = metric("images", "count")
    classes: Count
    top1: Fraction = metric("top-1", "%", HIGHER, interval="top1_ci95", compute=metrics.top1)
    """Share of images whose largest logit is the label's; Wilson 95 % interval."""
    top1_ci95: Interval
    macro: Fraction = metric("macro", "%", HIGHER, compute=metrics.macro)
    """Unweighted mean of recall over the classes that have images."""
    worst_class: str
    worst_class_recall: Fraction = metric("worst class", "%", HIGHER)
    """Lowest recall of a class."""
    worst_domain: str | None
    """Domain of the suite with the lowest top-1; null if the suite has only one."""
    worst_domain_top1: Fraction | None = metric(
        "worst domain", "%", HIGHER, missing="the suite has one domain"
    )
    """Lowest top-1 of a domain of the suite."""
    scaled: Calibration | None
    """Calibration after dividing the logits by the subject's temperature; null without ID validation images."""
    agreement: Fraction | None = metric(
        "agreement", "%", HIGHER, missing="there is no torch student"
    )
    """Share of images with the same prediction as the run's torch student."""
    device: str = HERE


class CorruptionRow(Row):
    """One subject on the 15 corruptions of ImageNet-C at severities 1–5."""

    n: Count = metric("images", "count")
    """Images per corruption and severity."""
    top1: dict[str, tuple[Fraction, ...]]
    """Corruption → top-1 at severities 1 to 5."""
    robust_accuracy: Fraction = metric(
        "robust accuracy",
        "%",
        HIGHER,
        source=_HENDRYCKS,
        missing="the corruptions were not measured (--suites corruptions)",
    )
    """Unweighted mean top-1 over 15 corruptions at 5 severities."""
    mce: Time | None = metric(
        "mCE",
        "%",
        LOWER,
        source=_HENDRYCKS,
        missing="no denominators: neither 1,000 classes nor a teacher with errors on each corruption",
    )
    """Mean over corruptions of the mean error over severities, divided by that of a reference model."""
    mce_denominators: str | None
    """Reference model of the denominators."""


class CueConflictRow(Row):
    """Shape bias on images with the shape of one class and the texture of another."""

    suite: str
    n: Count = metric("images", "count")
    shape: Fraction = metric("shape", "%", gate=False)
    """Share of images classified as their shape's class."""
    texture: Fraction = metric("texture", "%", gate=False)
    """Share of images classified as their texture's class."""
    shape_bias: Fraction | None = metric(
        "shape bias",
        "%",
        HIGHER,
        source="Geirhos et al. 2019",
        interval="shape_bias_ci95",
        gate=False,
    )
    """Shape / (shape + texture); Wilson 95 % interval."""
    shape_bias_ci95: Interval | None


class VocabularyRow(Row):
    """One subject with other prompts or added class names; metrics are null if its classes are fixed."""

    suite: str
    base: str
    """The suite with the same images and the run's own prompts."""
    n: Count = metric("images", "count")
    added: Count = metric("names added", "count")
    """Added class names, which no image has."""
    top1: Fraction | None = metric("top-1", "%", HIGHER, interval="top1_ci95", gate=False)
    top1_ci95: Interval | None
    base_top1: Fraction | None = metric("own prompts", "%", HIGHER, gate=False)
    """Top-1 on the same images with the run's own prompts."""
    to_added: Fraction | None = metric("to added names", "%", LOWER, gate=False)
    """Share of images classified as an added name."""
    reason: str | None
    """Reason if it cannot be measured."""


class DetectionRow(Frozen):
    """Detection of unknown images by one score per image."""

    auroc: Fraction = metric(
        "AUROC", "%", HIGHER, source="Hanley & McNeil 1982", interval="auroc_ci95"
    )
    """Probability that a known image scores higher than an unknown one, with ties as one half; 50 % is chance.
    Interval: bootstrap, 2,000 draws."""
    auroc_ci95: Interval
    auroc_cost: Change | None = metric(
        "AUROC loss", "points", LOWER, missing="the torch student was not measured", gate=False
    )
    """AUROC of the torch student minus that of the file on the same images; positive values are a loss."""
    fpr95: Fraction = metric("FPR95", "%", LOWER, source="Yang et al. 2022")
    """Share of unknown images at or above the highest threshold that at least 95 % of the known images reach."""
    aupr_out: Fraction = metric("AUPR-out", "%", HIGHER, source="Hendrycks et al. 2021")
    """Average precision with unknown images as positives; chance is their share."""
    aupr_in: Fraction = metric("AUPR-in", "%", HIGHER)
    """Average precision with known images as positives."""


class UnknownRow(Row):
    """One subject on images of none of its classes, against in-domain test images."""

    suite: str
    inside: str
    """The suite of known images."""
    n: Count = metric("images", "count")
    n_inside: Count
    confidence: Fraction = metric("confidence", "%", LOWER)
    """Mean of the largest softmax probability on the unknown images, for which every prediction is wrong."""
    confidence_inside: Fraction = metric("confidence, known", "%", gate=False)
    msp: DetectionRow
    """Score: largest softmax probability (Hendrycks & Gimpel 2017)."""
    mls: DetectionRow
    """Score: largest logit (Hendrycks et al. 2022)."""
    device: str = HERE


class OwnMetricsRow(Row):
    """One subject, measured with a data set's own metrics."""

    suite: str
    source: str = Field(validation_alias=AliasChoices("source", "told_by"))
    """Package that computes the metrics."""
    metrics: dict[str, float]


class SummaryRow(Row):
    """Summary of one subject; fields are null if a suite, a teacher or a torch student is missing."""

    kind: Kind
    precision: str
    same_as: str | None
    """Run under which the same model is already listed (a teacher shared by several runs)."""
    preprocess: str
    size_mb: Time | None = metric("size", "MB", LOWER, missing="its files are not here")
    """Size of the file's folder without its manifest, in 10⁶ bytes."""
    parameters: Count | None = metric("parameters", "M", LOWER, missing=_NO_COUNT, default=None)
    """Millions of elements of weights and biases in the file's ONNX graph; for a teacher, in its image encoder."""
    macs: Count | None = metric("MACs", "M", LOWER, missing=_NO_COUNT, default=None)
    """Millions of multiply-accumulates of convolutions and matrix products for one image."""
    id: Fraction | None = metric("ID", "%", HIGHER, missing=_NO_ID)
    """Top-1 on held-out images of the training domains."""
    ood: dict[str, Fraction]
    """Domain → top-1 on its `ood:` suite."""
    ood_avg: Fraction | None = metric("OOD avg", "%", HIGHER, missing=_NO_OOD)
    """Unweighted mean of top-1 over the unseen domains (`ood:` suites)."""
    ood_worst: Fraction | None = metric("OOD worst", "%", HIGHER, missing=_NO_OOD)
    """Lowest top-1 of an unseen domain."""
    ood_worst_domain: str | None
    apart: dict[str, Fraction] = {}
    """Top-1 on the suites `test:`, `seen:` and `adapted:`, which are in no mean over unseen domains."""
    adapted_avg: Fraction | None = metric(
        "adapted",
        "%",
        HIGHER,
        missing="no domain with unlabelled training images was measured",
        default=None,
    )
    """Unweighted mean of top-1 over the domains with unlabelled training images (`adapted:` suites)."""
    gap: float | None = metric("gap", "points", LOWER, missing=_NO_OOD)
    """Top-1 in domain minus OOD avg."""
    clean_gap: dict[str, float]
    """Subset suite → top-1 on the ID images of the same classes minus top-1 on the suite."""
    retention: Time | None = metric(
        "retention", "%", HIGHER, missing="no unseen domain or no teacher was measured"
    )
    """OOD avg divided by the zero-shot OOD avg of the run's teacher."""
    temperature: float | None = metric(
        "temperature", source="Guo et al. 2017", missing=_NO_VAL, gate=True
    )
    """Divisor of the logits that minimises NLL on ID validation images, 0.05–20."""
    ece_id: Fraction | None = metric("ECE ID", better=LOWER, missing=_NO_ID)
    """ECE in domain."""
    ece_id_scaled: Fraction | None = metric("ECE ID scaled", better=LOWER, missing=_NO_VAL)
    """ECE ID after temperature scaling."""
    ece_ood: Fraction | None = metric("ECE OOD", better=LOWER, missing=_NO_OOD)
    """Unweighted mean of ECE over the unseen domains."""
    ece_ood_scaled: Fraction | None = metric("ECE OOD scaled", better=LOWER, missing=_NO_VAL)
    """ECE OOD after temperature scaling."""
    agreement_id: Fraction | None = metric("agreement ID", "%", HIGHER, missing=_NO_TORCH)
    """Agreement with the torch student in domain."""
    agreement_ood: Fraction | None = metric("agreement OOD", "%", HIGHER, missing=_NO_TORCH)
    """Mean agreement with the torch student over the unseen domains."""
    quant_cost_id: Difference | None = metric("export cost ID", "points", LOWER, gate=False)
    """Top-1 of the torch student minus that of the file on the same images; positive values are a loss. Interval:
    paired bootstrap, 10,000 draws of images within each suite."""
    quant_cost_ood: Difference | None = metric("export cost OOD", "points", LOWER, gate=False)
    """The same over the unseen domains."""


class EnergyRow(Frozen):
    """Energy of one file during its latency blocks, from a given sensor."""

    joules_per_image: float = metric("energy per image", "mJ", LOWER, gate=False)
    """Energy of everything the sensor covers, including idle power, divided by the number of images. Energy counters
    give a difference; power is integrated by the trapezoidal rule over both ends of each block."""
    joules_per_image_above_idle: float | None = metric(
        "above idle", "mJ", LOWER, missing="idle power is not known", gate=False
    )
    """Energy per image minus idle power, measured before loading any model, times the duration per image."""
    mean_w: float = metric("mean power", "W", gate=False)
    idle_w: float | None = metric("idle power", "W", gate=False)
    seconds: Time = metric("measured", "s")
    sensor: str
    covers: str
    """What the sensor covers: the processor, a board, a rail, or the whole device."""


class LatencyRow(Row):
    """Latency of one subject: single stream, batch 1, real images in rotation."""

    provider: str
    threads: int | None
    protocol: str
    quick: bool
    batch: int
    buffers: Count
    p50_ms: Time = metric("p50", "ms", LOWER, interval="p50_ci95_ms")
    """Median by nearest rank over all samples of all processes, without interpolation. Interval: bootstrap, 1,000
    draws of blocks of consecutive samples, and of processes first if there are several."""
    p50_ci95_ms: Interval
    p90_ms: Time = metric("p90", "ms", LOWER)
    """90th percentile, as p50."""
    p90_ci95_ms: Interval
    p99_ms: Time | None = metric(
        "p99", "ms", LOWER, source="MLPerf inference rules", missing="too few samples to state it"
    )
    """99th percentile, given only from 270,336 samples on."""
    mean_ms: Time = metric("mean", "ms", LOWER)
    """Mean of all samples."""
    cv: Time = metric("CV", better=LOWER)
    """Coefficient of variation: population standard deviation / mean."""
    n: Count = metric("runs", "count")
    seconds: Time = metric("measured", "s")
    first_ms: Time | None = metric("first", "ms", LOWER)
    """Duration of the first call in a fresh process, median over processes."""
    load_ms: Time | None = metric("load", "ms", LOWER)
    """Duration of opening the file, median over processes."""
    prepare_p50_ms: Time = metric("read + resize", "ms", LOWER)
    """Median time to read, decode and resize one image, outside the clock."""
    end_to_end_p50_ms: Time | None = metric("end-to-end p50", "ms", LOWER, default=None)
    """Median time for decoding, resizing and the model together, from an encoded image in memory, in a separate
    process."""
    end_to_end_p90_ms: Time | None = metric("end-to-end p90", "ms", LOWER, default=None)
    """90th percentile of the end-to-end latency."""
    peak_rss_mb: Time | None = metric("peak memory", "MB", LOWER, default=None)
    """Largest resident memory of the process of the end-to-end measurement, including interpreter and libraries."""
    processes: int = metric("processes", "count")
    p50_per_process_ms: tuple[float, ...]
    warmup_runs: tuple[int, ...]
    settled: bool
    """Whether the last two windows of the warm-up agreed within 2 %."""
    complete: bool
    """Whether the protocol's number of runs was reached before its time limit."""
    energy: EnergyRow | None = None
    other_cpu: Fraction | None = metric("other work", "%", LOWER, gate=False, default=None)
    """Share of all cores' time used by other processes during the measurement."""
    stolen_cpu: Fraction | None = metric("stolen", "%", LOWER, gate=False, default=None)
    """Share of all cores' time given to other machines by a hypervisor."""
    device: str = HERE

    @property
    def timing(self) -> Timing:
        """Return the facts that determine whether a claim about this latency is made."""
        return Timing(self.subject, self.settled, self.cv, self.other_cpu, self.stolen_cpu)


class ThroughputRow(Row):
    """Images per second of one file at one batch size and thread count; null if it cannot run with these."""

    batch: int
    threads: int | None
    images_per_s: Time | None = metric(
        "images/s", "1/s", HIGHER, interval="images_per_s_ci95", gate=False, default=None
    )
    """Images per second inside the clock, for consecutive full batches in a fresh process. This is not a latency.
    Interval: bootstrap of blocks."""
    images_per_s_ci95: Interval | None = None
    calls: Count = metric("calls", "count", default=0)
    settled: bool | None = None
    reason: str | None = None
    """Reason if there is no value."""
    device: str = HERE


class PlacementRow(Row):
    """The provider that ran each node of one file. There is no report if a part of a file ran elsewhere."""

    provider: str = Field(validation_alias=AliasChoices("provider", "asked"))
    """Provider or device requested for the whole file."""
    nodes: dict[str, dict[str, int]] | None
    """Provider → operator type → number of nodes; null if the runtime does not report it."""
    source: str = Field(validation_alias=AliasChoices("source", "told_by"))
    """Source of the placement, or the reason why there is none."""
    device: str
