"""The numbers of a report's rows, from logits and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.evaluate import metrics
from edgekd.benchmark.evaluate.statistics import mcnemar_p, paired_interval, wilson_interval
from edgekd.benchmark.findings import Scaled, SuiteRow
from edgekd.benchmark.rows import AccuracyRow, Difference, SummaryRow
from edgekd.benchmark.subjects import Subject, Suite

OOD = "ood:"
APART = ("test:", "seen:", "adapted:")
"""Suites that enter no mean and stand beside the others by their full names."""
Logits = NDArray[np.float32]


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
        excluded=dict(suite.excluded),
    )


def accuracy_row(
    subject: Subject,
    suite: Suite,
    logits: Logits,
    torch_logits: Logits | None,
    temperature: float | None,
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
        scaled=None
        if temperature is None
        else Scaled(**_calibration(logits / np.float32(temperature), labels)),
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


def difference(
    reference: Sequence[Logits], artifact: Sequence[Logits], suites: Sequence[Suite]
) -> Difference:
    """Accuracy of `reference` minus `artifact`: mean over suites, paired interval, McNemar over all."""
    pairs = [
        (metrics.correct(first, suite.labels), metrics.correct(second, suite.labels))
        for first, second, suite in zip(reference, artifact, suites, strict=True)
    ]
    return Difference(
        value=float(np.mean([first.mean() - second.mean() for first, second in pairs])),
        ci95=paired_interval(pairs),
        mcnemar_p=mcnemar_p(
            np.concatenate([first for first, _ in pairs]),
            np.concatenate([last for _, last in pairs]),
        ),
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
        apart={row.suite: row.top1 for row in rows if row.suite.startswith(APART)},
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
