"""The elements of a document, for every output format: sections of tables, texts, figures and galleries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from edgekd.benchmark.results.metric import NONE, metrics_of
from edgekd.core import readers

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

WIDE, NARROW = 1000, 340
"""Widths in pixels of the two versions of a large figure; the style sheet shows the one that fits."""
Cells = dict[str, str]
"""A row of a table: heading → cell."""


def printable(text: object) -> str:
    """Return text on one line with control characters and bidirectional marks escaped."""
    return readers.printable(" ".join(str(text).split()))


class Cell(str):
    """A cell with a `tone`: `good`, `bad`, `why` (a reason for a missing value), or a shade such as `r3`, `w10`."""

    tone: str

    def __new__(cls, text: str, tone: str) -> Cell:
        """Return text with a tone."""
        made = super().__new__(cls, text)
        made.tone = tone
        return made


@dataclass(frozen=True)
class Table:
    """Rows of text cells; the first `heads` cells of a row are its header.

    Attributes:
        lead: indices of the columns that are always shown; the others are shown on request. Empty: all are shown.
        words: whether cells are words instead of numbers.
        folded: whether the whole table is shown on request.
        matrix: whether to use narrow, shaded cells and vertical headings.
        console: whether the console shows the table, with its leading columns.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    heads: int = 1
    note: str = ""
    lead: tuple[int, ...] = ()
    words: bool = False
    folded: bool = False
    matrix: bool = False
    console: bool = False

    @property
    def leading(self) -> Table:
        """The table with only its leading columns."""
        if not self.lead:
            return self
        rows = tuple(tuple(row[n] for n in self.lead) for row in self.rows)
        heads = sum(position < self.heads for position in self.lead)
        return replace(
            self, header=tuple(self.header[n] for n in self.lead), rows=rows, heads=heads, lead=()
        )


@dataclass(frozen=True)
class Text:
    """A paragraph, or with a `label` an entry of a list. `tone`: empty, `quiet`, `note`, `good` or `bad`."""

    body: str
    label: str = ""
    tone: str = ""
    console: bool = False


@dataclass(frozen=True)
class Figure:
    """A matplotlib figure for the HTML page.

    Attributes:
        description: text description of the figure.
        draw: function from width in CSS pixels to the figure.
        widths: one width for figures in a row, or two, of which the page shows the one that fits.
        legend: names and colours (keys of the charts' palettes).
    """

    title: str
    description: str
    draw: Callable[[int], Drawing]
    caption: str = ""
    widths: tuple[int, ...] = (WIDE, NARROW)
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Picture:
    """An image as a `data:` URL (empty if it cannot be shown), with its name and caption lines."""

    address: str
    name: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Gallery:
    """A gallery of small images."""

    title: str
    pictures: tuple[Picture, ...]
    note: str = ""


Item = Table | Text | Figure | Gallery


@dataclass(frozen=True)
class Section:
    """A heading and its items; `tone` sets the colour."""

    key: str
    title: str
    items: tuple[Item, ...]
    tone: str = ""


@dataclass(frozen=True)
class Document:
    """A report or a comparison before it is rendered. `badge` marks a quick measurement."""

    kind: str
    title: str
    byline: str
    sections: tuple[Section, ...]
    badge: str = ""


def section(key: str, title: str, items: Iterable[Item], tone: str = "") -> Section:
    """Return a section of these items without empty tables."""
    filled = (item for item in items if not isinstance(item, Table) or item.rows)
    return Section(key, title, tuple(filled), tone)


def shown(row: BaseModel | None, keys: str) -> Cells:
    """Return heading → text of the fields `keys` of a row; `*` stands for all other metrics."""
    if row is None:
        return {}
    metrics, names = metrics_of(type(row)), keys.split()
    if "*" in names:
        place = names.index("*")
        names[place : place + 1] = [key for key in metrics if key not in names]
    cells = {}
    for key in names:
        if metric := metrics.get(key):
            cells[metric.heading] = metric.shown(row, key)
        else:
            cells[key.replace("_", " ")] = words(getattr(row, key))
    return cells


def facts(values: Mapping[str, object], *hidden: str) -> list[Cells]:
    """Return facts as rows of a table, without the `hidden` ones."""
    found = {key: value for key, value in values.items() if key not in hidden}
    return [{"what": key.replace("_", " "), "value": words(found[key])} for key in found]


def words(value: object) -> str:
    """Return a fact as text: lists with at most twelve items, floats with four digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {words(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        more = f" and {len(value) - 12} more" if len(value) > 12 else ""
        return ("; ".join(words(item) for item in value[:12]) + more) or "none"
    return NONE if value is None else str(value)


def table(title: str, rows: Iterable[Cells], lead: int = 0, **options: Any) -> Table:
    """Return a table of rows without empty columns; the first `lead` columns are leading ones (0: all)."""
    found = list(rows)
    names = list(dict.fromkeys(name for row in found for name in row))
    heads = names[: options.get("heads", 1)]
    used = [n for n in names if n in heads or any(str(row.get(n, NONE)) != NONE for row in found)]
    first = tuple(place for place, name in enumerate(used) if name in names[:lead])
    cells = tuple(tuple(row.get(name, NONE) for name in used) for row in found)
    return Table(title, tuple(used), cells, lead=first if len(first) < len(used) else (), **options)
