"""The rows of a report, and the definition of every number in it.

A number is declared here once, as a field with its `Metric`. Evaluation, tables, gates, charts, the definitions at
the end of every report and the JSON Schema (`python -m edgekd.benchmark.report.schema`) follow from the declaration.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from edgekd.benchmark import metrics
from edgekd.benchmark.report.metric import Metric

HERE = "local"
"""`device` of what this machine measured."""
Kind = Literal["teacher", "torch", "artifact"]
Family = Literal["id", "seen", "test", "domain", "folder", "subset", "adapted", "clean", "corruption", "cue-conflict",
                 "val", "vocabulary", "unknown"]  # fmt: skip
"""What kind of images a suite has.

`id` held-out images of the training domains; `test` an in-domain hold-out that was given; `seen` other images of
training domains; `domain` a domain that training left out; `folder` other images; `subset` other images of only some
of the classes; `adapted` a domain whose unlabelled images took part in training; `clean` ID images of just the
classes of a subset suite; `corruption` ID images, corrupted; `cue-conflict` shape of one class and texture of another;
`vocabulary` images of another suite with other prompts; `unknown` images of none of the classes; `val` ID validation,
from which only temperatures come.
"""
Interval = tuple[float, float]
"""95 % interval."""
Fraction = Annotated[float, Field(ge=0, le=1)]
Time = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
HIGHER: Literal["higher"] = "higher"
LOWER: Literal["lower"] = "lower"
_NO_OOD = "no unseen domain was measured"
_NO_ID = "no in-domain images were measured"
_NO_TORCH = "the torch student was not measured on such images"
_NO_VAL = "there were no ID validation images to fit a temperature on"
_NO_COUNT = (
    "the file holds another kind of graph, or this torch version counts known layers wrongly"
)


class Frozen(BaseModel):
    """Base of everything in a report; numbers are finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True,
        use_attribute_docstrings=True, ser_json_inf_nan="null",
    )  # fmt: skip


class Row(Frozen):
    """Something about one subject: a run's teacher, its torch student, or an exported file by its name."""

    run: str
    subject: str

    @property
    def who(self) -> tuple[str, str]:
        """Run and subject."""
        return self.run, self.subject


class Difference(Frozen):
    """Paired difference of accuracies on the same images, averaged over suites without weights."""

    value: float
    ci95: Interval
    """Paired bootstrap: 10,000 draws of images within each suite."""
    mcnemar_p: Annotated[Fraction, Metric("p", "p", formula="exact two-sided McNemar test over all images",
                                          source="McNemar 1947")]  # fmt: skip


class SuiteRow(Frozen):
    """One suite of test images."""

    suite: str
    run: str | None
    """The run whose subjects alone are measured on it; null for all."""
    family: Family
    data: str
    n: Count
    classes: Count
    domains: tuple[str, ...]
    remarks: tuple[str, ...]
    excluded: dict[str, int] = {}
    """Role in training (`train`, `val`, `unlabelled`) → images left out because the run has seen them in it."""


class Calibration(Frozen):
    """Calibration of the logits as the subject returns them."""

    ece: Annotated[Fraction, Metric(
        "ECE", "", LOWER, "expected calibration error: 15 equally wide bins of the largest softmax probability, "
                          "closed on the "
        "right, Σ n_b/N · |accuracy − confidence|", source="Guo et al. 2017", compute=metrics.ece)]  # fmt: skip
    adaptive_ece: Annotated[Fraction, Metric(
        "adaptive ECE", "", LOWER, "ECE with 15 bins of equally many images", source="Nixon et al. 2019",
        compute=metrics.adaptive_ece)]  # fmt: skip
    nll: Annotated[Time, Metric("NLL", "", LOWER, "mean negative log-likelihood of the label, in nats",
                                compute=metrics.nll)]  # fmt: skip
    brier: Annotated[float, Field(ge=0, le=2), Metric(
        "Brier", "", LOWER, "mean of Σ_c (p_c − y_c)², 0 to "
                            "2", source="Brier 1950", compute=metrics.brier)]  # fmt: skip


