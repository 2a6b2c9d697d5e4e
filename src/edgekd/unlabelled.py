"""Images without labels: a folder of pictures, however deep they lie."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np

from edgekd import scan
from edgekd.data import FileReader, ImageSet, readable
from edgekd.errors import EdgekdError
from edgekd.images import EXTENSIONS

NO_CLASS = -1
"""Label of an image that shows none of the classes."""
_DEEPEST = 32


def load_unlabelled(folder: str | Path) -> ImageSet:
    """Every image in `folder` and the folders in it, of no class.

    Files that are no images or cannot be read are left out, with one warning. The order is that of the paths.

    Raises:
        EdgekdError: no such folder, no image in it, none that can be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise EdgekdError(f"There is no folder of images at {root}.", "Check the path.")
    entries: list[scan.Entry] = []
    passed_over: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for parts, names in scan.walk(root, deepest=_DEEPEST):
        for name in names:
            path, ending = "/".join((*parts, name)), os.path.splitext(name)[1].lower()
            if ending in EXTENSIONS:
                entries.append(scan.Entry(path, ""))
            else:
                reason = f"file ending {ending or 'in nothing'}"
                passed_over[reason] += 1
                examples.setdefault(reason, scan.shown(path))
    if not entries:
        kinds = ", ".join(f"{count} × {reason}" for reason, count in passed_over.most_common(3))
        raise EdgekdError(
            f"{root} holds no image{f' ({kinds})' if kinds else ''}.",
            f"Images end in {', '.join(sorted(EXTENSIONS))}.",
        )
    ordered = tuple(sorted(entries, key=lambda entry: entry.path))
    found, keys = readable(root, scan.Listing(root, ordered, (), passed_over, examples))
    return ImageSet(
        name=scan.shown(root.resolve().name),
        classes=(),
        domains=("all",),
        labels=np.full(len(found), NO_CLASS, dtype=np.int64),
        domain_of=np.zeros(len(found), dtype=np.int64),
        keys=tuple(keys[entry.path] for entry in found),
        ids=tuple(scan.shown(entry.path) for entry in found),
        roles=None,
        reader=FileReader(root.resolve(), tuple(entry.path for entry in found)),
    )
