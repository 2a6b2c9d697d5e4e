"""Read WebDataset shards: tar files with `KEY.jpg` and `KEY.cls`, `KEY.txt` or `KEY.json`.

`.cls` has the class index, `.txt` the class name, and `.json` an object with `label` and optionally `domain` and
`split`. Shards are local files or URLs that fsspec opens.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.core.ahead import map_ahead
from edgekd.core.console import Tally, say
from edgekd.core.errors import EdgekdError, first_line
from edgekd.core.files import read_index, short_hash, write_index
from edgekd.core.readers import NOT_REGULAR, parse_json, printable
from edgekd.data.images import EXTENSIONS, MAX_BYTES, check_content
from edgekd.data.sources.scan import Entry, role_of
from edgekd.data.sources.source import PackedReader, Source

_MOST_SHARDS = 100_000
_MOST_LABEL = 1 << 20
_AHEAD = 64
_BLOCK = 512


@dataclass(frozen=True)
class Row:
    """An image in a shard. `key` is empty if it cannot be read for `reason`, and `label` if there is none."""

    name: str
    offset: int
    size: int
    key: str
    reason: str
    label: str = ""
    domain: str | None = None
    split: str | None = None


@dataclass(frozen=True, eq=False)
class ShardBytes:
    """Map a row to its encoded image, read from its offset in its shard."""

    shards: tuple[str, ...]
    shard_of: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def __call__(self, row: int) -> bytes:
        start, size = int(self.offsets[row]), int(self.sizes[row])
        system, path = _file_system(self.shards[self.shard_of[row]])
        try:
            return bytes(system.cat_file(path, start=start, end=start + size))
        except Exception as error:  # file systems of fsspec raise their own types
            raise EdgekdError(
                f"The shard {self.shards[self.shard_of[row]]} cannot be read ({first_line(error)}).",
                "Restore it, and continue with --resume.",
            ) from error


def list_shards(spec: str, *, labelled: bool) -> Source:
    """List the images of all shards of `spec`; see `sources.open_source`."""
    shards = tuple(expanded(spec))
    entries: list[Entry] = []
    keys: list[str] = []
    places: list[tuple[int, int, int]] = []
    left_out = Tally()
    for number, shard in enumerate(shards):
        stem = shard.rsplit("/", 1)[-1].removesuffix(".tar")
        for row in _indexed(shard):
            name = f"{stem}/{row.name}"
            reason = row.reason or ("no label" if labelled and not row.label else "")
            if reason:
                left_out.add(reason, name)
                continue
            role = role_of(row.split, f"{row.name} in {shard}") if row.split and labelled else None
            entries.append(
                Entry(name, row.label, row.domain, role) if labelled else Entry(name, "")
            )
            keys.append(row.key)
            places.append((number, row.offset, row.size))
    if any(entry.role for entry in entries) and not all(entry.role for entry in entries):
        raise EdgekdError(
            f"Some images of {spec} have a split and others have none.",
            "Give all images a split, or none.",
        )
    where = np.array(places, dtype=np.int64).reshape(-1, 3)
    content = ShardBytes(shards, where[:, 0].astype(np.int32), where[:, 1], where[:, 2])
    folder = Path(shards[0]).parent
    return Source(
        name=printable(folder.name or "shards"),
        entries=tuple(entries),
        keys=tuple(keys),
        reader=PackedReader(content, np.arange(len(entries)), spec),
        root=folder if "://" not in spec else None,
        left_out=left_out,
    )


def expanded(spec: str) -> list[str]:
    """Expand a pattern with braces: `{000..127}` is a range, `{a,b}` a list.

    Raises:
        EdgekdError: a range is empty, or there are more than 100,000 shards.
    """
    specs = [spec]
    while found := re.search(r"\{([^{}]*)\}", specs[0]):
        inner = _counted(found[1])
        if len(inner) * len(specs) > _MOST_SHARDS:
            raise EdgekdError(
                f"{printable(spec)} is more than {_MOST_SHARDS:,} shards.", "Give fewer."
            )
        # All addresses have the same remaining braces, in the same order.
        halves = [one.split(found[0], 1) for one in specs]
        specs = [f"{before}{part}{after}" for before, after in halves for part in inner]
    return specs


def _counted(inner: str) -> Sequence[str]:
    """Return the expansion of the inside of a pair of braces."""
    span = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", inner)
    if span is None:
        return inner.split(",")
    first, last = int(span[1]), int(span[2])
    if not first <= last < first + _MOST_SHARDS:
        raise EdgekdError(f"{{{inner}}} is an empty range.", "Count upwards: {000..127}.")
    return [f"{number:0{len(span[1])}d}" for number in range(first, last + 1)]


def _file_system(shard: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(shard)
    except (ImportError, ValueError) as error:
        raise EdgekdError(
            f"{shard} cannot be opened ({first_line(error)}).",
            "Install the fsspec package for such addresses, or copy the shards to this machine.",
        ) from error
    return system, path


def _indexed(shard: str) -> list[Row]:
    """Return the rows of a shard, from the cache if the shard is unchanged."""
    system, path = _file_system(shard)
    try:
        stamp = str(system.ukey(path))
    except Exception as error:
        raise EdgekdError(
            f"There is no shard {shard}.", "Check the path and the numbers."
        ) from error
    index = f"shard-{short_hash(shard, stamp)}"
    if (stored := read_index(index, list[Row])) is not None:
        return stored
    say(f"reading {shard} once …")
    rows = list(_scan(system, path, shard))
    if not rows:
        raise EdgekdError(f"The shard {shard} has no images.", "Leave it out, or write it again.")
    write_index(index, [vars(row) for row in rows])
    return rows


def _scan(system: Any, path: str, shard: str) -> Iterator[Row]:
    """Read a shard once; images are decoded by threads, at most `_AHEAD` of them in memory."""
    facts: dict[str, dict[str, str]] = {}

    def checked(item: tuple[str, int, bytes, str]) -> Row:
        name, offset, data, reason = item
        key, reason = ("", reason) if reason else check_content(data)
        return Row(printable(name), offset, len(data), key, reason)

    rows: list[tuple[str, Row]] = []
    reason = ""
    with system.open(path, "rb") as handle:
        try:
            with tarfile.open(fileobj=handle, mode="r:") as tar:
                for row in map_ahead(checked, _images(tar, facts), _AHEAD):
                    rows.append((_stem(row.name), row))
                handle.seek(tar.offset)
                whole = handle.read(_BLOCK) == bytes(_BLOCK)
        # Malformed headers raise tarfile's own errors, ValueError, RecursionError and others.
        except Exception as error:
            if not rows and "empty file" in str(error):
                raise EdgekdError(f"The shard {shard} is empty.", "Write it again.") from error
            whole, reason = False, f" ({first_line(error)})"
    if not whole:
        raise EdgekdError(
            f"The shard {shard} is damaged or truncated after {len(rows):,} images{reason}.",
            "Copy or write it again.",
        )
    for stem, row in rows:
        yield Row(**{**vars(row), **facts.get(stem, {})})


def _images(
    tar: tarfile.TarFile, facts: dict[str, dict[str, str]]
) -> Iterator[tuple[str, int, bytes, str]]:
    """Yield name, offset and content of each image, and collect the labels in `facts`.

    The last value is the reason if an image cannot be read, else empty.
    """
    end = -1
    for member in tar:
        if member.offset <= end:  # with a negative size tarfile would read in an endless loop
            raise tarfile.ReadError("its members overlap")
        end = member.offset
        ending = os.path.splitext(member.name)[1].lower()
        is_image = ending in EXTENSIONS
        if not member.isreg() or not (is_image or ending in (".cls", ".txt", ".json")):
            continue
        # A sparse member can expand to any size and is not contiguous in the shard.
        reason = NOT_REGULAR if member.issparse() else ""
        if is_image and member.size > MAX_BYTES:
            reason = reason or "more than 1 GB"
        if is_image and reason:
            yield member.name, member.offset_data, b"", reason
            continue
        if reason or (not is_image and member.size > _MOST_LABEL):
            continue
        handle = tar.extractfile(member)
        data = handle.read() if handle is not None else b""
        if len(data) != member.size:
            raise tarfile.ReadError("unexpected end of data")
        if is_image:
            yield member.name, member.offset_data, data, ""
        else:
            facts.setdefault(_stem(printable(member.name)), {}).update(_facts(ending, data))


def _stem(name: str) -> str:
    """Return WebDataset's key: the path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _facts(ending: str, data: bytes) -> dict[str, str]:
    text = data.decode("utf-8", "replace").strip()
    if ending != ".json":
        return {"label": printable(text)} if text else {}
    try:
        found = parse_json(text)
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    known = {name: found.get(name) for name in ("label", "domain", "split")}
    return {
        name: printable(str(value))
        for name, value in known.items()
        if isinstance(value, str | int) and str(value)
    }