class AccuracyRow(Row, Calibration):
    """One subject on one suite."""

    suite: str
    n: Annotated[Count, Metric("images", "count")]
    classes: Count
    top1: Annotated[Fraction, Metric(
        "top-1", "%", HIGHER, "share of images whose largest logit is the label's; Wilson 95 % interval",
        interval="top1_ci95", compute=metrics.top1)]  # fmt: skip
    top1_ci95: Interval
    macro: Annotated[Fraction, Metric(
        "macro", "%", HIGHER, "unweighted mean of the recalls of the classes that have "
                              "images", compute=metrics.macro)]  # fmt: skip
    worst_class: str
    worst_class_recall: Annotated[
        Fraction, Metric("worst class", "%", HIGHER, "lowest recall of a class")
    ]
    worst_domain: str | None
    """Domain of the suite with the lowest top-1; null where the suite has only one."""
    worst_domain_top1: Annotated[Fraction | None, Metric(
        "worst domain", "%", HIGHER, "lowest top-1 of a domain of the suite", missing="the suite has one "
            "domain")]  # fmt: skip
    scaled: Calibration | None
    """Calibration after dividing the logits by the subject's temperature; null without ID validation images."""
    agreement: Annotated[Fraction | None, Metric(
        "agreement", "%", HIGHER, "share of images on which it predicts the class that the run's torch student "
                                  "predicts",
        missing="there is no torch student")]  # fmt: skip
    device: str = HERE


class EnergyRow(Frozen):
    """Energy of the measured latency blocks of one file, from a declared sensor."""

    joules_per_image: Annotated[float, Metric(
        "energy per image", "mJ", LOWER, "energy of all that the sensor covers, idle power included, divided by the "
            "images: "
        "counters by their difference, power by the trapezoidal rule over both ends of each "
        "block", gate=False)]  # fmt: skip
    joules_per_image_above_idle: Annotated[float | None, Metric(
        "above idle", "mJ", LOWER, "less idle power, taken before any model was loaded, times the same time",
        missing="idle power is not known", gate=False)]  # fmt: skip
    mean_w: Annotated[float, Metric("mean power", "W", gate=False)]
    idle_w: Annotated[float | None, Metric("idle power", "W", gate=False)]
    seconds: Annotated[Time, Metric("measured", "s")]
    sensor: str
    covers: str
    """What the energy belongs to: the processor, a board, a rail, the whole device."""


class LatencyRow(Row):
    """One subject's time for one image. Single stream, batch 1, real images in rotation."""

    provider: str
    threads: int | None
    protocol: str
    quick: bool
    batch: int
    buffers: Count
    p50_ms: Annotated[Time, Metric(
        "p50", "ms", LOWER, "median by nearest rank over all samples of all processes: a real sample, none is left "
                            "out; "
        "interval: bootstrap, 1,000 draws of blocks of consecutive samples, of processes first where there are several",
        interval="p50_ci95_ms")]  # fmt: skip
    p50_ci95_ms: Interval
    p90_ms: Annotated[Time, Metric("p90", "ms", LOWER, "90th percentile, as p50")]
    p90_ci95_ms: Interval
    p99_ms: Annotated[Time | None, Metric(
        "p99", "ms", LOWER, "99th percentile, stated from 270,336 samples on", source="MLPerf inference rules",
        missing="too few samples to state it")]  # fmt: skip
    mean_ms: Annotated[Time, Metric("mean", "ms", LOWER, "mean of all samples")]
    cv: Annotated[
        Time,
        Metric("CV", "", LOWER, "coefficient of variation: population standard deviation / mean"),
    ]
    n: Annotated[Count, Metric("runs", "count")]
    seconds: Annotated[Time, Metric("measured", "s")]
    first_ms: Annotated[
        Time | None,
        Metric("first", "ms", LOWER, "first call in a fresh process, median over processes"),
    ]
    load_ms: Annotated[
        Time | None, Metric("load", "ms", LOWER, "opening the file, median over processes")
    ]
    prepare_p50_ms: Annotated[Time, Metric(
        "read + resize", "ms", LOWER, "median time to read, decode and resize one image, outside the "
                                      "clock")]  # fmt: skip
    end_to_end_p50_ms: Annotated[Time | None, Metric(
        "end-to-end p50", "ms", LOWER, "one clock around decoding, resizing and the model, from an encoded image in "
                                       "memory, in a "
        "process of its own")] = None  # fmt: skip
    end_to_end_p90_ms: Annotated[
        Time | None, Metric("end-to-end p90", "ms", LOWER, "90th percentile of the same")
    ] = None
    peak_rss_mb: Annotated[Time | None, Metric(
        "peak memory", "MB", LOWER, "largest resident memory of the process that measured end to end, interpreter "
                                    "and libraries "
        "included")] = None  # fmt: skip
    processes: Annotated[int, Metric("processes", "count")]
    p50_per_process_ms: tuple[float, ...]
    warmup_runs: tuple[int, ...]
    settled: bool
    """Whether the last two windows of the warm-up agreed within 2 %."""
    complete: bool
    """Whether the protocol's number of runs was reached before its time limit."""
    energy: EnergyRow | None = None
    other_cpu: Annotated[Fraction | None, Metric(
        "other work", "%", LOWER, "share of all cores' time that other processes took while the clock ran",
        gate=False)] = None  # fmt: skip
    stolen_cpu: Annotated[Fraction | None, Metric(
        "stolen", "%", LOWER, "share of all cores' time that a hypervisor gave to other "
                              "machines", gate=False)] = None  # fmt: skip
    device: str = HERE


