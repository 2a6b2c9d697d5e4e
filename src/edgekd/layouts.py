"""DomainBed's data sets, known by the names of their domain folders."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """A data set that others report numbers on, and what to mind beside theirs."""

    name: str
    domains: tuple[str, ...]
    """In DomainBed's order, which is that of the sorted folders (domainbed/datasets.py)."""
    caution: str = ""

    @property
    def remark(self) -> str:
        return (
            f"laid out as DomainBed's {self.name}; whole domains are measured, DomainBed's tables use 80 % of each"
            + (f"; {self.caution}." if self.caution else ".")
        )


LAYOUTS = (
    Layout("PACS", ("art_painting", "cartoon", "photo", "sketch")),
    Layout("VLCS", ("Caltech101", "LabelMe", "SUN09", "VOC2007")),
    Layout("OfficeHome", ("Art", "Clipart", "Product", "Real World")),
    Layout(
        "TerraIncognita",
        ("location_100", "location_38", "location_43", "location_46"),
        "classes are very uneven and some locations lack some, so macro accuracy says more than top-1",
    ),
    Layout(
        "DomainNet",
        ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
        "DomainBed removes a published list of duplicates, which is not done here",
    ),
)


def known_layout(domains: Iterable[str]) -> Layout | None:
    """The layout whose domains these are; underscores, spaces and case do not count."""
    found = {_plain(name) for name in domains}
    return next((layout for layout in LAYOUTS if found == {_plain(name) for name in layout.domains}), None)


def unwrapped(spec: str) -> str:
    """`spec`, or the one folder in it that holds a known layout (PACS unpacks to `kfold/`)."""
    root = Path(spec)
    if not root.is_dir() or known_layout(_folders(root)) is not None:
        return spec
    inside = [root / name for name in _folders(root)]
    fitting = [folder for folder in inside if known_layout(_folders(folder)) is not None]
    return str(fitting[0]) if len(fitting) == 1 else spec


def _folders(root: Path) -> list[str]:
    try:
        return [item.name for item in os.scandir(root) if item.is_dir() and not item.name.startswith((".", "__"))]
    except OSError:
        return []


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace(" ", "").replace("-", "")
