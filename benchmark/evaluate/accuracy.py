"""The rows of a report that are computed from logits, new or stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from edgekd.benchmark.evaluate import metrics
from edgekd.benchmark.evaluate.statistics import difference, wilson_interval
from edgekd.benchmark.results import rows
from edgekd.benchmark.results.metric import metrics_of
from edgekd.benchmark.results.rows import AccuracyRow, Calibration, Difference, SummaryRow
from edgekd.benchmark.results.schema import SuiteRow
from edgekd.benchmark.subjects import Logits, Subject, Suite
from edgekd.targets.timing.intervals import interval_of

_APART = ("test:", "seen:", "adapted:")
"""Prefixes of suites that are not part of any mean and are listed by their full names."""
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

    Suites of the family `val` only determine the temperature of each subject. Suites of `unknown` have no accuracy,
    since no class is correct.
    """
    measured = _Measured(subjects, suites, logits)
    temperatures = {one.who: measured.temperature(one) for one in subjects}
    accuracy: dict[tuple[str, str], list[AccuracyRow]] = {one.who: [] for one in subjects}
    for subject in subjects:
        reference = measured.torch_of(subject) if subject.kind != "torch" else None
        for number, suite in enumerate(suites):
            if suite.holds(subject) and suite.kind not in ("val", "unknown"):
                before = (
                    logits[reference.key, number] if reference and suite.holds(reference) else None
                )
                row = accuracy_row(
                    subject, suite, logits[subject.key, number], before, temperatures[subject.who]
                )
                accuracy[subject.who].append(row)
    return {
        "accuracy": tuple(row for own in accuracy.values() for row in own),
        "summary": tuple(measured.summary(accuracy, temperatures)),
        "corruptions": tuple(_corruption_rows(subjects, accuracy)),
        "cue_conflicts": tuple(measured.cue_conflicts()),
        "vocabularies": tuple(measured.vocabularies()),
        "unknowns": tuple(measured.unknowns()),
        "own_metrics": tuple(measured.own_metrics()),
    }


def suite_row(suite: Suite) -> SuiteRow:
    """Return the images of a suite and remarks about them."""
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
    known = metrics_of(row).items()
    return {key: metric.compute(logits, labels) for key, metric in known if metric.compute}


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


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the known values; None without any."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def size_of(folder: Path) -> float:
    """Return the size of an artifact's files without its manifest, in 10^6 bytes."""
    beside = ("artifact.json", "labels.txt", "parity.npz")
    files = (path for path in folder.iterdir() if path.is_file() and path.name not in beside)
    return sum(path.stat().st_size for path in files) / 1e6


