"""A study's tables as a document for the console and Markdown, and as CSV with a number per line."""

from __future__ import annotations

from collections.abc import Sequence

from edgekd.benchmark.report.sections import Document, Section, Text
from edgekd.benchmark.report.sections import Table as TextTable
from edgekd.benchmark.results.metric import NONE
from edgekd.core.files import csv_text
from edgekd.studies.numbers import ID, OOD, ORACLE, Row, Stat, Table
from edgekd.studies.tables import TEACHER
from edgekd.targets.timing.intervals import Interval

ALWAYS = ("Split:", "Selection:", "Oracle:")
"""How the notes begin that the console shows under every table."""


def study_document(name: str, tables: Sequence[Table]) -> Document:
    """Return the document of a study: each table with its notes; what all tables share, the console shows once."""
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
    return Document("study", f"Study {name}", "The same as a picture: table.png.", tuple(sections))


def text_table(table: Table) -> TextTable:
    """Return the cells as text; averages and differences lead where there are several columns."""
    groups = group_titles(table)
    header = ("", *groups, f"− {table.baseline}", "over seeds", "over images", "s per run")
    averages = [n for n, title in enumerate(groups, 1) if title.endswith(" avg")]
    after = len(groups) + 1
    lead = (0, *averages, after, after + 1, after + 2) if averages else ()
    rows = tuple(tuple(_cells(table, row)) for row in table.rows)
    return TextTable(table.title or "Accuracy %", header, rows, lead=lead, console=True)


def group_titles(table: Table) -> list[str]:
    """Return which accuracies a row has: in domain, per column, and on average where there are several columns."""
    inside, outside = table.names[ID], table.names[OOD]
    names = [
        f"{table.names[measure]} {column}".strip()
        for column in table.columns
        for measure in table.measures
    ]
    if len(table.columns) == 1:
        return [inside, *names]
    oracle = [f"{table.names[ORACLE]} avg"] if ORACLE in table.measures else []
    return [f"{inside} avg", *names, f"{outside} avg", *oracle]


def group_values(table: Table, row: Row) -> list[Stat | None]:
    """Return the accuracies of `group_titles`."""
    inner = [
        row.columns.get((column, measure)) for column in table.columns for measure in table.measures
    ]
    if len(table.columns) == 1:
        return [row.id, *inner]
    return [row.id, *inner, row.average, *([row.oracle] if ORACLE in table.measures else [])]


def _cells(table: Table, row: Row) -> list[str]:
    texts = [row.name, *(_stat(value, row.name == TEACHER) for value in group_values(table, row))]
    difference = NONE if row.difference is None else f"{row.difference:+.1f}"
    seconds = NONE if row.seconds is None else f"{row.seconds:.0f}"
    return [*texts, difference, _interval(row.t_interval), _interval(row.image_interval), seconds]


def _stat(value: Stat | None, alone: bool) -> str:
    if value is None:
        return NONE
    error = "" if alone or value.seeds == 1 else f" ± {value.error:.1f}"
    return f"{value.mean:.1f}{error}"


def _interval(value: Interval | None) -> str:
    return NONE if value is None else f"[{value[0]:+.1f}, {value[1]:+.1f}]"


def study_csv(tables: Sequence[Table]) -> str:
    """Return a line per number, with ID per column as well; per cent and points, not rounded."""
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
