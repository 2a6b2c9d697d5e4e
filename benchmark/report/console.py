"""Sections on the terminal: the texts and tables that are meant for it, with their leading columns, in 100 columns."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text as RichText

from edgekd.benchmark.report.sections import Document, Table, Text, printable
from edgekd.core.console import is_main_process, out

WIDTH = 100
_STYLES = {"good": "green", "bad": "red", "note": "yellow", "quiet": "dim"}


def print_document(document: Document) -> None:
    """Print what a document has for the console on standard output; without a terminal, 100 columns wide."""
    if not is_main_process():
        return
    width = min(out.width, WIDTH) if out.is_terminal else WIDTH
    console = Console(
        file=out.file, width=width, highlight=False, emoji=False, no_color=out.no_color
    )
    badge = f", {document.badge}" if document.badge else ""
    console.print(RichText(f"{printable(document.title)}{badge}", style="bold"), soft_wrap=True)
    for item in (item for section in document.sections for item in section.items):
        if isinstance(item, Text) and item.console:
            label = f"{printable(item.label)}: " if item.label else ""
            console.print(RichText(label + printable(item.body), style=_STYLES.get(item.tone, "")))
        elif isinstance(item, Table) and item.console:
            console.print(rich_table(item.leading))


def rich_table(table: Table) -> RichTable:
    """Return a table for the terminal: names may fold, numbers do not."""
    found = RichTable(
        title=printable(table.title),
        caption=printable(table.note) if table.note else None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        padding=(0, 1, 0, 0),
    )
    for number, name in enumerate(table.header):
        is_name = number < table.heads or table.words
        longest = max((len(printable(row[number])) for row in table.rows), default=0)
        found.add_column(
            RichText(printable(name)),
            justify="left" if is_name else "right",
            overflow="fold",
            min_width=min(longest, 32) if number == 0 else None,
            vertical="bottom",
        )
    for row in table.rows:
        cells = ((printable(cell), _STYLES.get(getattr(cell, "tone", ""), "")) for cell in row)
        found.add_row(*(RichText(text, style=style) for text, style in cells))
    return found
