"""The rows of a report that follow from logits, whether these are fresh or were stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from edgekd.benchmark.compare import difference
from edgekd.benchmark.evaluate import metrics
from edgekd.benchmark.evaluate.statistics import wilson_interval
from edgekd.benchmark.results.metric import metrics_of
from edgekd.benchmark.results.rows import (
    AccuracyRow,
    AurocCost,
    Calibration,
    CorruptionRow,
    CueConflictRow,
    DetectionRow,
    Difference,
    OwnMetricsRow,
    SuiteRow,
    SummaryRow,
    UnknownRow,
    VocabularyRow,
)
from edgekd.benchmark.subjects import Logits, Subject, Suite
from edgekd.targets.timing.intervals import interval_of

_APART = ("test:", "seen:", "adapted:")
"""Suites that enter no mean and stand beside the others by their full names."""
_IMAGENET_CLASSES = 1000
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}  # fmt: skip
"""AlexNet's mean top-1 error over the severities on ImageNet-C, as published with it: the usual denominators of mCE."""
FIXED = {
    "artifact": "classes are in the file",
    "torch": "classes are in its weights",
    "teacher": "it embeds no text",
}
"""Why a subject has no prompt variants."""


def score(subjects: Sequence[Subject], suites: Sequence[Suite], logits: Logits) -> dict[str, Any]:
    """Return the fields of a `Report` that follow from logits: accuracy, summary and the tables of special suites.

    Suites of the family `val` give each subject its temperature and no row of their own. On those of `unknown` no
    class is right, so they have no accuracy.
    """
    torch_of = {subject.run: subject for subject in subjects if subject.kind == "torch"}
    temperatures = {one.who: _temperature(one, suites, logits) for one in subjects}
    accuracy: dict[tuple[str, str], list[AccuracyRow]] = {}
    for subject in subjects:
        reference = torch_of.get(subject.run) if subject.kind != "torch" else None
        accuracy[subject.who] = [
            accuracy_row(
                subject,
                suite,
                logits[subject.key, number],
                logits[reference.key, number] if reference and suite.holds(reference) else None,
                temperatures[subject.who],
            )
            for number, suite in enumerate(suites)
            if suite.holds(subject) and suite.kind not in ("val", "unknown")
        ]
    summary, first_run = [], dict[tuple[Any, ...], str]()
    teacher_ood = {
        one.run: _mean(row.top1 for row in accuracy[one.who] if row.suite.startswith("ood:"))
        for one in subjects
        if one.kind == "teacher"
    }
    for subject in subjects:
        # A teacher of two runs is one row only where both are measured on the same images.
        measured_on = [number for number, suite in enumerate(suites) if suite.holds(subject)]
        first = first_run.setdefault((subject.key, *measured_on), subject.run)
        row = summary_row(subject, accuracy[subject.who], teacher_ood.get(subject.run))
        reference = torch_of.get(subject.run) if subject.kind == "artifact" else None
        more = {
            "same_as": first if first != subject.run else None,
            "temperature": temperatures[subject.who],
            "quant_cost_id": _cost("id", subject, reference, suites, logits),
            "quant_cost_ood": _cost("ood", subject, reference, suites, logits),
        }
        summary.append(row.model_copy(update=more))
    return {
        "accuracy": tuple(row for rows in accuracy.values() for row in rows),
        "summary": tuple(summary),
        "corruptions": tuple(_corruption_rows(subjects, accuracy)),
        "cue_conflicts": tuple(_cue_rows(subjects, suites, logits)),
        "vocabularies": tuple(_vocabulary_rows(subjects, suites, logits)),
        "unknowns": tuple(_unknown_rows(subjects, suites, logits)),
        "own_metrics": tuple(_own_metrics(subjects, suites, logits)),
    }


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


def computed(
    row: type[BaseModel], logits: NDArray[np.float32], labels: NDArray[np.int64]
) -> dict[str, Any]:
    """Return every metric of a row class that is computed from logits and labels."""
    found = metrics_of(row).items()
    return {key: metric.compute(logits, labels) for key, metric in found if metric.compute}


