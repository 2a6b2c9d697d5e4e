"""The numbers of a report: one row per subject and suite, one per subject's latency, and one summary per subject.

Field by field in docs/report.md; the JSON form is checked against report.schema.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from edgekd.benchmark import metrics
from edgekd.benchmark.accuracy import HERE, Kind, Subject, Suite
from edgekd.benchmark.findings import (
    Comparison,
    CorruptionRow,
    CueConflictRow,
    EnergyRow,
    Frozen,
    GateRow,
    OwnMetricsRow,
    PlacementRow,
    Scaled,
    SuiteRow,
    ThroughputRow,
    VocabularyRow,
)
from edgekd.benchmark.stats import Interval, mcnemar_p, paired_interval, wilson_interval
from edgekd.benchmark.throttling import throttle_remarks

SCHEMA_VERSION = 2
OOD = "ood:"
Logits = NDArray[np.float32]


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
    own_metrics: tuple[OwnMetricsRow, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    placements: tuple[PlacementRow, ...] = ()
    protocol: dict[str, Any]
    context: dict[str, Any]
    environment: dict[str, Any]


def suite_row(suite: Suite) -> SuiteRow:
    """What a reader must know about one suite."""
    domains = np.unique(suite.domain_of)
    return SuiteRow(
        suite=suite.name,
        run=suite.run,
        family=suite.kind,
        data=suite.images.name,
        n=len(suite.indices),
        classes=len(suite.images.classes),
        domains=tuple(suite.images.domains[d] for d in domains),
        remarks=suite.remarks,
    )


def accuracy_row(
    subject: Subject, suite: Suite, logits: Logits, torch_logits: Logits | None, temperature: float | None
) -> AccuracyRow:
    """All accuracy numbers of one subject on one suite.

    Args:
        torch_logits: the torch student's on the same images.
        temperature: the subject's, fitted on ID validation.
    """
    labels, domain_of = suite.labels, suite.domain_of
    worst, worst_recall = metrics.worst_class(logits, labels)
    right = metrics.correct(logits, labels)
    hits = int(right.sum())
    by_domain = {int(d): float(right[domain_of == d].mean()) for d in np.unique(domain_of)}
    lowest = min(by_domain, key=lambda d: by_domain[d]) if len(by_domain) > 1 else None
    return AccuracyRow(
        run=subject.run,
        subject=subject.name,
        suite=suite.name,
        n=len(labels),
        classes=logits.shape[1],
        top1=hits / len(labels),
        top1_ci95=wilson_interval(hits, len(labels)),
        macro=metrics.macro(logits, labels),
        worst_class=suite.images.classes[worst],
        worst_class_recall=worst_recall,
        worst_domain=None if lowest is None else suite.images.domains[lowest],
        worst_domain_top1=None if lowest is None else by_domain[lowest],
        **_calibration(logits, labels),
        scaled=None if temperature is None else Scaled(**_calibration(logits / np.float32(temperature), labels)),
        agreement=None if torch_logits is None else metrics.agreement(logits, torch_logits),
        device=subject.device,
    )


def _calibration(logits: Logits, labels: NDArray[np.int64]) -> dict[str, float]:
    return {
        "ece": metrics.ece(logits, labels),
        "adaptive_ece": metrics.adaptive_ece(logits, labels),
        "nll": metrics.nll(logits, labels),
        "brier": metrics.brier(logits, labels),
    }


def difference(reference: Sequence[Logits], artifact: Sequence[Logits], suites: Sequence[Suite]) -> Difference:
    """Accuracy of `reference` minus `artifact`: mean over suites, paired interval, McNemar over all."""
    pairs = [
        (metrics.correct(first, suite.labels), metrics.correct(second, suite.labels))
        for first, second, suite in zip(reference, artifact, suites, strict=True)
    ]
    return Difference(
        value=float(np.mean([first.mean() - second.mean() for first, second in pairs])),
        ci95=paired_interval(pairs),
        mcnemar_p=mcnemar_p(np.concatenate([first for first, _ in pairs]), np.concatenate([last for _, last in pairs])),
    )


def summary_row(
    subject: Subject,
    rows: Sequence[AccuracyRow],
    *,
    teacher_ood_avg: float | None,
    same_as: str | None,
    temperature: float | None,
    costs: Mapping[str, Difference],
) -> SummaryRow:
    """One subject's accuracy rows in a line.

    Args:
        rows: of this subject only.
        teacher_ood_avg: the run's teacher zero-shot, None without a teacher.
        temperature: fitted on ID validation, None without such images.
        costs: `id` and `ood` → loss against the torch student; empty for others than artifacts.
    """
    of = {row.suite: row for row in rows}
    inside = of.get("id")
    outside = {row.suite.removeprefix(OOD): row for row in rows if row.suite.startswith(OOD)}
    ood = {domain: row.top1 for domain, row in outside.items()}
    ood_avg = float(np.mean(list(ood.values()))) if ood else None
    worst = min(ood, key=lambda domain: ood[domain]) if ood else None
    clean = {domain: of[f"clean:{domain}"].top1 for domain in outside if f"clean:{domain}" in of}
    scaled = [row.scaled.ece for row in outside.values() if row.scaled is not None]
    agreements = [row.agreement for row in outside.values() if row.agreement is not None]
    return SummaryRow(
        run=subject.run,
        subject=subject.name,
        kind=subject.kind,
        precision=subject.precision,
        same_as=same_as,
        preprocess=subject.preprocess.hash,
        size_mb=_size_mb(subject),
        parameters=subject.counted.parameters if subject.counted else None,
        macs=subject.counted.macs if subject.counted else None,
        id=inside.top1 if inside else None,
        ood=ood,
        ood_avg=ood_avg,
        ood_worst=ood[worst] if worst else None,
        ood_worst_domain=worst,
        gap=inside.top1 - ood_avg if inside and ood_avg is not None else None,
        clean_gap={domain: top1 - ood[domain] for domain, top1 in clean.items()},
        retention=ood_avg / teacher_ood_avg if ood_avg is not None and teacher_ood_avg else None,
        temperature=temperature,
        ece_id=inside.ece if inside else None,
        ece_id_scaled=inside.scaled.ece if inside and inside.scaled else None,
        ece_ood_scaled=float(np.mean(scaled)) if scaled else None,
        ece_ood=float(np.mean([row.ece for row in outside.values()])) if outside else None,
        agreement_id=inside.agreement if inside else None,
        agreement_ood=float(np.mean(agreements)) if agreements else None,
        quant_cost_id=costs.get("id"),
        quant_cost_ood=costs.get("ood"),
    )


def _size_mb(subject: Subject) -> float | None:
    """Size of the artifact's files without its manifest, in 10^6 bytes."""
    if subject.folder is None:
        return None
    return (
        sum(
            p.stat().st_size
            for p in subject.folder.iterdir()
            if p.is_file() and p.name not in ("artifact.json", "parity.npz")
        )
        / 1e6
    )


