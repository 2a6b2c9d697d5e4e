"""A document as one HTML file that needs no network and no script, for light, dark, phone and paper."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from edgekd.benchmark.report.charts import DARK, LIGHT
from edgekd.benchmark.report.sections import Document, Figure, Item, Text, printable
from edgekd.version import __version__


def html(document: Document) -> str:
    """Return a document as HTML; everything that is not markup of our own is escaped."""
    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
    )
    keys = iter(range(10_000))
    return environment.get_template("page.html").render(
        document=document,
        kind=_kind,
        groups=_groups,
        drawings=lambda figure: _drawings(figure, f"f{next(keys)}"),
        style=Markup(_style(folder)),
        version=__version__,
    )


def _kind(item: Item) -> str:
    return type(item).__name__.lower()


def _groups(items: Sequence[Item]) -> list[tuple[str, list[Item]]]:
    """Group neighbours: entries of a list, figures side by side, and everything else."""

    def group(item: Item) -> str:
        if isinstance(item, Text) and item.label:
            return "entries"
        return "halves" if isinstance(item, Figure) and item.half else "block"

    return [(name, list(found)) for name, found in itertools.groupby(items, group)]


def _drawings(figure: Figure, key: str) -> list[Markup]:
    return [Markup(drawing) for drawing in figure.draw(key)]


def _style(folder: Path) -> str:
    """Return the style sheet with the palettes of the charts in it."""
    text = (folder / "style.css").read_text(encoding="utf-8")
    for name, palette in (("LIGHT", LIGHT), ("DARK", DARK)):
        text = text.replace(
            f"/* {name} */", " ".join(f"--{role}: {value};" for role, value in palette.items())
        )
    return text
