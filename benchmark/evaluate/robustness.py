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

FEWEST = 3
"""Models for a line: two fit any."""


@dataclass(frozen=True)
class Line:
    """One suite's line, and how much of the spread of log-odds it explains (1: all of it)."""

    suite: str
    slope: float
    intercept: float
    r2: float

    def predicted(self, inside: float, n: int) -> float:
        """Accuracy 0–1 out of domain that goes with accuracy `inside` on n images in domain."""
        odds = self.slope * float(log_odds(inside, n)) + self.intercept
        return float(1 / (1 + np.exp(-odds)))


@dataclass(frozen=True)
class Robustness:
    """`beyond[i]` is of the i-th entry: suite → accuracy minus the line's prediction, 0–1; empty without ID images.

    `reason` says why there is nothing, else it is empty.
    """

    lines: tuple[Line, ...]
    models: tuple[str, ...]
    """Whose accuracies the lines go through."""
    beyond: tuple[dict[str, float], ...]
    reason: str = ""


def log_odds(accuracy: float, n: int) -> NDArray[np.float64]:
    """Log-odds of an accuracy on n images; none or all right counts as half an image more or less."""
    inside = np.clip(accuracy, 0.5 / n, 1 - 0.5 / n)
    return np.asarray(np.log(inside / (1 - inside)))


def effective_robustness(group: Sequence[Entry]) -> Robustness:
    """Of entries that were measured on the same images.

    The lines go through one entry for each student: the torch student, or an exported file where that was not
    measured. Teachers learned from other data, so they are compared with the line and do not shape it.
    """
    suites = [row.suite for row in group[0].accuracy if row.suite.startswith("ood:")]
    fitted = _students(group)
    reason = ""
    if not suites or any(_of(entry, "id") is None for entry in group):
        reason = "these images are not both in and out of domain"
    elif len(fitted) < FEWEST:
        reason = (
            f"it takes {FEWEST} students on the same images for a line, and there are {len(fitted)}"
        )
    elif len({_accuracy(entry, "id") for entry in fitted}) < 2:
        reason = "all students are equally accurate in domain, so no line can be drawn"
    if reason:
        return Robustness((), (), tuple({} for _ in group), reason)
    lines = tuple(_line(suite, fitted) for suite in suites)
    beyond = tuple(
        {
            line.suite: _accuracy(entry, line.suite)
            - line.predicted(_accuracy(entry, "id"), _count(entry, "id"))
            for line in lines
        }
        for entry in group
    )
    return Robustness(lines, tuple(entry.name for entry in fitted), beyond)


def _students(group: Sequence[Entry]) -> list[Entry]:
    found: dict[tuple[str, str], Entry] = {}
    for kind in ("torch", "artifact"):
        for entry in group:
            if entry.summary.kind == kind:
                found.setdefault((entry.source.letter, entry.summary.run), entry)
    return list(found.values())


def _line(suite: str, fitted: Sequence[Entry]) -> Line:
    x = np.asarray([log_odds(_accuracy(entry, "id"), _count(entry, "id")) for entry in fitted])
    y = np.asarray([log_odds(_accuracy(entry, suite), _count(entry, suite)) for entry in fitted])
    slope, intercept = np.polyfit(x, y, 1)
    left, spread = np.square(y - slope * x - intercept).sum(), np.square(y - y.mean()).sum()
    return Line(
        suite, float(slope), float(intercept), float(1 - left / spread) if spread > 0 else 1.0
    )


def _of(entry: Entry, suite: str) -> tuple[float, int] | None:
    return next(((row.top1, row.n) for row in entry.accuracy if row.suite == suite), None)


def _accuracy(entry: Entry, suite: str) -> float:
    return next(row.top1 for row in entry.accuracy if row.suite == suite)


def _count(entry: Entry, suite: str) -> int:
    return next(row.n for row in entry.accuracy if row.suite == suite)
