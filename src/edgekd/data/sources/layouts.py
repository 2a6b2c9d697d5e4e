"""Data sets of DomainBed, recognised by the names of their domain folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_PARTS = ("train", "crossval", "val", "test", "full")


@dataclass(frozen=True)
class Layout:
    """A published data set, with remarks for comparing with published results."""

    name: str
    domains: tuple[str, ...]
    """In DomainBed's order, that of the sorted folders (domainbed/datasets.py)."""
    caution: str = ""
    other_names: tuple[str, ...] = ()
    """Names of the domains in another archive."""
    numbered: tuple[str, ...] = ()
    """Names of the classes that this archive numbers from 0."""

    @property
    def remark(self) -> str:
        return (
            f"has the layout of DomainBed's {self.name}; all images are measured, but DomainBed uses 80 % per domain"
            + (f"; {self.caution}." if self.caution else ".")
        )


LAYOUTS = (
    Layout("PACS", ("art_painting", "cartoon", "photo", "sketch")),
    Layout(
        "VLCS",
        ("Caltech101", "LabelMe", "SUN09", "VOC2007"),
        other_names=("CALTECH", "LABELME", "SUN", "PASCAL"),
        numbered=("bird", "car", "chair", "dog", "person"),
    ),
    Layout("OfficeHome", ("Art", "Clipart", "Product", "Real World")),
    Layout(
        "TerraIncognita",
        ("location_100", "location_38", "location_43", "location_46"),
        "classes are imbalanced and some are missing at some locations, so prefer macro accuracy to top-1",
    ),
    Layout(
        "DomainNet",
        ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
        "DomainBed removes a published list of duplicates, which are kept here",
    ),
)


def known_layout(domains: Iterable[str]) -> Layout | None:
    """Return the layout with these domains, ignoring underscores, spaces and case."""
    found = {_plain(name) for name in domains}
    return next(
        (
            layout
            for layout in LAYOUTS
            for names in (layout.domains, layout.other_names)
            if names and found == {_plain(name) for name in names}
        ),
        None,
    )


def class_names(domains: Iterable[str], classes: Sequence[str]) -> tuple[str, ...]:
    """Return `classes`, or their names if a known archive numbers them."""
    layout = known_layout(domains)
    if layout is None or list(classes) != [str(number) for number in range(len(layout.numbered))]:
        return tuple(classes)
    return layout.numbered or tuple(classes)


def whole_parts(folders: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the `(domain, part)` folders with the images of a known archive; empty for other layouts.

    An archive of VLCS has CALTECH/train, /crossval, /test and /full with numbered classes. `full` has the images of the
    other three, which are used if `full` is missing.
    """
    found = set(folders)
    layout = known_layout({domain for domain, _ in found})
    if (
        layout is None
        or not layout.other_names
        or any(part.lower() not in _PARTS for _, part in found)
    ):
        return set()
    complete = {domain for domain, part in found if part.lower() == "full"}
    return {
        (domain, part) for domain, part in found if domain not in complete or part.lower() == "full"
    }


def unwrapped(spec: str) -> str:
    """Return `spec`, or the single folder in it with a known layout (PACS unpacks to `kfold/`)."""
    root = Path(spec)
    if not root.is_dir() or known_layout(_folders(root)) is not None:
        return spec
    inside = [root / name for name in _folders(root)]
    fitting = [folder for folder in inside if known_layout(_folders(folder)) is not None]
    return str(fitting[0]) if len(fitting) == 1 else spec


def _folders(root: Path) -> list[str]:
    try:
        return [
            item.name
            for item in os.scandir(root)
            if item.is_dir() and not item.name.startswith((".", "__"))
        ]
    except OSError:
        return []


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace(" ", "").replace("-", "")