class ThroughputRow(Row):
    """Images per second of one file at one batch size and thread count; numbers are null where it refused."""

    batch: int
    threads: int | None
    images_per_s: Annotated[Time | None, Metric(
        "images/s", "1/s", HIGHER, "images of whole batches, one batch after the other in a fresh process, per "
                                   "second inside the "
        "clock; interval: bootstrap of blocks; not a "
        "latency", interval="images_per_s_ci95", gate=False)] = None  # fmt: skip
    images_per_s_ci95: Interval | None = None
    calls: Annotated[Count, Metric("calls", "count")] = 0
    settled: bool | None = None
    reason: str | None = None
    """Why there is no number."""
    device: str = HERE


class PlacementRow(Row):
    """The provider that ran each node of one file. A file of which a part ran elsewhere gets no report."""

    provider: str = Field(validation_alias=AliasChoices("provider", "asked"))
    """Provider or device requested for the whole file."""
    nodes: dict[str, dict[str, int]] | None
    """Provider → kind of operator → nodes; null where the runtime does not report it."""
    source: str = Field(validation_alias=AliasChoices("source", "told_by"))
    """Where the placement comes from, or why there is none."""
    device: str


class CorruptionRow(Row):
    """One subject on the 15 corruptions of ImageNet-C at severities 1–5."""

    n: Annotated[Count, Metric("images", "count")]
    """Images in each of the 75 cells."""
    top1: dict[str, tuple[Fraction, ...]]
    """Corruption → top-1 at severity 1, 2, 3, 4, 5."""
    robust_accuracy: Annotated[Fraction, Metric(
        "robust accuracy", "%", HIGHER, "unweighted mean top-1 over 15 corruptions at 5 severities",
        source="Hendrycks & Dietterich 2019", missing="the corruptions were not measured (--suites "
            "corruptions)")]  # fmt: skip
    mce: Annotated[Time | None, Metric(
        "mCE", "%", LOWER, "mean over corruptions of the error averaged over severities divided by that of a reference",
        source="Hendrycks & Dietterich 2019",
        missing="no denominators: neither 1,000 classes nor a teacher that errs on each corruption")]  # fmt: skip
    mce_denominators: str | None
    """Whose errors the denominators are."""


class CueConflictRow(Row):
    """Shape against texture on images whose shape and texture are of different classes."""

    suite: str
    n: Annotated[Count, Metric("images", "count")]
    shape: Annotated[
        Fraction, Metric("shape", "%", formula="share of images classified by shape", gate=False)
    ]
    texture: Annotated[
        Fraction, Metric("texture", "%", formula="share classified by texture", gate=False)
    ]
    shape_bias: Annotated[Fraction | None, Metric(
        "shape bias", "%", HIGHER, "shape / (shape + texture); Wilson 95 % interval", source="Geirhos et al. 2019",
        interval="shape_bias_ci95", gate=False)]  # fmt: skip
    shape_bias_ci95: Interval | None


