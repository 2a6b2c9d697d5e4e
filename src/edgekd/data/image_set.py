"""The images a run works on: classes, domains, labels and content hashes, and how to read the i-th picture."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgekd.core.console import say, warn, warn_counted
from edgekd.core.errors import EdgekdError, did_you_mean
from edgekd.core.files import cache_root, short_hash, write_text
from edgekd.core.readers import read_json
from edgekd.data import scan
from edgekd.data.images import UnreadableImage, decode, read_bytes
from edgekd.data.layouts import class_names
from edgekd.targets.bank import like_names

_INDEX_VERSION = 1
_WORTH_SAYING = 2000
"""From this many images to look at, the user is told what takes so long."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N labelled images, in a fixed order. Picklable; `read` may be called from many threads.

    Attributes:
        name: short name of the data, for reports.
        classes: class names in label order, as the user wrote them.
        domains: domain names; `("all",)` when the data knows no domains.
        labels: int64 `[N]`, index into `classes`.
        domain_of: int64 `[N]`, index into `domains`.
        keys: 32 hex digits of each image's content hash.
        ids: readable and unique, for example `sketch/dog/5282.png`.
        roles: per image `train`, `val` or `test` when the data came split, else None.
        reader: the i-th image, RGB.
    """

    name: str
    classes: tuple[str, ...]
    domains: tuple[str, ...]
    labels: NDArray[np.int64]
    domain_of: NDArray[np.int64]
    keys: tuple[str, ...]
    ids: tuple[str, ...]
    roles: tuple[str, ...] | None
    reader: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.keys)

    def of_classes(self, names: Sequence[str]) -> ImageSet:
        """The images of these classes alone, in the same order, with labels numbered in the order of `names`.

        Raises:
            EdgekdError: a name that is not among the classes.
        """
        for name in names:
            if name not in self.classes:
                raise EdgekdError(
                    f'{self.name} has no class "{name}".', did_you_mean(name, self.classes)
                )
        place = np.full(len(self.classes), -1, dtype=np.int64)
        place[[self.classes.index(name) for name in names]] = np.arange(len(names))
        kept = np.flatnonzero(place[self.labels] >= 0)
        return replace(self.at(kept), classes=tuple(names), labels=place[self.labels[kept]])

    def at(self, kept: NDArray[np.int64]) -> ImageSet:
        """The images at these indices alone, in that order, with the same classes and domains."""
        chosen = kept.tolist()
        reader: Callable[..., Image.Image]
        if isinstance(self.reader, FileReader):
            reader = FileReader(self.reader.root, tuple(self.reader.paths[i] for i in chosen))
        else:
            reader = _Chosen(self.reader, tuple(chosen))
        return replace(
            self,
            labels=self.labels[kept],
            domain_of=self.domain_of[kept],
            keys=tuple(self.keys[i] for i in chosen),
            ids=tuple(self.ids[i] for i in chosen),
            roles=tuple(self.roles[i] for i in chosen) if self.roles is not None else None,
            reader=reader,
        )

    def read(self, index: int, *, draft: int | None = None) -> Image.Image:
        """The image at `index`, RGB, 8 bits.

        Args:
            draft: short side wanted, in pixels; a JPEG file may then come at a fraction of its size, which is
                faster, but never below `draft`. Measurements leave it out and get every pixel.
        """
        if draft is not None and isinstance(self.reader, FileReader | JoinedReader):
            return self.reader(index, draft)
        return self.reader(index)


@dataclass(frozen=True)
class FileReader:
    """Reads the i-th file below `root`.

    Raises:
        EdgekdError: on calling, when a file that was readable before no longer is.
    """

    root: Path
    paths: tuple[str, ...]

    def __call__(self, index: int, draft: int | None = None) -> Image.Image:
        path = self.root / self.paths[index]
        try:
            return decode(path, draft=draft)
        except UnreadableImage as error:
            raise EdgekdError(
                f"{scan.shown(str(path))} could be read when the run began, and cannot be now: {error.reason}.",
                "Restore the file, or start again without it.",
            ) from error


@dataclass(frozen=True)
class _Chosen:
    """Some of another reader's images."""

    reader: Callable[[int], Image.Image]
    indices: tuple[int, ...]

    def __call__(self, index: int) -> Image.Image:
        return self.reader(self.indices[index])


