"""Image sets: classes, domains, labels, content hashes, and a reader of the images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgekd.core.console import Tally, warn
from edgekd.core.errors import EdgekdError, check_known
from edgekd.core.readers import like_names
from edgekd.data import toy
from edgekd.data.sources import open_source, scan
from edgekd.data.sources.layouts import class_names
from edgekd.data.sources.source import FileReader, Source

NO_CLASS = -1
"""Label of an image without a label or of none of the classes."""
_LONGEST_NAME = 255
"""Maximum length of a class or domain name, as for folder names."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N labelled images, in a fixed order. Picklable; `read` may be called from many threads.

    Attributes:
        name: name for reports.
        classes: in label order, as the user wrote them.
        domains: `("all",)` if the data has no domains.
        labels, domain_of: int64 `[N]`, indices into `classes` and `domains`.
        keys: 32 hex digits of each image's content hash.
        ids: readable and unique, for example `sketch/dog/5282.png`.
        roles: `train`, `val` or `test` per image if the data is already split, else None.
        reader: returns the i-th image, RGB. The second argument is the `draft` of `read`, which may be ignored.
    """

    name: str
    classes: tuple[str, ...]
    domains: tuple[str, ...]
    labels: NDArray[np.int64]
    domain_of: NDArray[np.int64]
    keys: tuple[str, ...]
    ids: tuple[str, ...]
    roles: tuple[str, ...] | None
    reader: Callable[..., Image.Image]

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def without_labels(
        cls,
        name: str,
        keys: Sequence[str],
        ids: Sequence[str],
        reader: Callable[..., Image.Image],
        classes: tuple[str, ...] = (),
    ) -> ImageSet:
        """Return a set of images without labels, in which every label is `NO_CLASS`."""
        labels = np.full(len(keys), NO_CLASS, dtype=np.int64)
        places = np.zeros(len(keys), dtype=np.int64)
        return cls(name, classes, ("all",), labels, places, tuple(keys), tuple(ids), None, reader)

    def of_classes(self, names: Sequence[str]) -> ImageSet:
        """Return only the images of these classes, labelled in the order of `names`, which must exist."""
        for name in names:
            check_known(name, self.classes, f'{self.name} has no class "{name}".')
        place = np.full(len(self.classes), -1, dtype=np.int64)
        place[[self.classes.index(name) for name in names]] = np.arange(len(names))
        kept = np.flatnonzero(place[self.labels] >= 0)
        return replace(self.at(kept), classes=tuple(names), labels=place[self.labels[kept]])

    def at(self, kept: NDArray[np.int64]) -> ImageSet:
        """Return only the images at these indices, in that order, with the same classes and domains."""
        chosen, reader = kept.tolist(), self.reader
        if isinstance(reader, FileReader):  # its files can be copied to a device
            reader = FileReader(reader.root, tuple(reader.paths[i] for i in chosen))
        else:
            reader = _Chosen(reader, kept)
        return replace(
            self,
            labels=self.labels[kept],
            domain_of=self.domain_of[kept],
            keys=tuple(self.keys[i] for i in chosen),
            ids=tuple(self.ids[i] for i in chosen),
            roles=tuple(self.roles[i] for i in chosen) if self.roles is not None else None,
            reader=reader,
        )

    def with_keys(self, keys: Collection[str]) -> ImageSet:
        """Return the images whose content key is one of `keys`."""
        return self.at(np.flatnonzero([key in keys for key in self.keys]))

    def read(self, index: int, *, draft: int | None = None) -> Image.Image:
        """Return the image at `index`, RGB, 8 bits.

        Args:
            draft: minimum short side in pixels if a JPEG is decoded at reduced size. None: decode at full size.
        """
        return self.reader(index) if draft is None else self.reader(index, draft)


@dataclass(frozen=True, eq=False)
class _Chosen:
    """A reader of a subset of another reader's images."""

    reader: Callable[..., Image.Image]
    indices: NDArray[np.int64]

    def __call__(self, index: int, *draft: int) -> Image.Image:
        return self.reader(int(self.indices[index]), *draft)


@dataclass(frozen=True, eq=False)
class JoinedReader:
    """A reader of the images of several sets, in order."""

    parts: tuple[ImageSet, ...]

    def __call__(self, index: int, draft: int | None = None) -> Image.Image:
        for part in self.parts:
            if index < len(part):
                return part.read(index, draft=draft)
            index -= len(part)
        raise IndexError(index)


