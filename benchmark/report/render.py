"""Render a document on the terminal, as Markdown, and as one HTML file without network access or scripts.

Names and texts of users are escaped in every format.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.benchmark.report import charts
from edgekd.benchmark.report.elements import (
    Document,
    Figure,
    Item,
    Section,
    Table,
    Text,
    printable,
)
from edgekd.core.console import is_main_process, out
from edgekd.core.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_WIDTH = 100
_STYLES = {"good": "green", "bad": "red", "note": "yellow", "quiet": "dim"}
_SPECIAL = re.compile(
    r"[\\|<>`*~$]|!(?=\[)|\[(?=[^\[\]]*\][(\[:])|(?<!\w)_|_(?!\w)|&(?=#?\w+;)|(?<=:)/(?=/)"
)
_LEADING = re.compile(r"^(?=#+(\s|$)|[-+=](\s|$)|=+$|-{3,})")
_TEMPLATES = Path(__file__).parent / "templates"


def print_document(document: Document) -> None:
    """Print the texts and tables for the console on standard output; without a terminal, 100 columns wide."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text as RichText

    def rich_table(table: Table) -> RichTable:
        """Return a table for the terminal: names may fold, numbers do not."""
        result = RichTable(
            title=printable(table.title),
            caption=printable(table.note) or None,
            box=box.SIMPLE_HEAD,
            title_justify="left",
            caption_justify="left",
            title_style="bold",
            padding=(0, 1, 0, 0),
        )
        for number, name in enumerate(table.header):
            is_name = number < table.heads or table.words
            longest = max((len(printable(row[number])) for row in table.rows), default=0)
            result.add_column(
                RichText(printable(name)),
                justify="left" if is_name else "right",
                overflow="fold",
                min_width=min(longest, 32) if number == 0 else None,
                vertical="bottom",
            )
        for row in table.rows:
            tones = (_STYLES.get(getattr(cell, "tone", ""), "") for cell in row)
            result.add_row(*map(RichText, map(printable, row), tones))
        return result

    if not is_main_process():
        return
    width = min(out.width, _WIDTH) if out.is_terminal else _WIDTH
    console = Console(
        file=out.file, width=width, highlight=False, emoji=False, no_color=out.no_color
    )
    badge = f", {document.badge}" if document.badge else ""
    console.print(RichText(f"{printable(document.title)}{badge}", style="bold"), soft_wrap=True)
    for item in (item for one in document.sections for item in one.items):
        if isinstance(item, Text) and item.console:
            label = f"{printable(item.label)}: " if item.label else ""
            console.print(RichText(label + printable(item.body), style=_STYLES.get(item.tone, "")))
        elif isinstance(item, Table) and item.console:
            console.print(rich_table(item.leading))


def escape(text: object) -> str:
    """Return text escaped for Markdown, on one line."""
    line = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", _SPECIAL.sub(r"\\\g<0>", printable(text)))
    return re.sub(r"\bwww\.", r"www\.", _LEADING.sub(r"\\", line))


def markdown(document: Document) -> str:
    """Return a document as Markdown, without figures."""
    title = escape(document.title) + (f" ({document.badge})" if document.badge else "")
    lines = [f"# {title}", "", escape(document.byline), "", *markdown_sections(document.sections)]
    return squeezed(lines)


def squeezed(lines: Iterable[str]) -> str:
    """Return lines as one text without repeated empty lines."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def markdown_sections(sections: Iterable[Section]) -> Iterator[str]:
    """Yield the lines of sections, without sections that only have figures."""
    for one in sections:
        lines = [line for item in one.items for line in _markdown_item(item)]
        if lines:
            yield from (f"## {escape(one.title)}", "")
            for line, before in zip(lines, ["", *lines], strict=False):
                if before.startswith("- ") and line and not line.startswith("- "):
                    yield ""
                yield line
            yield ""


def _markdown_item(item: Item) -> Iterator[str]:
    if isinstance(item, Text):
        if item.label:
            yield f"- **{escape(item.label)}**: {escape(item.body)}"
        else:
            yield from (escape(item.body), "")
    elif isinstance(item, Table):
        rows = [f"| {' | '.join(map(escape, row))} |" for row in (item.header, *item.rows)]
        yield from (f"### {escape(item.title)}", "", rows[0], "|" + "---|" * len(item.header))
        yield from (*rows[1:], "", escape(item.note), "")
    elif not isinstance(item, Figure):
        yield from (f"### {escape(item.title)}", "")
        for picture in item.pictures:
            yield f"- {escape(picture.name)}: {escape(' '.join(picture.lines))}"
        yield from ("", escape(item.note), "")


def templates() -> Environment:
    """Return the Jinja environment of the report templates, with autoescaping in HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
    )
    environment.filters["md"] = escape
    return environment


def html(document: Document) -> str:
    """Return a document as HTML with styles for light and dark mode, phones and print."""
    from markupsafe import Markup

    keys = itertools.count()

    def drawings(figure: Figure) -> list[Markup]:
        title, text = figure.title or figure.caption, figure.description
        drawn = ((f"f{next(keys)}", figure.draw(width)) for width in figure.widths)
        return [Markup(charts.svg(drawing, key, title, text)) for key, drawing in drawn]

    style = (_TEMPLATES / "style.css").read_text(encoding="utf-8")
    for name, palette in (("LIGHT", charts.LIGHT), ("DARK", charts.DARK)):
        colours = " ".join(f"--{role}: {value};" for role, value in palette.items())
        style = style.replace(f"/* {name} */", colours)
    return (
        templates()
        .get_template("page.html")
        .render(
            document=document,
            kind=lambda item: type(item).__name__.lower(),
            groups=_groups,
            drawings=drawings,
            style=Markup(style),
            version=__version__,
        )
    )


def _groups(items: Sequence[Item]) -> list[tuple[str, list[Item]]]:
    """Group consecutive items: list entries, figures in a row, and everything else."""

    def group(item: Item) -> str:
        if isinstance(item, Text) and item.label:
            return "entries"
        return "halves" if isinstance(item, Figure) and len(item.widths) == 1 else "block"

    return [(name, list(members)) for name, members in itertools.groupby(items, group)]
