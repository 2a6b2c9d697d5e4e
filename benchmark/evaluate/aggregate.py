"""Accuracy and summary rows from logits and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from edgekd.benchmark.evaluate import metrics
from edgekd.benchmark.evaluate.statistics import wilson_interval
from edgekd.benchmark.report.metric import metrics_of
from edgekd.benchmark.report.rows import AccuracyRow, Calibration, Difference, SuiteRow, SummaryRow
from edgekd.benchmark.subjects import Subject, Suite

OOD = "ood:"
APART = ("test:", "seen:", "adapted:")
"""Suites that enter no mean and stand beside the others by their full names."""
Logits = NDArray[np.float32]


def suite_row(suite: Suite) -> SuiteRow:
    """Return the images of a suite and what a reader must know about them."""
    return SuiteRow(
        suite=suite.name,
        run=suite.run,
        family=suite.kind,
        data=suite.images.name,
        n=len(suite.indices),
        classes=len(suite.images.classes),
        domains=tuple(suite.images.domains[d] for d in np.unique(suite.domain_of)),
        remarks=suite.remarks,
        excluded=dict(suite.excluded),
    )


def computed(row: type[BaseModel], logits: Logits, labels: NDArray[np.int64]) -> dict[str, Any]:
    """Return every metric of a row class that is computed from logits and labels."""
    return {
        key: metric.compute(logits, labels)
        for key, metric in metrics_of(row).items()
        if metric.compute
    }


def accuracy_row(
    subject: Subject,
    suite: Suite,
    logits: Logits,
    torch_logits: Logits | None,
    temperature: float | None,
) -> AccuracyRow:
    """Return all accuracy numbers of one subject on one suite.

    Args:
        torch_logits: the torch student's on the same images.
        temperature: the subject's, fitted on ID validation.
    """
    labels, domain_of = suite.labels, suite.domain_of
    worst, worst_recall = metrics.worst_class(logits, labels)
    correct = metrics.correct(logits, labels)
    by_domain = {int(d): float(correct[domain_of == d].mean()) for d in np.unique(domain_of)}
    lowest = min(by_domain, key=lambda d: by_domain[d]) if len(by_domain) > 1 else None
    scaled = None
    if temperature is not None:
        scaled = Calibration(**computed(Calibration, logits / np.float32(temperature), labels))
    return AccuracyRow(
        run=subject.run,
        subject=subject.name,
        suite=suite.name,
        n=len(labels),
        classes=logits.shape[1],
        **computed(AccuracyRow, logits, labels),
        top1_ci95=wilson_interval(int(correct.sum()), len(labels)),
        worst_class=suite.images.classes[worst],
        worst_class_recall=worst_recall,
        worst_domain=None if lowest is None else suite.images.domains[lowest],
        worst_domain_top1=None if lowest is None else by_domain[lowest],
        scaled=scaled,
        agreement=None if torch_logits is None else metrics.agreement(logits, torch_logits),
        device=subject.device,
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
    """Return one subject's accuracy rows in a line.

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
    apart = {row.suite: row.top1 for row in rows if row.suite.startswith(APART)}
    ood_avg = _mean(ood.values())
    worst = min(ood, key=lambda domain: ood[domain]) if ood else None
    scaled = inside.scaled if inside else None
    return SummaryRow(
        run=subject.run,
        subject=subject.name,
        kind=subject.kind,
        precision=subject.precision,
        same_as=same_as,
        preprocess=subject.preprocess.hash,
        size_mb=None if subject.folder is None else _size_mb(subject.folder),
        parameters=subject.counted.parameters if subject.counted else None,
        macs=subject.counted.macs if subject.counted else None,
        id=inside.top1 if inside else None,
        ood=ood,
        ood_avg=ood_avg,
        ood_worst=ood[worst] if worst else None,
        ood_worst_domain=worst,
        apart=apart,
        adapted_avg=_mean(v for suite, v in apart.items() if suite.startswith("adapted:")),
        gap=inside.top1 - ood_avg if inside and ood_avg is not None else None,
        clean_gap={
            domain: of[f"clean:{domain}"].top1 - top1
            for domain, top1 in ood.items()
            if f"clean:{domain}" in of
        },
        retention=ood_avg / teacher_ood_avg if ood_avg is not None and teacher_ood_avg else None,
        temperature=temperature,
        ece_id=inside.ece if inside else None,
        ece_id_scaled=scaled.ece if scaled else None,
        ece_ood=_mean(row.ece for row in outside.values()),
        ece_ood_scaled=_mean(row.scaled.ece for row in outside.values() if row.scaled),
        agreement_id=inside.agreement if inside else None,
        agreement_ood=_mean(row.agreement for row in outside.values() if row.agreement is not None),
        quant_cost_id=costs.get("id"),
        quant_cost_ood=costs.get("ood"),
    )


def _mean(values: Any) -> float | None:
    found = list(values)
    return float(np.mean(found)) if found else None


def _size_mb(folder: Path) -> float:
    """Return the size of an artifact's files without its manifest, in 10^6 bytes."""
    names = ("artifact.json", "labels.txt", "parity.npz")
    return (
        sum(p.stat().st_size for p in folder.iterdir() if p.is_file() and p.name not in names) / 1e6
    )