def accuracy_row(
    subject: Subject,
    suite: Suite,
    logits: NDArray[np.float32],
    torch_logits: NDArray[np.float32] | None,
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
    subject: Subject, rows: Sequence[AccuracyRow], teacher_ood: float | None
) -> SummaryRow:
    """Return one subject's accuracy rows in a line; `teacher_ood` is the mean OOD accuracy of the run's teacher."""
    of = {row.suite: row for row in rows}
    inside = of.get("id")
    outside = {row.suite.removeprefix("ood:"): row for row in rows if row.suite.startswith("ood:")}
    ood = {domain: row.top1 for domain, row in outside.items()}
    apart = {row.suite: row.top1 for row in rows if row.suite.startswith(_APART)}
    ood_avg = _mean(ood.values())
    worst = min(ood, key=lambda domain: ood[domain]) if ood else None
    clean = {domain: of.get(f"clean:{domain}") for domain in ood}
    return SummaryRow(
        run=subject.run,
        subject=subject.name,
        kind=subject.kind,
        precision=subject.precision,
        same_as=None,
        preprocess=subject.preprocess.hash,
        size_mb=None if subject.folder is None else size_of(subject.folder),
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
        clean_gap={domain: row.top1 - ood[domain] for domain, row in clean.items() if row},
        retention=ood_avg / teacher_ood if ood_avg is not None and teacher_ood else None,
        temperature=None,
        ece_id=inside.ece if inside else None,
        ece_id_scaled=inside.scaled.ece if inside and inside.scaled else None,
        ece_ood=_mean(row.ece for row in outside.values()),
        ece_ood_scaled=_mean(row.scaled.ece for row in outside.values() if row.scaled),
        agreement_id=inside.agreement if inside else None,
        agreement_ood=_mean(row.agreement for row in outside.values() if row.agreement is not None),
        quant_cost_id=None,
        quant_cost_ood=None,
    )


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return float(np.mean(found)) if found else None


def size_of(folder: Path) -> float:
    """Return the size of an artifact's files without its manifest, in 10^6 bytes."""
    beside = ("artifact.json", "labels.txt", "parity.npz")
    files = (path for path in folder.iterdir() if path.is_file() and path.name not in beside)
    return sum(path.stat().st_size for path in files) / 1e6


def _temperature(subject: Subject, suites: Sequence[Suite], logits: Logits) -> float | None:
    """Fit the subject's temperature on its ID validation images; None without any."""
    for number, suite in enumerate(suites):
        if suite.kind == "val" and suite.holds(subject):
            return metrics.fit_temperature(logits[subject.key, number], suite.labels)
    return None


def _cost(
    where: str, subject: Subject, reference: Subject | None, suites: Sequence[Suite], logits: Logits
) -> Difference | None:
    """Return accuracy of the torch student minus that of the file, over the suites `id` or `ood:…`."""
    pairs = [
        tuple(
            metrics.correct(logits[one.key, number], suite.labels) for one in (reference, subject)
        )
        for number, suite in enumerate(suites)
        if reference and suite.holds(subject) and suite.name.partition(":")[0] == where
    ]
    return difference(pairs) if pairs else None  # type: ignore[arg-type]


def _corruption_rows(
    subjects: Sequence[Subject], accuracy: Mapping[tuple[str, str], Sequence[AccuracyRow]]
) -> Iterator[CorruptionRow]:
    """Yield one row per subject that was measured on the corruptions.

    The denominators of mCE are AlexNet's on ImageNet's 1,000 classes, and the teacher's of the same run on other data,
    where AlexNet's would mean nothing.
    """
    tables: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {}
    last: dict[tuple[str, str], AccuracyRow] = {}
    for who, rows in accuracy.items():
        for row in (row for row in rows if row.suite.startswith("corruption:")):
            table = tables.setdefault(who, {})
            name = row.suite.split(":")[1]
            table[name] = (*table.get(name, ()), row.top1)
            last[who] = row
    teacher_of = {one.run: tables.get(one.who) for one in subjects if one.kind == "teacher"}
    for (run, name), table in tables.items():
        denominators, whose = None, None
        if last[run, name].classes == _IMAGENET_CLASSES:
            denominators = ALEXNET_ERRORS
            whose = "AlexNet on ImageNet-C, as published by Hendrycks & Dietterich 2019"
        elif teacher := teacher_of.get(run):
            errors = {kind: 1 - float(np.mean(cells)) for kind, cells in teacher.items()}
            if min(errors.values()) > 0:
                denominators = errors
                whose = "the run's teacher, zero-shot, on the same images"
        yield CorruptionRow(
            run=run,
            subject=name,
            n=last[run, name].n,
            top1=table,
            robust_accuracy=float(np.mean(list(table.values()))),
            mce=None if denominators is None else mean_corruption_error(table, denominators),
            mce_denominators=whose,
        )


def mean_corruption_error(
    top1: Mapping[str, tuple[float, ...]], denominators: Mapping[str, float]
) -> float:
    """Return the mean over corruptions of (mean error over severities / denominator); papers show it times 100."""
    ratios = [(1 - np.mean(cells)) / denominators[name] for name, cells in top1.items()]
    return float(np.mean(ratios))


