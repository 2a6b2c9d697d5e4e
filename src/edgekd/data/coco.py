"""COCO-style annotations as labels of whole images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekd.core.console import Tally
from edgekd.core.errors import EdgekdError
from edgekd.core.readers import printable, read_object
from edgekd.data.scan import Entry, Listing, shown

_HINT = 'A COCO file has "images", "annotations" and "categories".'


def list_coco(path: Path) -> Listing:
    """Read a COCO `.json`: an image whose annotations are all of one category has that label; others are left out.

    Names of images are relative to the file's folder, to `images/` in it or beside it, or to the folder that COCO
    names like the file (`instances_val2017.json` → `val2017/`).

    Raises:
        EdgekdError: no such annotations, or no image where they may lie.
    """
    data = read_object(path, "COCO file", _HINT)
    try:
        names = {one["id"]: printable(str(one["name"])) for one in data["categories"]}
        files = {one["id"]: str(one["file_name"]) for one in data["images"]}
        found: dict[Any, set[str]] = {}
        for one in data["annotations"]:
            found.setdefault(one["image_id"], set()).add(names[one["category_id"]])
    except (KeyError, TypeError) as error:
        raise EdgekdError(f"{path} is no COCO file ({error}).", _HINT) from error
    left_out = Tally()
    entries = []
    for number, file in files.items():
        labels = found.get(number, set())
        if len(labels) == 1:
            entries.append(Entry(file, next(iter(labels))))
            continue
        reason = "several categories" if labels else "no annotation"
        left_out.add(reason, shown(file))
    if not entries:
        raise EdgekdError(f"No image of {path} has exactly one category.", _HINT)
    ordered = tuple(sorted(entries, key=lambda entry: entry.path))
    return Listing(_root(path, ordered[0].path), ordered, (), left_out)


def _root(path: Path, first: str) -> Path:
    folder = path.parent
    own = path.stem.rpartition("_")[2]
    places = [
        folder,
        folder / "images",
        folder.parent / "images",
        folder.parent / own,
        folder.parent,
    ]
    for place in places:
        if (place / first).is_file():
            return place
    raise EdgekdError(
        f"{shown(first)}, which {path} names, lies in none of {', '.join(map(str, places[:4]))}.",
        "Move the file beside its images.",
    )