def load_images(spec: str | Path, *, one_class: bool = False) -> ImageSet:
    """Load `spec`: `toy`, a folder, a manifest (`.csv`, `.parquet`, COCO's `.json`), WebDataset shards, or `hf:NAME`.

    Unreadable files are left out, with one warning. Images are sorted by path.

    Args:
        one_class: whether images of a single class are allowed, as in a test set.

    Raises:
        EdgekdError: as for `open_source`, or if there is only one class.
    """
    if str(spec) == "toy":
        return toy_images()
    return _labelled(str(spec), open_source(str(spec)), one_class)


def toy_images(seed: int = 0, per_class: int = toy.PER_CLASS, world: bool = False) -> ImageSet:
    """Return the toy suite with `per_class` images of each class in each domain.

    Suites with different seeds, or of the teacher (`world`), have no images in common.
    """
    reader = toy.ToyReader(seed, per_class, world)
    places = np.array([reader.place(i) for i in range(len(reader))], dtype=np.int64)
    return ImageSet(
        name="toy",
        classes=toy.CLASSES,
        domains=toy.DOMAINS,
        labels=places[:, 1].copy(),
        domain_of=places[:, 0].copy(),
        keys=tuple(reader.key(i) for i in range(len(reader))),
        ids=tuple(
            f"{toy.DOMAINS[d]}/{toy.CLASSES[c]}/{number:04d}" for d, c, number in places.tolist()
        ),
        roles=None,
        reader=reader,
    )


def _labelled(source: str, found: Source, one_class: bool) -> ImageSet:
    """Return the images of a source with their classes in order."""
    entries = found.entries
    labels = {entry.label for entry in entries}
    _check_names(source, "class", labels)
    _check_names(source, "domain", {entry.domain or "all" for entry in entries})
    if len(labels) < 2 and not one_class:
        raise EdgekdError(
            f'{source} has only one class, "{scan.shown(entries[0].label)}".',
            f"A classifier needs at least two; {scan.CONVENTIONS}",
        )
    class_order = scan.order_classes(labels)
    domain_order = sorted({entry.domain or "all" for entry in entries})
    shown = (
        scan.display_names(found.root, class_order)
        if found.root is not None
        else tuple(scan.shown(label) for label in class_order)
    )
    _check_names(source, "class", shown)
    images = ImageSet(
        name=found.name,
        classes=class_names(domain_order, shown),
        domains=tuple(scan.shown(domain) for domain in domain_order),
        labels=_positions([entry.label for entry in entries], class_order),
        domain_of=_positions([entry.domain or "all" for entry in entries], domain_order),
        keys=found.keys,
        ids=scan.shown_names(entry.path for entry in entries),
        roles=tuple(str(entry.role) for entry in entries) if entries[0].role is not None else None,
        reader=found.reader,
    )
    _warn_of(images)
    return images


def _check_names(source: str, kind: str, names: Collection[str]) -> None:
    longest = max(names, key=len)
    if len(longest) > _LONGEST_NAME:
        raise EdgekdError(
            f"{source} has a {kind} whose name has {len(longest):,} characters: {scan.shown(longest[:40])}….",
            f"Use names of at most {_LONGEST_NAME} characters.",
        )


def _positions(names: list[str], order: list[str]) -> NDArray[np.int64]:
    place = {name: index for index, name in enumerate(order)}
    return np.array([place[name] for name in names], dtype=np.int64)


def _warn_of(images: ImageSet) -> None:
    """Warn about classes missing in a domain, equal images with different labels, and class names that are alike."""
    present = set(zip(images.domain_of.tolist(), images.labels.tolist(), strict=True))
    for d, domain in enumerate(images.domains):
        lacking = [name for c, name in enumerate(images.classes) if (d, c) not in present]
        if lacking:
            warn(
                f"domain {domain} has no image of {len(lacking)} of {len(images.classes)} classes: {some(lacking)}."
            )
    first: dict[str, int] = {}
    contradictions = Tally()
    for index, key in enumerate(images.keys):
        other = first.setdefault(key, index)
        if images.labels[index] != images.labels[other]:
            contradictions.add(
                "same content, different label", f"{images.ids[other]} and {images.ids[index]}"
            )
    contradictions.warn(f"{images.name} has contradictory labels")
    alike = [", ".join(f'"{name}"' for name in group) for group in like_names(images.classes)]
    if alike:
        warn(
            f"classes of {images.name} differ only in case, spaces, hyphens or underscores: {some(alike)}. Their text "
            "embeddings are the same, so a teacher cannot distinguish them. Merge them, or rename them in classes.txt."
        )


def some(names: Sequence[str]) -> str:
    """Return the first six names as text."""
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
