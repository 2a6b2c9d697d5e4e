"""What a page is made of: tables, figures, and the pictures of a report's subjects in the page's colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from edgekd.benchmark.chart_accuracy import Point
from edgekd.benchmark.chart_calibration import Reliability, reliability
from edgekd.benchmark.kept import Kept
from edgekd.benchmark.rows import AccuracyRow, Report
from edgekd.benchmark.svg import COLOURS, Drawing, swatch
from edgekd.benchmark.table import label
from edgekd.version import __version__

WIDE, NARROW = 1000, 340
"""Widths that a large drawing is made for; the style sheet shows the one that fits, so no text shrinks on a phone."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table. `tone` is a class of the style sheet: good, bad, why (a sentence, not a number), or none."""

    text: str | Markup
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """Rows begin with `heads` cells that name the row; the other cells are numbers unless `words`."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str | Markup | Cell, ...], ...]
    heads: int = 1
    words: bool = False


@dataclass(frozen=True)
class Figure:
    """One drawing, or the same in two widths."""

    key: str
    drawings: tuple[Drawing, ...]
    caption: str = ""

    @property
    def svgs(self) -> list[Markup]:
        return [drawing.svg(f"{self.key}-{number}") for number, drawing in enumerate(self.drawings)]


@dataclass(frozen=True)
class Look:
    """Name and colour of each subject of a report, teachers that runs share once."""

    report: Report
    prefix: str = ""
    names: dict[tuple[str, str], str] = field(default_factory=dict)
    colours: dict[tuple[str, str], str] = field(default_factory=dict)

    def swatch(self, run: str, subject: str) -> Markup:
        kind = next(
            row.kind for row in self.report.summary if (row.run, row.subject) == (run, subject)
        )
        return swatch(kind, self.colours[run, subject])

    def points(self) -> list[Point]:
        latency = {(row.run, row.subject): row for row in self.report.latency}
        rows = [row for row in self.report.summary if (row.run, row.subject) in self.names]
        return [
            Point(
                self.names[row.run, row.subject],
                self.colours[row.run, row.subject],
                row,
                latency[row.run, row.subject],
            )
            for row in rows
        ]

    def of_suites(self, rows: Sequence[AccuracyRow]) -> list[tuple[str, str, AccuracyRow]]:
        """Name, colour and row of those subjects that are shown."""
        return [
            (self.names[row.run, row.subject], self.colours[row.run, row.subject], row)
            for row in rows
            if (row.run, row.subject) in self.names
        ]


def look(report: Report, *, first: int = 0, prefix: str = "") -> Look:
    """Names (with the run's before them where there are several) and colours, counted from `first`."""
    found = Look(report, prefix)
    several = len({row.run for row in report.summary}) > 1 or bool(prefix)
    number = first
    for row in report.summary:
        if row.same_as is not None:
            continue
        own = (
            f"{prefix or row.run}: {label(row)}"
            if several and row.kind != "teacher"
            else label(row)
        )
        found.names[row.run, row.subject] = own
        if row.kind == "teacher":
            found.colours[row.run, row.subject] = "ct"
        else:
            found.colours[row.run, row.subject] = f"c{number % COLOURS}"
            number += 1
    return found


def pooled(kept: Kept, run: str, subject: str, suites: Sequence[str]) -> Reliability:
    """Reliability over all images of several suites together; their classes may differ."""
    logits = [kept.logits(run, subject, suite) for suite in suites]
    widest = max(part.shape[1] for part in logits)
    padded = [
        np.pad(part, ((0, 0), (0, widest - part.shape[1])), constant_values=-np.inf)
        for part in logits
    ]
    return reliability(
        np.concatenate(padded), np.concatenate([kept.labels(run, suite) for suite in suites])
    )


def environment() -> Environment:
    """Templates with everything escaped that is not markup of our own, and an error for a name that is missing."""
    folder = Path(__file__).parent / "templates"
    made = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["version"] = __version__
    made.globals["style"] = Markup((folder / "style.css").read_text(encoding="utf-8"))
    return made
