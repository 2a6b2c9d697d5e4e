"""`edgekd data check`: find problems of a data set, and show them on a page with thumbnails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.report.elements import (
    Document,
    Gallery,
    Item,
    Picture,
    Table,
    Text,
    section,
    table,
)
from edgekd.benchmark.report.failures import jpeg_address
from edgekd.benchmark.report.render import html
from edgekd.configs.data import DataCheckConfig
from edgekd.core.console import say
from edgekd.core.errors import EdgekdError
from edgekd.core.files import write_text
from edgekd.core.folders import refuse_page
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.images import check_content
from edgekd.data.sources import is_packed, list_files, open_source, scan

MOST_SHOWN = 48
"""Maximum number of pictures in a gallery and rows in a table; the counts include all."""
MOST_PAIRS = 100_000
"""Maximum number of near-duplicates, the closest ones; a thousand pictures of one scene make half a million."""
_BLOCK_CELLS = 1 << 24


@dataclass(frozen=True)
class Pair:
    """Two images, by their indices, and the cosine of their embeddings (1 for equal contents)."""

    first: int
    second: int
    cosine: float = 1.0


@dataclass(frozen=True)
class Doubt:
    """An image whose label the teacher contradicts."""

    index: int
    teacher: str
    probability: float
    """Of the teacher's class, 0–1."""


@dataclass(frozen=True)
class DataCheck:
    """Findings. Near-duplicates and label errors are None without a teacher."""

    images: ImageSet
    page: Path
    unreadable: tuple[tuple[str, str], ...]
    """Name and reason."""
    duplicates: tuple[Pair, ...]
    near_duplicates: tuple[Pair, ...] | None = None
    label_errors: tuple[Doubt, ...] | None = None
    zero_shot: float | None = None
    """The teacher's accuracy on the labels, 0–1."""
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    """int64 `[domains, classes]`."""

    def across(self, pair: Pair) -> str:
        """Return in what the two images of a pair differ: labels, splits, domains, or nothing."""
        images, (a, b) = self.images, (pair.first, pair.second)
        differs = {
            "labels": images.labels[a] != images.labels[b],
            "splits": images.roles is not None and images.roles[a] != images.roles[b],
            "domains": images.domain_of[a] != images.domain_of[b],
        }
        return ", ".join(name for name, is_so in differs.items() if is_so)

    def summary(self) -> list[str]:
        """Return one line for each kind of finding."""
        sizes = self.counts.sum(axis=0)
        lines = [
            f"{len(self.images):,} images of {len(self.images.classes)} classes; the largest class has "
            f"{sizes.max():,}, the smallest {sizes.min():,}",
            f"unreadable: {len(self.unreadable):,}",
            f"duplicates: {self._counted(self.duplicates)}",
        ]
        if self.near_duplicates is not None and self.label_errors is not None:
            covered = len({i for pair in self.near_duplicates for i in (pair.first, pair.second)})
            lines += [
                f"near-duplicates: {self._counted(self.near_duplicates)}; they cover "
                f"{100 * covered / len(self.images):.0f} % of the images",
                f"probable label errors: {len(self.label_errors):,} (the teacher agrees with "
                f"{100 * (self.zero_shot or 0):.1f} % of all labels)",
            ]
        return lines

    def _counted(self, pairs: Sequence[Pair]) -> str:
        """Return the number of pairs, and of those across labels, splits or domains."""
        across = sum(bool(self.across(pair)) for pair in pairs)
        count = f"{len(pairs):,} pairs" + (" or more" if len(pairs) == MOST_PAIRS else "")
        return f"{count}, {across:,} of them across labels, splits or domains" if pairs else "none"


def check_data(config: DataCheckConfig) -> DataCheck:
    """Check a data set and write the page; see `edgekd.api.check_data`."""
    refuse_page(config.out, overwrite=config.overwrite)
    images = load_images(config.data, one_class=True)
    counts = np.zeros((len(images.domains), len(images.classes)), dtype=np.int64)
    np.add.at(counts, (images.domain_of, images.labels), 1)
    found = DataCheck(
        images,
        config.out,
        tuple(_unreadable(config.data, images)),
        tuple(_duplicates(images.keys)),
        counts=counts,
    )
    if config.teacher is not None:
        found = _with_teacher(found, config, config.teacher)
    page = html(_document(found))
    refuse_page(config.out, overwrite=config.overwrite)  # a file may have appeared meanwhile
    write_text(config.out, page)
    return found


def _unreadable(data: str, images: ImageSet) -> Iterator[tuple[str, str]]:
    if data == "toy":
        return
    if is_packed(data):
        left_out = open_source(data).left_out
        for reason, count in left_out.reasons.items():
            yield left_out.examples[reason], f"{count} × {reason}"
        return
    listing = list_files(Path(data))
    read = set(images.ids)
    for entry in listing.entries:
        if scan.shown(entry.path) not in read:
            yield scan.shown(entry.path), check_content(listing.root / entry.path)[1]


def _duplicates(keys: Sequence[str]) -> Iterator[Pair]:
    """Yield each further image of a content with the first one of it."""
    first: dict[str, int] = {}
    for index, key in enumerate(keys):
        before = first.setdefault(key, index)
        if before != index:
            yield Pair(before, index)


