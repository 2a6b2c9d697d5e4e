"""Check which listed files can be read, and compute their content keys.

Every file is decoded once, and the result is cached by size and modification time.
"""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgekd.core.console import say
from edgekd.core.errors import EdgekdError
from edgekd.core.files import read_index, short_hash, write_index
from edgekd.data.images import check_content
from edgekd.data.sources.scan import Listing, shown
from edgekd.data.sources.source import FileReader, Source

_MANY = 2000
"""Number of images above which a message is printed."""


def readable(path: Path, listing: Listing) -> Source:
    """Return the files of a listing that can be decoded, and warn about the others.

    Raises:
        EdgekdError: no file can be read, or none in a class folder.
    """
    keys, reasons = _verify(listing)
    for entry in listing.entries:
        if (reason := reasons.get(entry.path)) is not None:
            listing.left_out.add(reason, shown(entry.path))
    listing.left_out.warn(f"files of {path} left out")
    if not keys:
        reason, count = Counter(reasons.values()).most_common(1)[0]
        raise EdgekdError(
            f"None of the {len(listing.entries)} images of {path} can be read ({count} × {reason}).",
            "Check the files with an image viewer, and the paths if they are missing.",
        )
    entries = tuple(entry for entry in listing.entries if entry.path in keys)
    empty = sorted({*listing.folders} - {entry.label for entry in entries})
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise EdgekdError(
            f'The class folder "{shown(empty[0])}"{more} of {path} has no readable image.',
            "Add images, or remove the folder.",
        )
    return Source(
        name=shown(path.resolve().name if path.is_dir() else path.stem),
        entries=entries,
        keys=tuple(keys[entry.path] for entry in entries),
        reader=FileReader(listing.root.resolve(), tuple(entry.path for entry in entries)),
        root=listing.root,
        left_out=listing.left_out,
    )


def _verify(listing: Listing) -> tuple[dict[str, str], dict[str, str]]:
    """Return path → content key of every readable file, and path → reason of every other one.

    The key is the first 32 hex digits of the SHA-256. Readable files with the same size and modification time are not
    read again. Unreadable ones are read again, since permissions or the Pillow version may have changed.
    """
    index = f"images-{short_hash(os.path.realpath(listing.root))}"
    known = read_index(index, dict[str, tuple[int, int, str]]) or {}
    keys: dict[str, str] = {}
    stamps: dict[str, tuple[int, int]] = {}
    pending: list[str] = []
    for entry in listing.entries:
        try:
            facts = os.stat(listing.root / entry.path)
            stamps[entry.path] = (facts.st_size, facts.st_mtime_ns)
        except (OSError, ValueError):  # removed, or a name with a NUL
            stamps[entry.path] = (-1, -1)
        size, time_ns, key = known.get(shown(entry.path), (-1, -1, ""))
        if key and (size, time_ns) == stamps[entry.path]:
            keys[entry.path] = key
        else:
            pending.append(entry.path)
    if len(pending) >= _MANY:
        say(f"checking {len(pending):,} new images of {listing.root} …")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = list(pool.map(lambda path: check_content(listing.root / path), pending))
    reasons: dict[str, str] = {}
    for path, (key, reason) in zip(pending, outcomes, strict=True):
        (keys if key else reasons)[path] = key or reason
    fresh = {shown(path): (*stamps[path], key) for path, key in keys.items()}
    if any(known.get(path) != value for path, value in fresh.items()):
        # Several manifests of a folder share one index, so merge it.
        write_index(index, known | fresh)
    return keys, reasons
