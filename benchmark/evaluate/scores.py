"""From logits to the accuracy rows and summaries of a report; the same whether the logits are fresh or were kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.compare import difference
from edgekd.benchmark.evaluate import aggregate, metrics
from edgekd.benchmark.evaluate.mce import ALEXNET_ERRORS, mean_corruption_error
from edgekd.benchmark.evaluate.statistics import wilson_interval
from edgekd.benchmark.evaluate.unknowns import unknown_rows
from edgekd.benchmark.report.rows import (
    AccuracyRow,
    CorruptionRow,
    CueConflictRow,
    Difference,
    OwnMetricsRow,
    SummaryRow,
    UnknownRow,
    VocabularyRow,
)
from edgekd.benchmark.subjects import Subject, Suite

Logits = dict[tuple[str, int], NDArray[np.float32]]
"""(subject's key, position of the suite) → `[n, C]`."""
_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Scores:
    """The parts of a report that follow from logits."""

    accuracy: tuple[AccuracyRow, ...]
    summary: tuple[SummaryRow, ...]
    corruptions: tuple[CorruptionRow, ...]
    cue_conflicts: tuple[CueConflictRow, ...]
    vocabularies: tuple[VocabularyRow, ...]
    unknowns: tuple[UnknownRow, ...]
    own_metrics: tuple[OwnMetricsRow, ...]


def score(subjects: Sequence[Subject], suites: Sequence[Suite], logits: Logits) -> Scores:
    """Score every subject on every suite that it is measured on.

    Suites of the family `val` give each subject its temperature and no row of their own; on those of `unknown` there is
    no right answer and no accuracy.
    """
    torch_of = {subject.run: subject for subject in subjects if subject.kind == "torch"}
    of: dict[tuple[str, str], list[AccuracyRow]] = {}
    temperatures: dict[tuple[str, str], float | None] = {}
    for subject in subjects:
        reference = torch_of.get(subject.run) if subject.kind != "torch" else None
        where = [number for number, suite in enumerate(suites) if suite.holds(subject)]
        temperature = next(
            (
                metrics.fit_temperature(logits[subject.key, number], suites[number].labels)
                for number in where
                if suites[number].kind == "val"
            ),
            None,
        )
        temperatures[subject.run, subject.name] = temperature
        of[subject.run, subject.name] = [
            aggregate.accuracy_row(
                subject,
                suites[number],
                logits[subject.key, number],
                logits[reference.key, number]
                if reference and suites[number].holds(reference)
                else None,
                temperature,
            )
            for number in where
            if suites[number].kind not in ("val", "unknown")
        ]
    teacher_ood: dict[str, float | None] = {}
    for subject in subjects:
        if subject.kind == "teacher":
            outside = [
                row.top1
                for row in of[subject.run, subject.name]
                if row.suite.startswith(aggregate.OOD)
            ]
            teacher_ood[subject.run] = float(np.mean(outside)) if outside else None
    summary, first_run = [], dict[tuple[Any, ...], str]()
    for subject in subjects:
        # A teacher of two runs is one row only where both are measured on the same images.
        where = [number for number, suite in enumerate(suites) if suite.holds(subject)]
        first = first_run.setdefault((subject.key, *where), subject.run)
        summary.append(
            aggregate.summary_row(
                subject,
                of[subject.run, subject.name],
                teacher_ood_avg=teacher_ood.get(subject.run),
                same_as=first if first != subject.run else None,
                temperature=temperatures[subject.run, subject.name],
                costs=_costs(subject, torch_of.get(subject.run), suites, logits),
            )
        )
    return Scores(
        tuple(row for found in of.values() for row in found),
        tuple(summary),
        tuple(_corruption_rows(subjects, of)),
        tuple(_cue_rows(subjects, suites, logits)),
        tuple(_vocabulary_rows(subjects, suites, logits)),
        tuple(unknown_rows(subjects, suites, logits)),
        tuple(_own_metrics(subjects, suites, logits)),
    )


def _costs(
    subject: Subject, reference: Subject | None, suites: Sequence[Suite], logits: Logits
) -> dict[str, Difference]:
    if subject.kind != "artifact" or reference is None:
        return {}
    found = {}
    for name in ("id", "ood"):
        chosen = [
            n
            for n, suite in enumerate(suites)
            if suite.holds(subject) and suite.name.split(":")[0] == name
        ]
        if chosen:
            found[name] = difference(
                [
                    (
                        metrics.correct(logits[reference.key, number], suites[number].labels),
                        metrics.correct(logits[subject.key, number], suites[number].labels),
                    )
                    for number in chosen
                ]
            )
    return found


def _corruption_rows(
    subjects: Sequence[Subject], of: Mapping[tuple[str, str], Sequence[AccuracyRow]]
) -> Iterator[CorruptionRow]:
    """One row per subject that went through the corruptions.

    The denominators of mCE are AlexNet's on ImageNet's 1,000 classes, and the teacher's of the same run on other data,
    where AlexNet's would mean nothing.
    """
    tables: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {}
    count: dict[tuple[str, str], tuple[int, int]] = {}
    for key, rows_of_one in of.items():
        for row in rows_of_one:
            if row.suite.startswith("corruption:"):
                name = row.suite.split(":")[1]
                table = tables.setdefault(key, {})
                table[name] = (*table.get(name, ()), row.top1)
                count[key] = (row.n, row.classes)
    teacher_of = {
        subject.run: (subject.run, subject.name)
        for subject in subjects
        if subject.kind == "teacher"
    }
    for (run, name), table in tables.items():
        n, classes = count[run, name]
        denominators, whose = None, None
        teacher = teacher_of.get(run)
        if classes == _IMAGENET_CLASSES:
            denominators, whose = (
                ALEXNET_ERRORS,
                "AlexNet on ImageNet-C, as published by Hendrycks & Dietterich 2019",
            )
        elif teacher is not None and teacher in tables:
            errors = {
                corruption: 1 - float(np.mean(cells))
                for corruption, cells in tables[teacher].items()
            }
            if min(errors.values()) > 0:
                denominators, whose = errors, "the run's teacher, zero-shot, on the same images"
        yield CorruptionRow(
            run=run,
            subject=name,
            n=n,
            top1=table,
            robust_accuracy=float(np.mean(list(table.values()))),
            mce=None if denominators is None else mean_corruption_error(table, denominators),
            mce_denominators=whose,
        )


def _cue_rows(
    subjects: Sequence[Subject], suites: Sequence[Suite], logits: Logits
) -> Iterator[CueConflictRow]:
    for number, suite in enumerate(suites):
        for subject in subjects:
            if suite.texture is None or not suite.holds(subject):
                continue
            answer = logits[subject.key, number].argmax(axis=1)
            shape, texture = (
                int((answer == suite.labels).sum()),
                int((answer == suite.texture).sum()),
            )
            decided = shape + texture
            yield CueConflictRow(
                run=subject.run,
                subject=subject.name,
                suite=suite.name,
                n=len(answer),
                shape=shape / len(answer),
                texture=texture / len(answer),
                shape_bias=shape / decided if decided else None,
                shape_bias_ci95=wilson_interval(shape, decided) if decided else None,
            )


FIXED = {
    "artifact": "classes are in the file",
    "torch": "classes are in its weights",
    "teacher": "it embeds no text",
}
"""Why a subject cannot be asked in other words."""


def _vocabulary_rows(
    subjects: Sequence[Subject], suites: Sequence[Suite], logits: Logits
) -> Iterator[VocabularyRow]:
    for number, suite in enumerate(suites):
        if suite.wording is None or suite.base is None:
            continue
        base = next(
            n
            for n, other in enumerate(suites)
            if (other.name, other.run) == (suite.base, suite.run)
        )
        own = len(suites[base].images.classes)
        for subject in subjects:
            if not suite.concerns(subject):
                continue
            row = VocabularyRow(
                run=subject.run, subject=subject.name, suite=suite.name, base=suite.base, n=len(suite.indices),
                added=len(suite.images.classes) - own, top1=None, top1_ci95=None, base_top1=None, to_added=None,
                reason=FIXED[subject.kind],
            )  # fmt: skip
            if suite.holds(subject):
                answer = logits[subject.key, number].argmax(axis=1)
                hits = int((answer == suite.labels).sum())
                found = {
                    "top1": hits / len(answer),
                    "top1_ci95": wilson_interval(hits, len(answer)),
                    "base_top1": metrics.top1(logits[subject.key, base], suites[base].labels),
                    "to_added": float((answer >= own).mean()),
                    "reason": None,
                }
                row = row.model_copy(update=found)
            yield row


def _own_metrics(
    subjects: Sequence[Subject], suites: Sequence[Suite], logits: Logits
) -> Iterator[OwnMetricsRow]:
    for number, suite in enumerate(suites):
        for subject in subjects:
            if suite.own_metrics is not None and suite.holds(subject):
                found = suite.own_metrics(logits[subject.key, number].argmax(axis=1))
                yield OwnMetricsRow(
                    run=subject.run,
                    subject=subject.name,
                    suite=suite.name,
                    source=suite.own_metrics_by,
                    metrics=found,
                )
