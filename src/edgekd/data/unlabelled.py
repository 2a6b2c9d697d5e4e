"""Unlabelled images from folders, manifests, packed sources or toy data, and joining them to a training set."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgekd.core.console import Tally
from edgekd.core.errors import EdgekdError, check_known
from edgekd.data.image_set import ImageSet, JoinedReader, toy_images
from edgekd.data.sources import open_source, scan
from edgekd.data.split import ROLES, Split, build_split, read_split, shuffled
from edgekd.data.subsets import untested_half
from edgekd.data.toy import DOMAINS

NO_DOMAIN = -1
"""Domain of an unlabelled image."""
TOY_SEED = 1
"""Seed of the unlabelled toy images; the labelled suite has seed 0 and so no image in common with them."""
TOY_PER_CLASS = 20
NO_DATA = "none"
"""Value of `data` for a run without labelled images."""
_EXCLUDED = {
    "train": "labelled training image",
    "val": "validation image",
    "id_test": "test image",
    "ood_test": "test image of the unseen domain",
    "again": "repeated content",
}


def load_unlabelled(source: str | Path) -> ImageSet:
    """Load images without labels, sorted by path. Unreadable ones are left out, with one warning.

    Args:
        source: as for `open_source` without labels, or `toy:STYLE` for 200 images of that style that are not in the toy
            data.

    Raises:
        EdgekdError: the source is missing or has no readable image.
    """
    if str(source).startswith("toy:"):
        return _toy_style(str(source).removeprefix("toy:"))
    found = open_source(str(source), labelled=False)
    ids = scan.shown_names(entry.path for entry in found.entries)
    return ImageSet.without_labels(found.name, found.keys, ids, found.reader)


def _toy_style(style: str) -> ImageSet:
    check_known(style, DOMAINS, f'The toy data has no style "{style}".')
    images = toy_images(TOY_SEED, TOY_PER_CLASS)
    images = images.at(np.flatnonzero(images.domain_of == DOMAINS.index(style)))
    return ImageSet.without_labels(style, images.keys, images.ids, images.reader)


def with_unlabelled(
    images: ImageSet,
    split: Split,
    sources: Sequence[str],
    limit: int | None = None,
    adapt: int | None = None,
) -> tuple[ImageSet, Split]:
    """Return a run's labelled images followed by unlabelled ones, and the split with their contents and names.

    Images of the split and repeated contents are left out and counted in one warning. If images of the unseen domain
    are among them, the domain counts as trained without labels.

    Args:
        split: split of `images`. If it has unlabelled images, as in a resumed run, the same ones are used again.
        sources: as for `load_unlabelled`.
        limit: maximum number of unlabelled images, the first by content key.
        adapt: number of unlabelled training images of the unseen domain, from the half that is not tested.

    Raises:
        EdgekdError: a source cannot be loaded, no image is left, or images of a resumed run are missing.
    """
    role_of = {key: role for role in ROLES for key in split.entries[role].values()}
    parts: list[ImageSet] = []
    names: list[str] = []
    ids, excluded = set(images.ids), Tally()
    for source in sources:
        part = load_unlabelled(source)
        names += [part.name, *(name.split("/")[0] for name in part.ids if "/" in name)]
        kept = []
        for i, (key, name) in enumerate(zip(part.keys, part.ids, strict=True)):
            role = role_of.get(key)
            if role is None:
                kept.append(i)
                role_of[key] = "again"
                continue
            excluded.add(_EXCLUDED[role], name)
            if role == "ood_test" and split.test_domain is not None:
                names.append(split.test_domain)
        part = part.at(np.array(kept, dtype=np.int64))
        if ids & set(part.ids):
            part = replace(part, ids=tuple(f"{scan.shown(source)}/{name}" for name in part.ids))
        ids |= set(part.ids)
        parts.append(part)
    excluded.warn("unlabelled images left out of training")
    parts = _with_keys(parts, sorted(key for part in parts for key in part.keys)[:limit])
    if adapt:
        assert split.test_domain is not None
        new = images.at(untested_half(images, split)[:adapt])
        parts.append(ImageSet.without_labels(new.name, new.keys, new.ids, new.reader))
        names.append(split.test_domain)
    if split.unlabelled:
        wanted = split.unlabelled.values()
        _check_complete(wanted, [key for part in parts for key in part.keys])
        parts = _with_keys(parts, wanted)
    found = {name: key for part in parts for name, key in zip(part.ids, part.keys, strict=True)}
    if not found:
        raise EdgekdError(
            f"No unlabelled image is left: all of {', '.join(sources)} belong to the split of {images.name}.",
            "Give images that are in no part of the labelled data.",
        )
    split = replace(split, unlabelled=found, unlabelled_domains=tuple(dict.fromkeys(names)))
    return join([images, *parts]), split


def _with_keys(parts: Sequence[ImageSet], keys: Collection[str]) -> list[ImageSet]:
    """Return the images with these content keys, without empty sets."""
    chosen = set(keys)
    return [fewer for part in parts if len(fewer := part.with_keys(chosen))]


def _check_complete(wanted: Collection[str], there: Collection[str]) -> None:
    if gone := set(wanted) - set(there):
        raise EdgekdError(
            f"{len(gone):,} of the run's {len(wanted):,} unlabelled images are missing.",
            "Restore them, or start a new run.",
        )


def keep_unlabelled(
    images: ImageSet, split: Split, kept: Collection[str]
) -> tuple[ImageSet, Split]:
    """Drop unlabelled images whose content key is not in `kept`; arguments and result as for `with_unlabelled`."""
    assert isinstance(images.reader, JoinedReader)
    found = {name: key for name, key in split.unlabelled.items() if key in kept}
    first, *others = images.reader.parts
    parts = _with_keys(others, found.values())
    return join([first, *parts]), replace(split, unlabelled=found)


def join(parts: Sequence[ImageSet]) -> ImageSet:
    """Concatenate image sets. Labels, classes and domains are those of the first one."""
    first, *others = parts
    if not others:
        return first
    nowhere = [np.full(len(part), NO_DOMAIN, dtype=np.int64) for part in others]
    return replace(
        first,
        labels=np.concatenate([part.labels for part in parts]),
        domain_of=np.concatenate([first.domain_of, *nowhere]),
        keys=tuple(key for part in parts for key in part.keys),
        ids=tuple(name for part in parts for name in part.ids),
        roles=None,
        reader=JoinedReader(tuple(parts)),
    )


def label_free(
    sources: Sequence[str],
    classes: tuple[str, ...],
    limit: int | None = None,
    seed: int = 0,
    before: Path | None = None,
) -> tuple[ImageSet, Split]:
    """Return the images of a run without labels, the held-out ones first, and a split with these in `val`.

    The held-out images are used to compare the student with its teacher, and exported files with the student.

    Args:
        sources, limit: as for `with_unlabelled`.
        classes: class names of the student.
        seed: seed of the order by content hash in which a tenth is held out.
        before: `split.json` of the run, if it exists.

    Raises:
        EdgekdError: as for `with_unlabelled`, or with fewer than two images.
    """
    nothing = ImageSet.without_labels("unlabelled images", (), (), JoinedReader(()), classes)
    roles: dict[str, list[int]] = {role: [] for role in ROLES}
    bare = build_split(nothing, roles, test_domain=None, rule="", seed=seed)
    images, made = with_unlabelled(nothing, bare, sources, limit)
    if len(images) < 2:
        raise EdgekdError("Training needs at least two unlabelled images.", "Give more images.")
    order = shuffled(images, range(len(images)), seed)
    count = max(1, len(order) // 10)
    held, trained = sorted(order[:count]), order[count:]
    if before is not None:
        stored = read_split(before, images)
        wanted = list(stored.unlabelled.values())
        _check_complete(wanted, images.keys)
        place = {key: i for i, key in enumerate(images.keys)}
        held, trained = stored.val.tolist(), [place[key] for key in wanted]
    images = images.at(np.array([*held, *trained], dtype=np.int64))
    split = build_split(
        images,
        roles | {"val": list(range(len(held)))},
        test_domain=None,
        rule="No image has a label; a tenth of them, by content hash, is held out of training.",
        seed=seed,
    )
    found = dict(zip(images.ids[len(held) :], images.keys[len(held) :], strict=True))
    return images, replace(split, unlabelled=found, unlabelled_domains=made.unlabelled_domains)