class VocabularyRow(Row):
    """One subject with other prompts or added class names; numbers are null where its classes are fixed."""

    suite: str
    base: str
    """The suite with the same images and the run's own prompts."""
    n: Annotated[Count, Metric("images", "count")]
    added: Annotated[Count, Metric("names added", "count")]
    """Class names that no image has."""
    top1: Annotated[Fraction | None, Metric("top-1", "%", HIGHER, interval="top1_ci95", gate=False)]
    top1_ci95: Interval | None
    base_top1: Annotated[Fraction | None, Metric(
        "own prompts", "%", HIGHER, "top-1 on the same images with the run's own prompts", gate=False)]  # fmt: skip
    to_added: Annotated[Fraction | None, Metric(
        "to added names", "%", LOWER, "share of images classified as an added name", gate=False)]  # fmt: skip
    reason: str | None
    """Why it cannot be measured."""


class AurocCost(Frozen):
    """AUROC of the torch student minus that of the file, on the same images; positive is a loss."""

    value: float
    ci95: Interval
    """Paired bootstrap: known and unknown images drawn separately, the same for both models."""


class DetectionRow(Frozen):
    """Detection of unknown images by one score per image."""

    auroc: Annotated[Fraction, Metric(
        "AUROC", "%", HIGHER, "probability that a known image scores higher than an unknown one, ties counting one "
                              "half; 50 % is "
        "chance; interval: bootstrap, 2,000 draws", source="Hanley & McNeil 1982", interval="auroc_ci95")]  # fmt: skip
    auroc_ci95: Interval
    auroc_cost: Annotated[AurocCost | None, Metric(
        "AUROC loss", "points", LOWER, "AUROC of the torch student minus that of the file on the same images; "
                                       "positive is a loss",
        missing="the torch student was not measured", gate=False)]  # fmt: skip
    fpr95: Annotated[Fraction, Metric(
        "FPR95", "%", LOWER, "share of unknown images above the highest threshold that at least 95 % of the known "
                             "ones pass",
        source="Yang et al. 2022")]  # fmt: skip
    aupr_out: Annotated[Fraction, Metric(
        "AUPR-out", "%", HIGHER, "average precision with the unknown images positive; chance is their share",
        source="Hendrycks et al. 2021")]  # fmt: skip
    aupr_in: Annotated[
        Fraction, Metric("AUPR-in", "%", HIGHER, "average precision with the known images positive")
    ]


class UnknownRow(Row):
    """One subject on images of none of its classes, against in-domain test images."""

    suite: str
    inside: str
    """The suite of known images."""
    n: Annotated[Count, Metric("images", "count")]
    n_inside: Count
    confidence: Annotated[Fraction, Metric(
        "confidence", "%", LOWER, "mean largest softmax probability on the unknown images, where every prediction "
                                  "is wrong")]  # fmt: skip
    confidence_inside: Annotated[Fraction, Metric("confidence, known", "%", gate=False)]
    msp: DetectionRow
    """By the largest softmax probability (Hendrycks & Gimpel 2017)."""
    mls: DetectionRow
    """By the largest logit (Hendrycks et al. 2022)."""
    device: str = HERE


class OwnMetricsRow(Row):
    """One subject by the metrics that a data set defines for itself."""

    suite: str
    source: str = Field(validation_alias=AliasChoices("source", "told_by"))
    """Package that computes them."""
    metrics: dict[str, float]


