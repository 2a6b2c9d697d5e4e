"""From logits to the accuracy rows and summaries of a report; the same whether the logits are fresh or were kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark import metrics, rows
from edgekd.benchmark.accuracy import Subject, Suite
from edgekd.benchmark.rows import AccuracyRow, Difference, SummaryRow

Logits = dict[tuple[str, int], NDArray[np.float32]]
"""(subject's key, position of the suite) → `[n, C]`."""


@dataclass(frozen=True)
class Scores:
    """The parts of a report that follow from logits."""

    accuracy: tuple[AccuracyRow, ...]
    summary: tuple[SummaryRow, ...]


def score(subjects: Sequence[Subject], suites: Sequence[Suite], logits: Logits) -> Scores:
    """Score every subject on every suite that it is measured on.

    Suites of the family `val` give each subject its temperature and no row of their own.
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
            rows.accuracy_row(
                subject,
                suites[number],
                logits[subject.key, number],
                logits[reference.key, number] if reference else None,
                temperature,
            )
            for number in where
            if suites[number].kind != "val"
        ]
    teacher_ood: dict[str, float | None] = {}
    for subject in subjects:
        if subject.kind == "teacher":
            outside = [row.top1 for row in of[subject.run, subject.name] if row.suite.startswith(rows.OOD)]
            teacher_ood[subject.run] = float(np.mean(outside)) if outside else None
    summary, first_run = [], dict[tuple[Any, ...], str]()
    for subject in subjects:
        # A teacher of two runs is one row only where both are measured on the same images.
        where = [number for number, suite in enumerate(suites) if suite.holds(subject)]
        first = first_run.setdefault((subject.key, *where), subject.run)
        summary.append(
            rows.summary_row(
                subject,
                of[subject.run, subject.name],
                teacher_ood_avg=teacher_ood.get(subject.run),
                same_as=first if first != subject.run else None,
                temperature=temperatures[subject.run, subject.name],
                costs=_costs(subject, torch_of.get(subject.run), suites, logits),
            )
        )
    return Scores(tuple(row for found in of.values() for row in found), tuple(summary))


def _costs(
    subject: Subject, reference: Subject | None, suites: Sequence[Suite], logits: Logits
) -> dict[str, Difference]:
    if subject.kind != "artifact" or reference is None:
        return {}
    found = {}
    for name in ("id", "ood"):
        chosen = [n for n, suite in enumerate(suites) if suite.holds(subject) and suite.name.split(":")[0] == name]
        if chosen:
            found[name] = rows.difference(
                [logits[reference.key, number] for number in chosen],
                [logits[subject.key, number] for number in chosen],
                [suites[number] for number in chosen],
            )
    return found
