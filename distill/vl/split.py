"""Which examples train, select and test: by picture, so that no picture's questions lie on both sides."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import ImageSet
from edgekd.data.split import Split, make_split
from edgekd.distill.vl.data import VlData


@dataclass(frozen=True, eq=False)
class VlSplit:
    """Sorted int64 indices into one `VlData`; `images` is the split of its pictures, before any low shot."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    id_test: NDArray[np.int64]
    ood_test: NDArray[np.int64]
    images: Split
    train_images: int


def split_examples(
    data: VlData, *, test_domain: str, fraction: float = 1.0, seed: int = 0
) -> VlSplit:
    """Divide the examples as `make_split` divides their pictures, then keep a share of those that train.

    Args:
        test_domain: a domain's name (easy-VQA: `held-out`), or `none`.
        fraction: share of the training pictures to train on, in every class of every domain, at least one each.
            Smaller shares lie inside larger ones.

    Raises:
        EdgekdError: a fraction outside 0–1, an unknown domain, nothing left to train on.
    """
    if not 0 < fraction <= 1:
        raise EdgekdError(
            f"The fraction {fraction} is not above 0 and at most 1.",
            "Give 0.01, 0.1 or 1, for example.",
        )
    images = make_split(data.images, test_domain=test_domain, seed=seed)
    kept = low_shot(data.images, images.train, fraction, seed)
    if len(kept) == 0 or len(images.val) == 0:
        raise EdgekdError(
            f"{data.name} leaves no pictures to train or to select on.", "Give more images."
        )

    def examples_of(part: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.flatnonzero(np.isin(data.image_of, part))

    return VlSplit(
        train=examples_of(kept),
        val=examples_of(images.val),
        id_test=examples_of(images.id_test),
        ood_test=examples_of(images.ood_test),
        images=images,
        train_images=len(kept),
    )


def spread(indices: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most `most` of `indices`, the same ones every time, in their order.

    They are drawn: a picture's sentences come in turn, so every third one would be of the same answer.
    """
    if len(indices) <= most:
        return indices
    return np.sort(np.random.default_rng(0).choice(indices, most, replace=False))


def low_shot(
    images: ImageSet, pool: NDArray[np.int64], fraction: float, seed: int
) -> NDArray[np.int64]:
    """⌈fraction · n⌉ pictures of every class of every domain in `pool`, by the order of a hash of their content."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index in pool.tolist():
        groups.setdefault((int(images.domain_of[index]), int(images.labels[index])), []).append(
            index
        )
    kept: list[int] = []
    for own in groups.values():
        own.sort(
            key=lambda i: hashlib.sha256(f"low-shot-1 {seed} {images.keys[i]}".encode()).digest()
        )
        kept += own[: math.ceil(fraction * len(own) - 1e-9)]
    return np.array(sorted(kept), dtype=np.int64)
