"""Effective robustness (Taori et al. 2020): accuracy out of domain beyond what accuracy in domain predicts.

The prediction is a straight line between the log-odds of both accuracies, `logit(OOD) = a · logit(ID) + b`, by least
squares over the students at hand; positive is more robust than they are at the same ID accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.report.across import Entry
from edgekd.benchmark.report.rows import AccuracyRow

FEWEST = 3
"""Models for a line: two fit any."""


@dataclass(frozen=True)
class Line:
    """One suite's line, and how much of the spread of log-odds it explains (1: all of it)."""

    suite: str
    slope: float
    intercept: float
    r2: float

    def predicted(self, inside: AccuracyRow) -> float:
        """Return the accuracy 0–1 out of domain that goes with this row in domain."""
        odds = self.slope * float(log_odds(inside.top1, inside.n)) + self.intercept
        return float(1 / (1 + np.exp(-odds)))


@dataclass(frozen=True)
class Robustness:
    """Effective robustness of a group of entries.

    Attributes:
        models: names of the entries whose accuracies the lines go through.
        beyond: for each entry of the group, suite → accuracy minus the line's prediction, 0–1.
    """

    lines: tuple[Line, ...]
    models: tuple[str, ...]
    beyond: tuple[dict[str, float], ...]


def log_odds(accuracy: float, n: int) -> NDArray[np.float64]:
    """Return the log-odds of an accuracy on n images; none or all right counts as half an image more or less."""
    inside = np.clip(accuracy, 0.5 / n, 1 - 0.5 / n)
    return np.asarray(np.log(inside / (1 - inside)))


def effective_robustness(group: Sequence[Entry]) -> Robustness | str:
    """Return the effective robustness of entries that were measured on the same images, or why there is none.

    The lines go through one entry for each student: the torch student, or an exported file where that was not
    measured. Teachers learned from other data, so they are compared with the line and do not shape it.
    """
    suites = [row.suite for row in group[0].accuracy if row.suite.startswith("ood:")]
    students: dict[tuple[str, str], Entry] = {}
    for kind in ("torch", "artifact"):
        for entry in group:
            if entry.summary.kind == kind:
                students.setdefault((entry.source.letter, entry.summary.run), entry)
    if not suites or any("id" not in {row.suite for row in entry.accuracy} for entry in group):
        return "these images are not both in and out of domain"
    if len(students) < FEWEST:
        return f"it takes {FEWEST} students on the same images for a line, and there are {len(students)}"
    if len({_row(entry, "id").top1 for entry in students.values()}) < 2:
        return "all students are equally accurate in domain, so no line can be drawn"
    lines = tuple(_line(suite, list(students.values())) for suite in suites)
    beyond = tuple(
        {one.suite: _row(entry, one.suite).top1 - one.predicted(_row(entry, "id")) for one in lines}
        for entry in group
    )
    return Robustness(lines, tuple(entry.name for entry in students.values()), beyond)


def _row(entry: Entry, suite: str) -> AccuracyRow:
    return next(row for row in entry.accuracy if row.suite == suite)


def _line(suite: str, fitted: Sequence[Entry]) -> Line:
    x, y = (
        np.asarray([log_odds(row.top1, row.n) for row in (_row(one, name) for one in fitted)])
        for name in ("id", suite)
    )
    slope, intercept = np.polyfit(x, y, 1)
    left, spread = np.square(y - slope * x - intercept).sum(), np.square(y - y.mean()).sum()
    r2 = float(1 - left / spread) if spread > 0 else 1.0
    return Line(suite, float(slope), float(intercept), r2)