@dataclass(frozen=True, eq=False)
class JoinedReader:
    """Reads the images of several sets, one set after the other."""

    parts: tuple[ImageSet, ...]

    def __call__(self, index: int, draft: int | None = None) -> Image.Image:
        for part in self.parts:
            if index < len(part):
                return part.read(index, draft=draft)
            index -= len(part)
        raise IndexError(index)


def load_images(spec: str | Path, *, one_class: bool = False) -> ImageSet:
    """Load `spec`: `toy`, a folder, or a `.csv` or `.parquet` manifest (conventions: `edgekd.data.scan`).

    Every file is decoded once and remembered by its size and time; those that cannot be read are left out, with one
    warning. The order is that of the paths.

    Args:
        one_class: images of a single class will do, as a test set may hold them.

    Raises:
        EdgekdError: nothing there, no class folders, no readable image, only one class, a manifest that does not fit.
    """
    if str(spec) == "toy":
        from edgekd.data.toy import KeptReader, ToyReader, toy_images

        images = toy_images()
        assert isinstance(images.reader, ToyReader)
        return replace(images, reader=KeptReader(images.reader))
    path = Path(spec)
    if path.is_dir():
        listing = scan.list_folder(path)
    elif path.suffix.lower() in scan.MANIFESTS and path.is_file():
        listing = scan.list_manifest(path)
    elif path.exists():
        raise EdgekdError(f"{path} is a file where a folder is expected.", scan.CONVENTIONS)
    else:
        raise EdgekdError(
            f"There is no data at {path}.", "Check the path, or use the built-in data: --data toy."
        )
    return _assemble(path, listing, one_class)


def readable(path: Path, listing: scan.Listing) -> tuple[list[scan.Entry], dict[str, str]]:
    """The entries that can be decoded, and the content key of each path; the others are left out with one warning.

    Raises:
        EdgekdError: none can be read.
    """
    keys, reasons = _verify(listing)
    trouble, examples = Counter(listing.passed_over), dict(listing.examples)
    for entry in listing.entries:
        if (reason := reasons.get(entry.path)) is not None:
            trouble[reason] += 1
            examples.setdefault(reason, scan.shown(entry.path))
    warn_counted(f"files of {path} left out", trouble, examples)
    if not keys:
        reason, count = Counter(reasons.values()).most_common(1)[0]
        raise EdgekdError(
            f"None of the {len(listing.entries)} images of {path} can be read ({count} × {reason}).",
            "Check the files with an image viewer, and the paths if they are missing.",
        )
    return [entry for entry in listing.entries if entry.path in keys], keys


def _assemble(path: Path, listing: scan.Listing, one_class: bool) -> ImageSet:
    entries, keys = readable(path, listing)
    labels = {entry.label for entry in entries}
    empty = [name for name in listing.folders if name not in labels]
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise EdgekdError(
            f'The class folder "{scan.shown(empty[0])}"{more} of {path} holds no readable image.',
            "Add images, or remove the folder.",
        )
    if len(labels) < 2 and not one_class:
        raise EdgekdError(
            f'{path} has only one class, "{scan.shown(entries[0].label)}".',
            f"A classifier needs two; {scan.CONVENTIONS}",
        )
    class_order = scan.order_classes(labels)
    domain_order = sorted({entry.domain for entry in entries if entry.domain is not None}) or [
        "all"
    ]
    classes = class_names(domain_order, scan.display_names(listing.root, class_order))
    images = ImageSet(
        name=scan.shown(path.resolve().name if path.is_dir() else path.stem),
        classes=classes,
        domains=tuple(scan.shown(name) for name in domain_order),
        labels=_positions([entry.label for entry in entries], class_order),
        domain_of=_positions([entry.domain or "all" for entry in entries], domain_order),
        keys=tuple(keys[entry.path] for entry in entries),
        ids=scan.shown_names(entry.path for entry in entries),
        roles=tuple(str(entry.role) for entry in entries) if entries[0].role is not None else None,
        reader=FileReader(listing.root.resolve(), tuple(entry.path for entry in entries)),
    )
    _warn_gaps(images)
    _warn_contradictions(images)
    _warn_like_names(images)
    return images


def _positions(names: list[str], order: list[str]) -> NDArray[np.int64]:
    place = {name: index for index, name in enumerate(order)}
    return np.array([place[name] for name in names], dtype=np.int64)


def _warn_gaps(images: ImageSet) -> None:
    """Say which domain lacks which class."""
    present = set(zip(images.domain_of.tolist(), images.labels.tolist(), strict=True))
    for d, domain in enumerate(images.domains):
        lacking = [name for c, name in enumerate(images.classes) if (d, c) not in present]
        if lacking:
            warn(
                f"domain {domain} has no image of {len(lacking)} of {len(images.classes)} classes: {_some(lacking)}."
            )


