"""Runs that see less than there is: classes that never train, and a part of the labels."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from edgekd.config import TrainConfig
from edgekd.data import ImageSet
from edgekd.errors import EdgekdError, did_you_mean
from edgekd.split import ROLES, Split, build_split, grouped, make_split, shuffled


def without_classes(images: ImageSet, unseen: Collection[str]) -> ImageSet:
    """The images of all classes but these; labels are numbered anew."""
    if not unseen:
        return images
    return images.of_classes([name for name in images.classes if name not in unseen])


def check_unseen(config: TrainConfig, images: ImageSet) -> None:
    """Refuse unseen classes that do not exist, leave too little to train, or come with an unseen domain."""
    if not config.unseen_classes:
        return
    for name in config.unseen_classes:
        if name not in images.classes:
            raise EdgekdError(f'{images.name} has no class "{name}".', did_you_mean(name, images.classes))
    if len(set(images.classes) - set(config.unseen_classes)) < 2:
        raise EdgekdError(
            f"{len(set(config.unseen_classes))} of {len(images.classes)} classes are unseen, and two must train.",
            "Leave fewer classes out.",
        )
    if config.test_domain not in ("auto", "none"):
        raise EdgekdError(
            f"Both the domain {config.test_domain} and {len(config.unseen_classes)} classes are to be unseen.",
            "These are two tests: leave one of them out.",
        )


def run_split(config: TrainConfig, images: ImageSet) -> Split:
    """The split of a run on its own images (`without_classes`), with the part of the labels it may use."""
    domain = "none" if config.unseen_classes else config.test_domain
    split = make_split(images, test_domain=domain, seed=config.split_seed)
    return split if config.label_fraction == 1 else fewer_labels(images, split, config.label_fraction)


def fewer_labels(images: ImageSet, split: Split, fraction: float) -> Split:
    """The same split with the first part of each class of each domain in train, at least one image.

    "First" is by the hash that cuts the split, so that 1 % lies within 10 %.
    """
    kept: set[str] = set()
    for group in grouped(images, split.train.tolist()):
        count = max(1, math.floor(fraction * len(group) + 0.5))
        kept |= {images.keys[index] for index in shuffled(images, group, split.seed)[:count]}
    chosen = {role: getattr(split, role).tolist() for role in ROLES}
    chosen["train"] = [index for index in chosen["train"] if images.keys[index] in kept]
    rule = f"{split.rule} Of train, {100 * fraction:g} % of each class of each domain, at least one image, are used."
    return build_split(images, chosen, test_domain=split.test_domain, rule=rule, seed=split.seed)


def unseen_test(images: ImageSet, unseen: Sequence[str]) -> NDArray[np.int64]:
    """Indices of all images of the unseen classes, but for contents that are also there under a class that trains."""
    chosen = np.isin(images.labels, [images.classes.index(name) for name in unseen])
    seen = {key for key, out in zip(images.keys, chosen.tolist(), strict=True) if not out}
    return np.flatnonzero(chosen & np.array([key not in seen for key in images.keys]))
