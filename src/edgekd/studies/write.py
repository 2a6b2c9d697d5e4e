"""A study's tables as text: for the console, as Markdown, and as CSV with a number per line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgekd.benchmark.measure.intervals import Interval
from edgekd.benchmark.table import NONE
from edgekd.files import csv_text as csv_lines
from edgekd.studies.numbers import ID, OOD, ORACLE, Row, Stat, Table
from edgekd.studies.tables import TEACHER

ALWAYS = ("Split:", "Selection:", "Oracle:")
"""How the notes begin without which no table may be read."""


def group_titles(table: Table) -> list[str]:
    """What accuracies a row has: in domain, per column, and on average where there are several columns."""
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
    """The accuracies of `group_titles`."""
    inner = [
        row.columns.get((column, measure)) for column in table.columns for measure in table.measures
    ]
    if len(table.columns) == 1:
        return [row.id, *inner]
    return [row.id, *inner, row.average, *([row.oracle] if ORACLE in table.measures else [])]


def header(table: Table) -> list[str]:
    """Titles of the columns."""
    return [
        "",
        *group_titles(table),
        f"− {table.baseline}",
        "over seeds",
        "over images",
        "s per run",
    ]


def cells(table: Table, row: Row) -> list[str]:
    """A row's cells as text, as many as the header has."""
    texts = [row.name, *(_stat(value, row.name == TEACHER) for value in group_values(table, row))]
    difference = NONE if row.difference is None else f"{row.difference:+.1f}"
    seconds = NONE if row.seconds is None else f"{row.seconds:.0f}"
    return [*texts, difference, _interval(row.t_interval), _interval(row.image_interval), seconds]


def _stat(value: Stat | None, alone: bool) -> str:
    if value is None:
        return NONE
    return (
        f"{value.mean:.1f}"
        if alone or value.seeds == 1
        else f"{value.mean:.1f} ± {value.error:.1f}"
    )


def _interval(value: Interval | None) -> str:
    return NONE if value is None else f"[{value[0]:+.1f}, {value[1]:+.1f}]"


def console_lines(tables: Sequence[Table]) -> Iterator[str]:
    """The tables with their columns aligned; under each the notes that it alone has, split and selection always."""
    common = [note for note in tables[-1].notes if all(note in table.notes for table in tables)]
    for table in tables:
        lines = [header(table), *(cells(table, row) for row in table.rows)]
        widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
        if table.title:
            yield table.title
        for line in lines:
            first, *others = line
            yield "  ".join(
                [
                    f"{first:<{widths[0]}}",
                    *(f"{t:>{w}}" for t, w in zip(others, widths[1:], strict=True)),
                ]
            )
        yield from (
            n for n in table.notes if n not in common or (len(tables) > 1 and n.startswith(ALWAYS))
        )
        yield ""
    yield from (note for note in common if len(tables) == 1 or not note.startswith(ALWAYS))


def markdown(name: str, tables: Sequence[Table]) -> str:
    """`table.md`."""
    parts = [f"# Study {name}", "", "![The same as a picture](table.png)", ""]
    for table in tables:
        if table.title:
            parts += [f"## {table.title}", ""]
        titles = header(table)
        parts += [
            _line(titles),
            "|" + "---|" * len(titles),
            *(_line(cells(table, row)) for row in table.rows),
            "",
        ]
        parts += [f"- {note}" for note in table.notes] + [""]
    return "\n".join(parts)


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", r"\|") for text in texts) + " |"


def csv_text(tables: Sequence[Table]) -> str:
    """`table.csv`: a line per number, with ID per column as well; per cent and points, not rounded."""
    rows: list[Sequence[object]] = [
        ("table", "recipe", "column", "measure", "value", "standard_error", "low", "high", "seeds")
    ]
    for table in tables:
        for row in table.rows:
            for (column, measure), value in row.columns.items():
                rows.append((table.title, row.name, column, measure, *_numbers(value)))
            for measure, found in ((ID, row.id), (OOD, row.average), (ORACLE, row.oracle)):
                if found is not None:
                    rows.append((table.title, row.name, "average", measure, *_numbers(found)))
            for kind, interval in (("seeds", row.t_interval), ("images", row.image_interval)):
                if row.difference is not None:
                    low, high = interval or ("", "")
                    name = f"ood less {table.baseline}, 95 % over {kind}"
                    rows.append(
                        (table.title, row.name, "average", name, row.difference, "", low, high, "")
                    )
            if row.seconds is not None:
                rows.append(
                    (table.title, row.name, "", "train_seconds", row.seconds, "", "", "", "")
                )
    return csv_lines(rows)


def _numbers(value: Stat) -> tuple[float | str, ...]:
    return value.mean, value.error, "", "", value.seeds
