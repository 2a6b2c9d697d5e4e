"""Sections as Markdown. Whatever users named stays text: no HTML, link, image, column, emphasis or heading of
theirs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from edgekd.benchmark.report.sections import Document, Figure, Item, Section, Table, Text, printable

_SPECIAL = re.compile(
    r"[\\|<>`*~$]|!(?=\[)|\[(?=[^\[\]]*\][(\[:])|(?<!\w)_|_(?!\w)|&(?=#?\w+;)|(?<=:)/(?=/)"
)
_LEADING = re.compile(r"^(?=#+(\s|$)|[-+=](\s|$)|=+$|-{3,})")


def escape(text: object) -> str:
    """Return text as Markdown that renders as this very text, on one line."""
    line = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", _SPECIAL.sub(r"\\\g<0>", printable(text)))
    return re.sub(r"\bwww\.", r"www\.", _LEADING.sub(r"\\", line))


def table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> list[str]:
    """Return the lines of a table."""
    head = tuple(header)
    lines = [f"| {' | '.join(map(escape, row))} |" for row in (head, *map(tuple, rows))]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def item(one: Item) -> Iterator[str]:
    """Yield the lines of one item, an empty one last; a drawing is left to the page."""
    if isinstance(one, Text):
        yield f"- **{escape(one.label)}**: {escape(one.body)}" if one.label else escape(one.body)
        if not one.label:
            yield ""
    elif isinstance(one, Table):
        yield from (f"### {escape(one.title)}", "", *table(one.header, one.rows), "")
        if one.note:
            yield from (escape(one.note), "")
    elif not isinstance(one, Figure):
        yield from (f"### {escape(one.title)}", "")
        yield from (
            f"- {escape(picture.name)}: {escape(' '.join(picture.lines))}"
            for picture in one.pictures
        )
        yield from ("", escape(one.note), "")


def section(one: Section) -> list[str]:
    """Return the lines of a section; one that holds drawings alone has none."""
    lines: list[str] = []
    for line in (line for part in one.items for line in item(part)):
        if lines and lines[-1].startswith("- ") and line and not line.startswith("- "):
            lines.append("")
        lines.append(line)
    return [f"## {escape(one.title)}", "", *lines, ""] if lines else []


def markdown(document: Document) -> str:
    """Return a document as Markdown."""
    title = escape(document.title) + (f" ({document.badge})" if document.badge else "")
    lines = [f"# {title}", "", escape(document.byline), ""]
    for one in document.sections:
        lines += section(one)
    text = "\n".join([*lines, *document.foot]).rstrip() + "\n"
    return re.sub(r"\n{3,}", "\n\n", text)