def remarks(report: Report) -> list[str]:
    """What a reader must not overlook: INT8 slower than FP32, an unsettled or short measurement, a busy machine."""
    said = []
    precision = {(row.run, row.subject): row.precision for row in report.summary if row.kind == "artifact"}
    exported = [row for row in report.latency if (row.run, row.subject) in precision]
    for slow in exported:
        for fast in exported:
            same = (slow.run, slow.provider, slow.device) == (fast.run, fast.provider, fast.device)
            kinds = precision[slow.run, slow.subject], precision[fast.run, fast.subject]
            if same and kinds == ("int8", "fp32") and slow.p50_ms > fast.p50_ms:
                overlap = slow.p50_ci95_ms[0] <= fast.p50_ci95_ms[1]
                word = "no faster" if overlap else "slower"
                said.append(
                    f"{slow.run}: {slow.subject} is {word} than {fast.subject} here (p50 "
                    f"{slow.p50_ms:.2f} against {fast.p50_ms:.2f} ms{', intervals overlap' if overlap else ''}): on "
                    "this processor INT8 saves space, not time."
                )
    for row in exported:
        if not row.settled:
            said.append(f"{row.run}: {row.subject} had not settled when its warm-up ended; its latency may drift.")
        if not row.complete:
            said.append(
                f"{row.run}: {row.subject} was stopped at its time limit with {row.n} runs, fewer than the rule."
            )
    said += throttle_remarks(report.environment)
    load, cores = report.environment["before"]["load_average"], report.environment["usable_cores"]
    if load is not None and load > 0.5 * cores:
        said.append(f"Load average {load:.2f} on {cores} cores before measuring: latencies may include other work.")
    return said