def _warn_contradictions(images: ImageSet) -> None:
    """Say which content appears under two labels."""
    first: dict[str, int] = {}
    found: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for index, key in enumerate(images.keys):
        other = first.setdefault(key, index)
        if images.labels[index] != images.labels[other]:
            found["same content, different label"] += 1
            examples.setdefault(
                "same content, different label", f"{images.ids[other]} and {images.ids[index]}"
            )
    warn_counted(f"{images.name} contradicts itself", found, examples)


def _warn_like_names(images: ImageSet) -> None:
    """Name the classes that a teacher reads alike: of each pair one can never win."""
    groups = [", ".join(f'"{name}"' for name in group) for group in like_names(images.classes)]
    if groups:
        warn(
            f"classes of {images.name} that differ in case, spaces, hyphens or underscores only: {_some(groups)}. A "
            "teacher reads them alike, and of each pair one can never win. Bring them together, or use classes.txt."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")


def _verify(listing: scan.Listing) -> tuple[dict[str, str], dict[str, str]]:
    """Path → content key of every readable file, path → reason of every other one.

    The key is the first 32 hex digits of the SHA-256. What was readable at the same size and modification time need
    not be read again; what was not is tried anew, since a permission or a Pillow release may have changed it.
    """
    index_file = cache_root() / "index" / f"{short_hash(os.path.realpath(listing.root))}.json"
    known = _read_index(index_file)
    keys: dict[str, str] = {}
    stamps: dict[str, tuple[int, int]] = {}
    pending: list[str] = []
    for entry in listing.entries:
        try:
            facts = os.stat(listing.root / entry.path)
            stamps[entry.path] = (facts.st_size, facts.st_mtime_ns)
        except (OSError, ValueError):  # gone, or a name with a NUL
            stamps[entry.path] = (-1, -1)
        size, time_ns, key = known.get(scan.shown(entry.path), (-1, -1, ""))
        if key and (size, time_ns) == stamps[entry.path]:
            keys[entry.path] = key
        else:
            pending.append(entry.path)
    if len(pending) >= _WORTH_SAYING:
        say(f"Looking once at {len(pending):,} images of {listing.root} …")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = dict(
            zip(pending, pool.map(lambda path: _look(listing.root / path), pending), strict=True)
        )
    keys |= {path: key for path, (key, _) in outcomes.items() if key}
    fresh = {scan.shown(path): (*stamps[path], key) for path, key in keys.items()}
    if any(known.get(path) != value for path, value in fresh.items()):
        # Two manifests of one folder share the index, hence the union.
        _write_index(index_file, known | fresh)
    return keys, {path: reason for path, (_, reason) in outcomes.items() if reason}


def _look(path: Path) -> tuple[str, str]:
    """(key, "") of a readable file, ("", reason) of another."""
    try:
        content = read_bytes(path)
        # A JPEG decodes faster at a fraction of its size, and a cut or torn one still fails.
        decode(content, draft=32)
    except UnreadableImage as error:
        return "", error.reason
    return content_key(content), ""


def content_key(content: bytes) -> str:
    """Return the first 32 hex digits of the SHA-256 of a file's bytes."""
    return hashlib.sha256(content).hexdigest()[:32]


def _read_index(path: Path) -> dict[str, tuple[int, int, str]]:
    if not os.path.exists(path):  # or it lies where this user may not look
        return {}
    try:
        stored = read_json(path, "index of images")
        if stored["version"] != _INDEX_VERSION:
            return {}
        return {
            str(name): (int(size), int(time_ns), _key(key))
            for name, (size, time_ns, key) in stored["files"].items()
        }
    except (EdgekdError, KeyError, TypeError, ValueError, AttributeError):
        warn(f"the index {path} is damaged; the images are checked again.")
        return {}


def _key(text: str) -> str:
    """A content key as it is stored; anything else is a `ValueError`."""
    if len(text) != 32:
        raise ValueError(text)
    int(text, 16)
    return text


def _write_index(path: Path, files: dict[str, tuple[int, int, str]]) -> None:
    try:
        write_text(path, json.dumps({"version": _INDEX_VERSION, "files": files}))
    except (EdgekdError, OSError) as error:
        warn(
            f"the images will be checked again next time, since {path} could not be written ({error})."
        )