class SummaryRow(Row):
    """One subject in a line; null where a suite, a teacher or a torch student is missing."""

    kind: Kind
    precision: str
    same_as: str | None
    """Run under which this very model is already listed (a teacher that several runs share)."""
    preprocess: str
    size_mb: Annotated[Time | None, Metric(
        "size", "MB", LOWER, "size of the file's folder without its manifest, in 10⁶ bytes", missing="its files are "
            "not here")]  # fmt: skip
    parameters: Annotated[Count | None, Metric(
        "parameters", "M", LOWER, "millions of elements of weights and biases, counted in the file's own ONNX "
                                  "graph; of a "
        "teacher those of its image encoder", missing=_NO_COUNT)] = None  # fmt: skip
    macs: Annotated[Count | None, Metric(
        "MACs", "M", LOWER, "millions of multiply-accumulates of convolutions and matrix products for one image",
        missing=_NO_COUNT)] = None  # fmt: skip
    id: Annotated[Fraction | None, Metric("ID", "%", HIGHER, "top-1 on held-out images of the training domains",
                                          missing=_NO_ID)]  # fmt: skip
    ood: dict[str, Fraction]
    """Domain → top-1 on its `ood:` suite."""
    ood_avg: Annotated[Fraction | None, Metric(
        "OOD avg", "%", HIGHER, "unweighted mean of top-1 over the unseen domains (`ood:` "
                                "suites)", missing=_NO_OOD)]  # fmt: skip
    ood_worst: Annotated[Fraction | None, Metric("OOD worst", "%", HIGHER, "lowest top-1 of an unseen domain",
                                                 missing=_NO_OOD)]  # fmt: skip
    ood_worst_domain: str | None
    apart: dict[str, Fraction] = {}
    """Top-1 on the suites `test:`, `seen:` and `adapted:`, which enter no other mean."""
    adapted_avg: Annotated[Fraction | None, Metric(
        "adapted", "%", HIGHER, "unweighted mean of top-1 over the domains whose unlabelled images took part in "
                                "training "
        "(`adapted:` suites)", missing="no domain with unlabelled training images was measured")] = None  # fmt: skip
    gap: Annotated[
        float | None, Metric("gap", "points", LOWER, "ID minus OOD avg", missing=_NO_OOD)
    ]
    clean_gap: dict[str, float]
    """Subset suite → top-1 on the ID images of the same classes minus top-1 on the suite."""
    retention: Annotated[Time | None, Metric(
        "retention", "%", HIGHER, "OOD avg divided by the zero-shot OOD avg of the run's teacher",
        missing="no unseen domain or no teacher was measured")]  # fmt: skip
    temperature: Annotated[float | None, Metric(
        "temperature", "", "", "divisor of the logits with the smallest NLL on ID validation images, 0.05–20",
        source="Guo et al. 2017", missing=_NO_VAL, gate=True)]  # fmt: skip
    ece_id: Annotated[Fraction | None, Metric("ECE ID", "", LOWER, "ECE in domain", missing=_NO_ID)]
    ece_id_scaled: Annotated[Fraction | None, Metric("ECE ID scaled", "", LOWER, "ECE ID after temperature scaling",
                                                     missing=_NO_VAL)]  # fmt: skip
    ece_ood: Annotated[Fraction | None, Metric("ECE OOD", "", LOWER, "unweighted mean of ECE over the unseen domains",
                                               missing=_NO_OOD)]  # fmt: skip
    ece_ood_scaled: Annotated[Fraction | None, Metric("ECE OOD scaled", "", LOWER, "ECE OOD after temperature scaling",
                                                      missing=_NO_VAL)]  # fmt: skip
    agreement_id: Annotated[Fraction | None, Metric("agreement ID", "%", HIGHER, "agreement with the torch student "
        "in domain",
                                                    missing=_NO_TORCH)]  # fmt: skip
    agreement_ood: Annotated[Fraction | None, Metric(
        "agreement OOD", "%", HIGHER, "mean agreement with the torch student over the unseen "
                                      "domains", missing=_NO_TORCH)]  # fmt: skip
    quant_cost_id: Annotated[Difference | None, Metric(
        "export cost ID", "points", LOWER, "top-1 of the torch student minus that of the file on the same images; "
            "positive is a "
        "loss; interval: paired bootstrap, 10,000 draws of images within each suite", gate=False)]  # fmt: skip
    quant_cost_ood: Annotated[Difference | None, Metric(
        "export cost OOD", "points", LOWER, "the same over the unseen domains", gate=False)]  # fmt: skip