def _with_teacher(found: DataCheck, config: DataCheckConfig, spec: str) -> DataCheck:
    """Add near-duplicates and probable label errors, from the teacher's embeddings."""
    from torch.nn.functional import softmax

    from edgekd.distill.inputs.cache import plain_embeddings
    from edgekd.distill.models.teachers import ClipTeacher, load_teacher
    from edgekd.distill.text_bank import templates_for

    teacher, images = load_teacher(spec), found.images
    if not isinstance(teacher, ClipTeacher):
        raise EdgekdError(f"{spec} cannot embed new images.", "Give another teacher, or none.")
    say(f"embedding {len(images):,} images with {teacher.spec} …")
    embeddings = plain_embeddings(teacher, images, np.arange(len(images)))  # [N, D]
    bank = teacher.text_bank(images.classes, templates_for("photo"))
    odds = softmax(bank.zero_shot(embeddings), dim=1).numpy()
    best = odds.argmax(axis=1)
    confident = np.flatnonzero((best != images.labels) & (odds.max(axis=1) >= config.sure))
    order = confident[np.argsort(-odds[confident, best[confident]], kind="stable")]
    return replace(
        found,
        near_duplicates=tuple(near_pairs(embeddings.numpy(), images.keys, config.near)),
        label_errors=tuple(
            Doubt(int(i), images.classes[best[i]], float(odds[i, best[i]])) for i in order
        ),
        zero_shot=float((best == images.labels).mean()),
    )


def near_pairs(
    embeddings: NDArray[np.float32], keys: Sequence[str], least: float, most: int = MOST_PAIRS
) -> list[Pair]:
    """Return pairs of different contents whose mean-centred embeddings `[N, D]` have a cosine of `least` or more.

    The closest `most` pairs, the closest first. Rows are compared in blocks, which bounds the memory.
    """
    centred = embeddings - embeddings.mean(axis=0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    content = np.unique(keys, return_inverse=True)[1]
    places, cosines = np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=np.float32)
    block = max(1, _BLOCK_CELLS // len(unit))
    for start in range(0, len(unit), block):
        found = unit[start : start + block] @ unit[start:].T
        rows, columns = np.nonzero(found >= least)
        new = np.stack([rows, columns], axis=1) + start
        good = (rows < columns) & (content[new[:, 0]] != content[new[:, 1]])
        places = np.concatenate([places, new[good]])
        cosines = np.concatenate([cosines, found[rows[good], columns[good]]])
        best = np.argsort(-cosines, kind="stable")[:most]
        places, cosines = places[best], cosines[best]
    return [
        Pair(a, b, cosine) for (a, b), cosine in zip(places.tolist(), cosines.tolist(), strict=True)
    ]


def _document(found: DataCheck) -> Document:
    images = found.images
    summary = [Text(line) for line in found.summary()]
    rows = [{"image": name, "reason": reason} for name, reason in found.unreadable[:MOST_SHOWN]]
    sections = [
        section("answers", "Summary", summary),
        section("unreadable", "Unreadable", [table("Files that cannot be read", rows, words=True)]),
        section("duplicates", "Duplicates", _pair_items(found, found.duplicates)),
    ]
    if found.near_duplicates is not None and found.label_errors is not None:
        doubts = _doubt_items(found, found.label_errors)
        sections += [
            section("near", "Near-duplicates", _pair_items(found, found.near_duplicates)),
            section("labels", "Probable label errors", doubts),
        ]
    else:
        text = "Near-duplicates and label errors need --teacher."
        sections[0] = section("answers", "Summary", [*summary, Text(text, tone="note")])
    sections.append(section("balance", "Balance", [_balance(found)]))
    return Document(
        "data",
        f"Data check of {images.name}",
        f"{len(images):,} images, {len(images.classes)} classes, {len(images.domains)} domains",
        tuple(one for one in sections if one.items),
    )


def _pair_items(found: DataCheck, pairs: Sequence[Pair]) -> Iterator[Item]:
    """Yield pairs side by side, those across labels, splits or domains first."""
    order = sorted(pairs, key=lambda pair: not found.across(pair))[: MOST_SHOWN // 2]
    pictures = [
        _picture(found.images, i, f"pair {n}", found.across(pair), f"cosine {pair.cosine:.3f}")
        for n, pair in enumerate(order, start=1)
        for i in (pair.first, pair.second)
    ]
    if pairs:
        note = f"The first {len(order)} are shown."
        yield Gallery(f"{len(pairs):,} pairs", tuple(pictures), note)


def _doubt_items(found: DataCheck, doubts: Sequence[Doubt]) -> Iterator[Item]:
    shown = doubts[:MOST_SHOWN]
    pictures = (
        _picture(found.images, one.index, f"teacher: {one.teacher} {100 * one.probability:.0f} %")
        for one in shown
    )
    if doubts:
        yield Gallery(
            f"{len(doubts):,} images",
            tuple(pictures),
            f"The first {len(shown)} are shown, the most certain teacher first. A teacher is often wrong where it "
            "recognises the classes poorly. Look at the image before you change its label.",
        )


def _picture(images: ImageSet, index: int, *lines: str) -> Picture:
    label = f"label: {images.classes[images.labels[index]]}"
    try:
        address = jpeg_address(images.read(index, draft=128))
    except EdgekdError:
        address = ""
    return Picture(address, images.ids[index], (label, *(line for line in lines if line)))


def _balance(found: DataCheck) -> Table:
    images = found.images
    rows = []
    for number, name in enumerate(images.classes):
        row = {"class": name, "images": f"{found.counts[:, number].sum():,}"}
        if len(images.domains) > 1:
            row |= {
                d: f"{n:,}" for d, n in zip(images.domains, found.counts[:, number], strict=True)
            }
        rows.append(row)
    roles = Counter(images.roles or ())
    note = "; ".join(f"{role}: {count:,}" for role, count in roles.items())
    return table("Images of each class", rows, note=note)
