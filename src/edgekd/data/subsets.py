"""Training subsets: unseen classes, few-shot classes, and fractions of the labels."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError, check_known
from edgekd.data.image_set import ImageSet
from edgekd.data.split import ROLES, Split, build_split, grouped, make_split, shuffled, with_roles

if TYPE_CHECKING:
    from edgekd.configs.train import TrainConfig


def without_classes(images: ImageSet, unseen: Collection[str]) -> ImageSet:
    """Return the images of all classes except these, with renumbered labels."""
    if not unseen:
        return images
    return images.of_classes([name for name in images.classes if name not in unseen])


def run_images(images: ImageSet, config: TrainConfig) -> ImageSet:
    """Return the images of a run: all classes except the unseen ones, plus the shots."""
    if not config.shots:
        return without_classes(images, config.unseen_classes)
    seen = ~np.isin(images.labels, class_places(images, config.unseen_classes))
    seen[take_shots(images, config.unseen_classes, config.shots, config.split_seed)] = True
    return images.at(np.flatnonzero(seen))


def check_unseen(config: TrainConfig, images: ImageSet) -> None:
    """Raise an `EdgekdError` if unseen classes do not exist or leave fewer than two classes."""
    for name in config.unseen_classes:
        check_known(name, images.classes, f'{images.name} has no class "{name}".')
    if config.unseen_classes and len(set(images.classes) - set(config.unseen_classes)) < 2:
        raise EdgekdError(
            f"{len(set(config.unseen_classes))} of {len(images.classes)} classes are unseen, and training needs two.",
            "Leave out fewer classes.",
        )


def run_split(config: TrainConfig, images: ImageSet) -> Split:
    """Return the split of a run on its images (`run_images`), restricted to the labels it may use.

    All shots are training images. Validation and test images do not depend on them.
    """
    if config.shots:
        return _with_shots(config, images)
    domain = "none" if config.unseen_classes else config.test_domain
    split = make_split(images, test_domain=domain, seed=config.split_seed)
    if config.adapt is not None:
        split = half_tested(images, split)
    return (
        split if config.label_fraction == 1 else fewer_labels(images, split, config.label_fraction)
    )


def half_tested(images: ImageSet, split: Split) -> Split:
    """Return the split with only half of the unseen domain in `ood_test`, by content hash; the rest has no role.

    Raises:
        EdgekdError: there is no unseen domain.
    """
    if split.test_domain is None:
        raise EdgekdError(
            "Training on unlabelled images of the unseen domain needs a domain that is left out.",
            "Give one: --test-domain NAME.",
        )
    order = shuffled(images, split.ood_test.tolist(), split.seed)
    contents = list(dict.fromkeys(images.keys[i] for i in order))
    trained = set(contents[: len(contents) // 2])
    tested = [i for i in order if images.keys[i] not in trained]
    rule = f"Half of {split.test_domain}, by content hash, is not tested."
    return with_roles(images, split, rule, ood_test=tested)


def untested_half(images: ImageSet, split: Split) -> NDArray[np.int64]:
    """Return indices of the half of the unseen domain that `half_tested` leaves out, in the order of the content hash.

    Each content appears once, and smaller prefixes are subsets of larger ones.
    """
    assert split.test_domain is not None
    tested = {images.keys[i] for i in split.ood_test.tolist()}
    domain = np.flatnonzero(images.domain_of == images.domains.index(split.test_domain))
    first: dict[str, int] = {}
    for index in shuffled(images, domain.tolist(), split.seed):
        if images.keys[index] not in tested:
            first.setdefault(images.keys[index], index)
    return np.array(list(first.values()), dtype=np.int64)


def _with_shots(config: TrainConfig, images: ImageSet) -> Split:
    is_shot = np.isin(images.labels, class_places(images, config.unseen_classes))
    seen = np.flatnonzero(~is_shot)
    inner = run_split(
        config.model_copy(update={"shots": 0}), without_classes(images, config.unseen_classes)
    )
    chosen = {role: seen[getattr(inner, role)].tolist() for role in ROLES}
    chosen["train"] += np.flatnonzero(is_shot).tolist()
    shots = "1 image is" if config.shots == 1 else f"{config.shots} images are"
    rule = f"{inner.rule} Of each unseen class, {shots} in train, the first by content hash."
    return build_split(images, chosen, test_domain=None, rule=rule, seed=inner.seed)


def fewer_labels(images: ImageSet, split: Split, fraction: float) -> Split:
    """Return the split with a fraction of the training images of each class of each domain, at least one.

    The first ones in the order of the split are used, so that 1 % is a subset of 10 %.
    """
    kept: set[str] = set()
    for group in grouped(images, split.train.tolist()):
        count = max(1, math.floor(fraction * len(group) + 0.5))
        kept |= {images.keys[index] for index in shuffled(images, group, split.seed)[:count]}
    train = [index for index in split.train.tolist() if images.keys[index] in kept]
    rule = f"Of train, {100 * fraction:g} % of each class of each domain are used, and at least one image."
    return with_roles(images, split, rule, train=train)


def class_places(images: ImageSet, names: Sequence[str]) -> list[int]:
    """Return the labels of these classes in `images`."""
    return [images.classes.index(name) for name in names]


def unseen_test(images: ImageSet, unseen: Sequence[str]) -> NDArray[np.int64]:
    """Return indices of all images of the unseen classes, except content that is also in a training class."""
    chosen = np.isin(images.labels, class_places(images, unseen))
    seen = {key for key, out in zip(images.keys, chosen.tolist(), strict=True) if not out}
    return np.flatnonzero(chosen & np.array([key not in seen for key in images.keys]))


def take_shots(images: ImageSet, unseen: Sequence[str], count: int, seed: int) -> NDArray[np.int64]:
    """Return sorted indices of the first `count` different images of each unseen class.

    The order is that of the split, over all domains, so that one shot is a subset of four.

    Raises:
        EdgekdError: a class has too few images to keep one for the test.
    """
    chosen: list[int] = []
    test = unseen_test(images, unseen)
    for name, place in zip(unseen, class_places(images, unseen), strict=True):
        first: dict[str, int] = {}
        for index in test[images.labels[test] == place].tolist():
            first.setdefault(images.keys[index], index)
        if count >= len(first):
            raise EdgekdError(
                f'For {count} shots, the class "{name}" has too few different images ({len(first)}); '
                "at least one is needed for the test.",
                f"Use at most {len(first) - 1} shots."
                if len(first) > 1
                else "Leave this class out.",
            )
        chosen += shuffled(images, first.values(), seed)[:count]
    return np.array(sorted(chosen), dtype=np.int64)


def left_to_test(
    images: ImageSet, unseen: Sequence[str], shots: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return sorted indices of `unseen_test`, without images whose content is in the shots."""
    shown = {images.keys[index] for index in shots.tolist()}
    return np.array(
        [i for i in unseen_test(images, unseen).tolist() if images.keys[i] not in shown],
        dtype=np.int64,
    )
