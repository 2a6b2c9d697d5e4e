"""Read COCO-style annotations as image labels."""

from __future__ import annotations

import posixpath
from pathlib import Path

from edgekd.core.console import Tally
from edgekd.core.errors import EdgekdError
from edgekd.core.readers import printable, read_object
from edgekd.data.sources.manifests import is_missing
from edgekd.data.sources.scan import Entry, Listing, shown

_HINT = 'A COCO file has "images", "annotations" and "categories".'


def list_coco(path: Path) -> Listing:
    """Read a COCO `.json`. Images whose annotations all have one category get it as label; others are left out.

    Names of images are relative to the file's folder, to `images/` in it or next to it, or to COCO's own folder for the
    file (`instances_val2017.json` → `val2017/`).

    Raises:
        EdgekdError: the annotations are invalid, images are missing, or a path leads out of the folder.
    """
    data = read_object(path, "COCO file", _HINT)
    try:
        names = {one["id"]: printable(str(one["name"])) for one in data["categories"]}
        files = {one["id"]: posixpath.normpath(str(one["file_name"])) for one in data["images"]}
        # One file may be listed under several ids.
        found: dict[str, set[str]] = {file: set() for file in files.values()}
        for one in data["annotations"]:
            if one["image_id"] in files:
                found[files[one["image_id"]]].add(names[one["category_id"]])
    except (KeyError, TypeError) as error:
        raise EdgekdError(f"{path} is not a COCO file ({error}).", _HINT) from error
    if any(map(is_missing, names.values())):
        raise EdgekdError(f"{path} has a category without a name.", _HINT)
    outside = next((file for file in found if file.startswith(("../", "/")) or file == ".."), None)
    if outside is not None:
        raise EdgekdError(
            f"{path} lists {shown(outside)}, which is outside its folder.",
            "Use paths relative to the folder, or list the images in a manifest.",
        )
    left_out = Tally()
    entries = []
    for file, labels in found.items():
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
        f"{shown(first)}, listed in {path}, is in none of {', '.join(map(str, places[:4]))}.",
        "Move the file next to its images.",
    )
