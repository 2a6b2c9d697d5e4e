"""Write the tables of a study for the console and as Markdown, CSV and a picture."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.benchmark.report.charts import COLOURS, LIGHT, dress, new_figure
from edgekd.benchmark.report.elements import Document, Section, Text
from edgekd.benchmark.report.elements import Table as TextTable
from edgekd.benchmark.results.metric import NONE
from edgekd.core.files import csv_text, replacing
from edgekd.studies.cell import ID, OOD, ORACLE
from edgekd.studies.tables import TEACHER, Row, Stat, Table
from edgekd.targets.timing.intervals import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALWAYS = ("Split:", "Selection:", "Oracle:")
"""Prefixes of the notes that the console shows under every table."""


def study_document(name: str, tables: Sequence[Table]) -> Document:
    """Return the document of a study, each table with its notes. The console shows notes common to all tables once."""
    common = [note for note in tables[-1].notes if all(note in table.notes for table in tables)]
    sections = []
    for number, table in enumerate(tables):
        last = table is tables[-1]
        notes = (
            Text(note, console=last or note not in common or note.startswith(ALWAYS))
            for note in table.notes
        )
        title = table.title or "Results"
        sections.append(Section(f"table-{number}", title, (text_table(table), *notes)))
    return Document("study", f"Study {name}", "As a chart: table.png.", tuple(sections))


def text_table(table: Table) -> TextTable:
    """Return the table as text. With several columns, averages and differences come first."""
    values = groups(table)
    header = ("", *values, f"− {table.baseline}", "over seeds", "over images", "s per run")
    averages = [n for n, title in enumerate(header) if title.endswith(" avg")]
    after = len(values) + 1
    lead = (0, *averages, after, after + 1, after + 2) if averages else ()
    rows = []
    for row in table.rows:
        texts = [_stat(value(row), row.name == TEACHER) for value in values.values()]
        difference = NONE if row.difference is None else f"{row.difference:+.1f}"
        seconds = NONE if row.seconds is None else f"{row.seconds:.0f}"
        intervals = _interval(row.t_interval), _interval(row.image_interval)
        rows.append((row.name, *texts, difference, *intervals, seconds))
    title = table.title or "Accuracy %"
    return TextTable(title, header, tuple(rows), lead=lead, console=True)


def groups(table: Table) -> dict[str, Callable[[Row], Stat | None]]:
    """Return title → accuracy of a row: in domain, per column, and the averages if there are several columns."""
    inside, outside = table.names[ID], table.names[OOD]
    several = len(table.columns) > 1
    found: dict[str, Callable[[Row], Stat | None]] = {
        f"{inside} avg" if several else inside: lambda row: row.id
    }
    for place in itertools.product(table.columns, table.measures):
        title = f"{table.names[place[1]]} {place[0]}".strip()
        found[title] = lambda row, place=place: row.columns.get(place)  # type: ignore[misc]
    if several:
        found[f"{outside} avg"] = lambda row: row.average
        if ORACLE in table.measures:
            found[f"{table.names[ORACLE]} avg"] = lambda row: row.oracle
    return found


def _stat(value: Stat | None, alone: bool) -> str:
    if value is None:
        return NONE
    error = "" if alone or value.seeds == 1 else f" ± {value.error:.1f}"
    return f"{value.mean:.1f}{error}"


def _interval(value: Interval | None) -> str:
    return NONE if value is None else f"[{value[0]:+.1f}, {value[1]:+.1f}]"


def study_csv(tables: Sequence[Table]) -> str:
    """Return CSV with one line per number, including ID per column; percent and points, not rounded."""
    lines: list[tuple[object, ...]] = [
        ("table", "recipe", "column", "measure", "value", "standard_error", "low", "high", "seeds")
    ]
    for table in tables:
        for row in table.rows:
            who = table.title, row.name
            averages = {ID: row.id, OOD: row.average, ORACLE: row.oracle}
            stats = dict(row.columns) | {
                ("average", measure): found for measure, found in averages.items() if found
            }
            for (column, measure), found in stats.items():
                lines.append((*who, column, measure, found.mean, found.error, "", "", found.seeds))
            for kind, interval in (("seeds", row.t_interval), ("images", row.image_interval)):
                if row.difference is not None:
                    name = f"ood less {table.baseline}, 95 % over {kind}"
                    low_high = interval or ("", "")
                    lines.append((*who, "average", name, row.difference, "", *low_high, ""))
            if row.seconds is not None:
                lines.append((*who, "", "train_seconds", row.seconds, "", "", "", ""))
    return csv_text(lines)


def draw_study(tables: Sequence[Table], path: Path) -> None:
    """Write a PNG with a panel per table, a group per column, and a point with error bar per recipe.

    The oracle is left out, since a point next to the others would look like a result.
    """
    tables = [
        dataclasses.replace(t, measures=tuple(m for m in t.measures if m != ORACLE)) for t in tables
    ]
    widest = max(len(groups(table)) for table in tables)
    figure = new_figure(max(500, 160 + 108 * widest), 72 + 260 * len(tables))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False, sharey=True)[:, 0]
    names = [row.name for table in tables for row in table.rows if row.name != TEACHER]
    handles: dict[str, Any] = {}
    for axes, table in zip(panels, tables, strict=True):
        _draw(axes, table, list(dict.fromkeys(names)))
        found = axes.get_legend_handles_labels()
        handles |= {label: handle for handle, label in zip(*found, strict=True)}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=min(5, len(handles)),
        frameon=False,
    )
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=160)


def _draw(axes: Axes, table: Table, names: Sequence[str]) -> None:
    accuracies = groups(table)
    dress(axes, y=f"{table.title}: accuracy %" if table.title else "accuracy %")
    axes.grid(False, axis="x")
    axes.axvline(0.5, color=LIGHT["line"], linewidth=1)  # ID is left of the line
    axes.set_xticks(range(len(accuracies)), list(accuracies))
    axes.set_xlim(-0.5, len(accuracies) - 0.5)
    for row in table.rows:
        values = [(n, value) for n, of in enumerate(accuracies.values()) if (value := of(row))]
        if row.name == TEACHER:
            for place, value in values:
                ends = place - 0.4, place + 0.4
                axes.hlines(value.mean, *ends, LIGHT["ct"], linestyles="dashed", label=row.name)
            continue
        number = names.index(row.name)
        shift = 0.7 * ((number + 0.5) / len(names) - 0.5)
        colour = LIGHT[f"c{number % COLOURS}"]
        for place, value in values:
            axes.errorbar(
                place + shift,
                value.mean,
                yerr=value.error if value.seeds > 1 else None,
                fmt="o",
                color=colour,
                markerfacecolor=colour if place else LIGHT["paper"],
                markersize=6,
                capsize=3,
                label=row.name,
            )
            axes.annotate(
                f"{value.mean:.1f}",
                (place + shift, value.mean + value.error),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=colour,
            )