def _cue_rows(
    subjects: Sequence[Subject], suites: Sequence[Suite], logits: Logits
) -> Iterator[CueConflictRow]:
    for number, suite in enumerate(suites):
        for subject in subjects:
            if suite.texture is None or not suite.holds(subject):
                continue
            predicted = logits[subject.key, number].argmax(axis=1)
            shape, texture = (int((predicted == c).sum()) for c in (suite.labels, suite.texture))
            decided = shape + texture
            yield CueConflictRow(
                run=subject.run,
                subject=subject.name,
                suite=suite.name,
                n=len(predicted),
                shape=shape / len(predicted),
                texture=texture / len(predicted),
                shape_bias=shape / decided if decided else None,
                shape_bias_ci95=wilson_interval(shape, decided) if decided else None,
            )


def _base(suite: Suite, suites: Sequence[Suite]) -> int:
    """Return the position of the suite that this one is compared with."""
    wanted = suite.base, suite.run
    return next(n for n, other in enumerate(suites) if (other.name, other.run) == wanted)


def _vocabulary_rows(
    subjects: Sequence[Subject], suites: Sequence[Suite], logits: Logits
) -> Iterator[VocabularyRow]:
    for number, suite in enumerate(suites):
        if suite.variant is None or suite.base is None:
            continue
        base = _base(suite, suites)
        own = len(suites[base].images.classes)
        for subject in (one for one in subjects if suite.concerns(one)):
            found: dict[str, Any] = {
                "top1": None, "top1_ci95": None, "base_top1": None, "to_added": None, "reason": FIXED[subject.kind],
            }  # fmt: skip
            if suite.holds(subject):
                predicted = logits[subject.key, number].argmax(axis=1)
                hits = int((predicted == suite.labels).sum())
                found = {
                    "top1": hits / len(predicted),
                    "top1_ci95": wilson_interval(hits, len(predicted)),
                    "base_top1": metrics.top1(logits[subject.key, base], suites[base].labels),
                    "to_added": float((predicted >= own).mean()),
                    "reason": None,
                }
            yield VocabularyRow(
                run=subject.run,
                subject=subject.name,
                suite=suite.name,
                base=suite.base,
                n=len(suite.indices),
                added=len(suite.images.classes) - own,
                **found,
            )


def _unknown_rows(
    subjects: Sequence[Subject], suites: Sequence[Suite], logits: Logits
) -> Iterator[UnknownRow]:
    """Yield one row for each subject and suite of unknown images, compared with the in-domain suite that it names.

    Both scores are of the logits as they are returned, over the classes of that in-domain suite.
    """
    torch_of = {subject.run: subject for subject in subjects if subject.kind == "torch"}
    for number, suite in enumerate(suites):
        if suite.kind != "unknown":
            continue
        inside = _base(suite, suites)
        for subject in (one for one in subjects if suite.holds(one)):
            known, unknown = logits[subject.key, inside], logits[subject.key, number]
            reference = torch_of.get(subject.run) if subject.kind == "artifact" else None
            before = None
            if reference is not None:
                before = logits[reference.key, inside], logits[reference.key, number]
            yield UnknownRow(
                run=subject.run,
                subject=subject.name,
                suite=suite.name,
                inside=suites[inside].name,
                n=len(unknown),
                n_inside=len(known),
                confidence=float(metrics.confidence(unknown).mean()),
                confidence_inside=float(metrics.confidence(known).mean()),
                msp=_detection(metrics.confidence, (known, unknown), before),
                mls=_detection(
                    lambda x: x.max(axis=1).astype(np.float64), (known, unknown), before
                ),
                device=subject.device,
            )


def _detection(score_of: Any, own: tuple[Any, Any], before: tuple[Any, Any] | None) -> DetectionRow:
    """Return how well a score detects unknown images; `own` and `before` are (known, unknown) logits of both models."""
    known, unknown = score_of(own[0]), score_of(own[1])  # [N], [M]
    draws = metrics.auroc_draws(known, unknown)
    value = metrics.auroc(known, unknown)
    cost = None
    if before is not None:
        first, second = score_of(before[0]), score_of(before[1])
        cost = AurocCost(
            value=metrics.auroc(first, second) - value,
            ci95=interval_of(metrics.auroc_draws(first, second) - draws),
        )
    return DetectionRow(
        auroc=value,
        auroc_ci95=interval_of(draws),
        aupr_out=metrics.average_precision(-unknown, -known),
        aupr_in=metrics.average_precision(known, unknown),
        fpr95=metrics.fpr_at_95(known, unknown),
        auroc_cost=cost,
    )


def _own_metrics(
    subjects: Sequence[Subject], suites: Sequence[Suite], logits: Logits
) -> Iterator[OwnMetricsRow]:
    for number, suite in enumerate(suites):
        for subject in subjects:
            if suite.own_metrics is not None and suite.holds(subject):
                yield OwnMetricsRow(
                    run=subject.run,
                    subject=subject.name,
                    suite=suite.name,
                    source=suite.own_metrics_by,
                    metrics=suite.own_metrics(logits[subject.key, number].argmax(axis=1)),
                )
