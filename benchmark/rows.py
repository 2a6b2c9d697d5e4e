"""What a report is made of: one row per subject and suite, one per subject's latency, and one summary per subject.

Field by field in docs/report.md; the JSON form is checked against report.schema.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from edgekd.benchmark.findings import (
    HERE,
    Comparison,
    CorruptionRow,
    CueConflictRow,
    EnergyRow,
    Frozen,
    GateRow,
    OwnMetricsRow,
    PlacementRow,
    Scaled,
    SpeedRow,
    SuiteRow,
    ThroughputRow,
    UnknownRow,
    VocabularyRow,
)
from edgekd.benchmark.measure.intervals import Interval
from edgekd.benchmark.subjects import Kind

SCHEMA_VERSION = 2


class AccuracyRow(Frozen):
    """One subject on one suite. Fractions are 0–1."""

    run: str
    subject: str
    suite: str
    n: int
    classes: int
    top1: float
    top1_ci95: Interval
    macro: float
    worst_class: str
    worst_class_recall: float
    worst_domain: str | None
    """Domain of the suite with the lowest top-1; None where the suite has only one."""
    worst_domain_top1: float | None
    ece: float
    adaptive_ece: float
    nll: float
    brier: float
    scaled: Scaled | None
    """Calibration after temperature scaling; None without ID validation images."""
    agreement: float | None
    """Top-1 agreement with the torch student of the run."""
    device: str = HERE
    """Where it answered."""


class LatencyRow(Frozen):
    """One subject's time for one image."""

    run: str
    subject: str
    provider: str
    threads: int | None
    protocol: str
    quick: bool
    batch: int
    buffers: int
    p50_ms: float
    p50_ci95_ms: Interval
    p90_ms: float
    p90_ci95_ms: Interval
    p99_ms: float | None
    mean_ms: float
    cv: float
    n: int
    seconds: float
    first_ms: float | None
    load_ms: float | None
    prepare_p50_ms: float
    processes: int
    p50_per_process_ms: tuple[float, ...]
    warmup_runs: tuple[int, ...]
    settled: bool
    complete: bool
    device: str = HERE
    end_to_end_p50_ms: float | None = None
    """From the encoded image to the logits, one clock; None where it was not measured."""
    end_to_end_p90_ms: float | None = None
    peak_rss_mb: float | None = None
    energy: EnergyRow | None = None
    """None without a declared sensor."""
    other_cpu: float | None = None
    """Share 0–1 of all cores' time that other processes took while the clock ran, mean over the processes; None where
    the system does not tell."""
    stolen_cpu: float | None = None
    """The same of time that a hypervisor gave to other machines."""


class Difference(Frozen):
    """Accuracy of the torch student minus that of the artifact, on the same images; positive is a loss."""

    value: float
    ci95: Interval
    mcnemar_p: float


class SummaryRow(Frozen):
    """One subject in a line; None where a suite, a teacher or a torch student is missing."""

    run: str
    subject: str
    kind: Kind
    precision: str
    same_as: str | None
    """Run under which this very model is already listed (a teacher that several runs share)."""
    preprocess: str
    size_mb: float | None
    parameters: int | None = None
    """Elements of weights and biases; of a teacher, of its image tower."""
    macs: int | None = None
    """Multiply-accumulates of one answer; None where the graph cannot be counted."""
    id: float | None
    apart: dict[str, float] = Field(default_factory=dict)
    """Top-1 on the suites `test:`, `seen:` and `adapted:`, which enter no mean."""
    ood: dict[str, float]
    ood_avg: float | None
    ood_worst: float | None
    ood_worst_domain: str | None
    gap: float | None
    clean_gap: dict[str, float]
    """For each subset suite: top-1 on the ID images of the same classes minus top-1 on the suite."""
    retention: float | None
    temperature: float | None
    """Fitted on ID validation; None without such images."""
    ece_id: float | None
    ece_id_scaled: float | None
    ece_ood: float | None
    ece_ood_scaled: float | None
    agreement_id: float | None
    agreement_ood: float | None
    quant_cost_id: Difference | None
    quant_cost_ood: Difference | None


class Report(Frozen):
    """`report.json`."""

    folder: Path = Field(default=Path(), exclude=True)
    """Where the report lies; not part of the file."""
    schema_version: int = SCHEMA_VERSION
    created: str
    quick: bool
    notes: tuple[str, ...]
    gates: tuple[GateRow, ...] = ()
    suites: tuple[SuiteRow, ...]
    summary: tuple[SummaryRow, ...]
    accuracy: tuple[AccuracyRow, ...]
    latency: tuple[LatencyRow, ...]
    throughput: tuple[ThroughputRow, ...] = ()
    corruptions: tuple[CorruptionRow, ...] = ()
    cue_conflicts: tuple[CueConflictRow, ...] = ()
    vocabularies: tuple[VocabularyRow, ...] = ()
    unknowns: tuple[UnknownRow, ...] = ()
    own_metrics: tuple[OwnMetricsRow, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    speed: tuple[SpeedRow, ...] = ()
    placements: tuple[PlacementRow, ...] = ()
    protocol: dict[str, Any]
    context: dict[str, Any]
    environment: dict[str, Any]