@dataclass(frozen=True, eq=False)
class _Measured:
    """Subjects, suites and their logits, and the rows that need all of them."""

    subjects: Sequence[Subject]
    suites: Sequence[Suite]
    logits: Logits

    def __iter__(self) -> Iterator[tuple[Subject, Suite, NDArray[np.float32]]]:
        """Yield every suite with each subject that was measured on it, and its logits."""
        for number, suite in enumerate(self.suites):
            for subject in self.subjects:
                if suite.holds(subject):
                    yield subject, suite, self.logits[subject.key, number]

    def torch_of(self, subject: Subject) -> Subject | None:
        """Return the torch student of the subject's run."""
        same = (one for one in self.subjects if (one.run, one.kind) == (subject.run, "torch"))
        return next(same, None)

    def temperature(self, subject: Subject) -> float | None:
        """Fit the subject's temperature on its ID validation images; None if there are none."""
        for number, suite in enumerate(self.suites):
            if suite.kind == "val" and suite.holds(subject):
                return metrics.fit_temperature(self.logits[subject.key, number], suite.labels)
        return None

    def base(self, suite: Suite) -> int:
        """Return the position of the suite that this one is compared with."""
        wanted = suite.base, suite.run
        return next(n for n, other in enumerate(self.suites) if (other.name, other.run) == wanted)

    def export_cost(self, subject: Subject, where: str) -> Difference | None:
        """Return accuracy of the torch student minus that of the file, over the suites `id` or `ood:…`."""
        reference = self.torch_of(subject) if subject.kind == "artifact" else None
        pairs = [
            (
                metrics.correct(self.logits[reference.key, number], suite.labels),
                metrics.correct(self.logits[subject.key, number], suite.labels),
            )
            for number, suite in enumerate(self.suites)
            if reference and suite.holds(subject) and suite.name.partition(":")[0] == where
        ]
        return difference(pairs) if pairs else None

    def summary(
        self,
        accuracy: Mapping[tuple[str, str], Sequence[AccuracyRow]],
        temperatures: Mapping[tuple[str, str], float | None],
    ) -> Iterator[SummaryRow]:
        """Yield each subject's accuracy rows in a line."""
        first_run: dict[tuple[Any, ...], str] = {}
        teacher_ood = {
            one.run: _mean(row.top1 for row in accuracy[one.who] if row.suite.startswith("ood:"))
            for one in self.subjects
            if one.kind == "teacher"
        }
        for subject in self.subjects:
            # A teacher of two runs is one row only where both are measured on the same images.
            measured_on = [number for number, one in enumerate(self.suites) if one.holds(subject)]
            first = first_run.setdefault((subject.key, *measured_on), subject.run)
            of = {row.suite: row for row in accuracy[subject.who]}
            inside, scaled = of.get("id"), of["id"].scaled if "id" in of else None
            outside = [row for name, row in of.items() if name.startswith("ood:")]
            ood = {row.suite.removeprefix("ood:"): row.top1 for row in outside}
            apart = {name: row.top1 for name, row in of.items() if name.startswith(_APART)}
            average, teacher = _mean(ood.values()), teacher_ood.get(subject.run)
            worst = min(ood, key=lambda domain: ood[domain]) if ood else None
            clean = {domain: of.get(f"clean:{domain}") for domain in ood}
            yield SummaryRow(
                run=subject.run,
                subject=subject.name,
                kind=subject.kind,
                precision=subject.precision,
                same_as=first if first != subject.run else None,
                preprocess=subject.preprocess.hash,
                size_mb=None if subject.folder is None else size_of(subject.folder),
                parameters=subject.counted.parameters if subject.counted else None,
                macs=subject.counted.macs if subject.counted else None,
                id=inside.top1 if inside else None,
                ood=ood,
                ood_avg=average,
                ood_worst=ood[worst] if worst else None,
                ood_worst_domain=worst,
                apart=apart,
                adapted_avg=_mean(v for name, v in apart.items() if name.startswith("adapted:")),
                gap=inside.top1 - average if inside and average is not None else None,
                clean_gap={domain: row.top1 - ood[domain] for domain, row in clean.items() if row},
                retention=average / teacher if average is not None and teacher else None,
                temperature=temperatures[subject.who],
                ece_id=inside.ece if inside else None,
                ece_id_scaled=scaled.ece if scaled else None,
                ece_ood=_mean(row.ece for row in outside),
                ece_ood_scaled=_mean(row.scaled.ece for row in outside if row.scaled),
                agreement_id=inside.agreement if inside else None,
                agreement_ood=_mean(row.agreement for row in outside),
                quant_cost_id=self.export_cost(subject, "id"),
                quant_cost_ood=self.export_cost(subject, "ood"),
            )

    def cue_conflicts(self) -> Iterator[rows.CueConflictRow]:
        for subject, suite, logits in self:
            if suite.texture is None:
                continue
            predicted = logits.argmax(axis=1)
            shape, texture = (int((predicted == c).sum()) for c in (suite.labels, suite.texture))
            decided = shape + texture
            yield rows.CueConflictRow(
                run=subject.run,
                subject=subject.name,
                suite=suite.name,
                n=len(predicted),
                shape=shape / len(predicted),
                texture=texture / len(predicted),
                shape_bias=shape / decided if decided else None,
                shape_bias_ci95=wilson_interval(shape, decided) if decided else None,
            )

    def vocabularies(self) -> Iterator[rows.VocabularyRow]:
        for number, suite in enumerate(self.suites):
            if suite.variant is None or suite.base is None:
                continue
            base = self.base(suite)
            own = len(self.suites[base].images.classes)
            for subject in (one for one in self.subjects if suite.concerns(one)):
                numbers: dict[str, Any] = dict.fromkeys(
                    ("top1", "top1_ci95", "base_top1", "to_added")
                )
                if suite.holds(subject):
                    predicted = self.logits[subject.key, number].argmax(axis=1)
                    hits = int((predicted == suite.labels).sum())
                    before = self.logits[subject.key, base]
                    numbers = {
                        "top1": hits / len(predicted),
                        "top1_ci95": wilson_interval(hits, len(predicted)),
                        "base_top1": metrics.top1(before, self.suites[base].labels),
                        "to_added": float((predicted >= own).mean()),
                    }
                yield rows.VocabularyRow(
                    run=subject.run,
                    subject=subject.name,
                    suite=suite.name,
                    base=suite.base,
                    n=len(suite.indices),
                    added=len(suite.images.classes) - own,
                    reason=None if suite.holds(subject) else FIXED[subject.kind],
                    **numbers,
                )

    def unknowns(self) -> Iterator[rows.UnknownRow]:
        """Yield one row for each subject and suite of unknown images, compared with the in-domain suite that it names.

        Both scores are of the logits as they are returned, over the classes of that in-domain suite.
        """
        for number, suite in enumerate(self.suites):
            if suite.kind != "unknown":
                continue
            inside = self.base(suite)
            for subject in (one for one in self.subjects if suite.holds(one)):
                known, unknown = (self.logits[subject.key, n] for n in (inside, number))
                reference = self.torch_of(subject) if subject.kind == "artifact" else None
                before = None
                if reference is not None:
                    before = self.logits[reference.key, inside], self.logits[reference.key, number]
                yield rows.UnknownRow(
                    run=subject.run,
                    subject=subject.name,
                    suite=suite.name,
                    inside=self.suites[inside].name,
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

    def own_metrics(self) -> Iterator[rows.OwnMetricsRow]:
        for subject, suite, logits in self:
            if suite.own_metrics is not None:
                yield rows.OwnMetricsRow(
                    run=subject.run,
                    subject=subject.name,
                    suite=suite.name,
                    source=suite.own_metrics_by,
                    metrics=suite.own_metrics(logits.argmax(axis=1)),
                )


def _corruption_rows(
    subjects: Sequence[Subject], accuracy: Mapping[tuple[str, str], Sequence[AccuracyRow]]
) -> Iterator[rows.CorruptionRow]:
    """Yield one row per subject that was measured on the corruptions.

    The denominators of mCE are AlexNet's errors for ImageNet's 1,000 classes, and the errors of the run's teacher for
    other data.
    """
    tables: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {}
    last: dict[tuple[str, str], AccuracyRow] = {}
    for who, own in accuracy.items():
        for row in (row for row in own if row.suite.startswith("corruption:")):
            table = tables.setdefault(who, {})
            name = row.suite.split(":")[1]
            table[name] = (*table.get(name, ()), row.top1)
            last[who] = row
    teacher_of = {one.run: tables.get(one.who) for one in subjects if one.kind == "teacher"}
    for (run, name), table in tables.items():
        denominators, whose = None, None
        if last[run, name].classes == 1000:  # ImageNet's
            denominators = ALEXNET_ERRORS
            whose = "AlexNet on ImageNet-C, as published by Hendrycks & Dietterich 2019"
        elif teacher := teacher_of.get(run):
            errors = {kind: 1 - float(np.mean(cells)) for kind, cells in teacher.items()}
            if min(errors.values()) > 0:
                denominators = errors
                whose = "the run's teacher, zero-shot, on the same images"
        yield rows.CorruptionRow(
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


def _detection(
    score_of: Callable[[NDArray[np.float32]], NDArray[np.float64]],
    own: tuple[NDArray[np.float32], ...],
    before: tuple[NDArray[np.float32], ...] | None,
) -> rows.DetectionRow:
    """Return the detection of unknown images by a score; `own` and `before` are (known, unknown) logits of both
    models."""
    known, unknown = map(score_of, own)  # [N], [M]
    draws, value = metrics.auroc_draws(known, unknown), metrics.auroc(known, unknown)
    cost = None
    if before is not None:
        first, second = map(score_of, before)
        interval = interval_of(metrics.auroc_draws(first, second) - draws)
        cost = rows.Change(value=metrics.auroc(first, second) - value, ci95=interval)
    return rows.DetectionRow(
        auroc=value,
        auroc_ci95=interval_of(draws),
        aupr_out=metrics.average_precision(-unknown, -known),
        aupr_in=metrics.average_precision(known, unknown),
        fpr95=metrics.fpr_at_95(known, unknown),
        auroc_cost=cost,
    )
