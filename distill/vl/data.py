"""Examples of a vision-language task: pictures, texts, answers, statements for the teacher, and splits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.core.errors import EdgekdError
from edgekd.core.preprocess import Preprocess
from edgekd.data.image_set import ImageSet
from edgekd.data.split import Split, make_split

Task = Literal["vqa", "ve", "choice"]


@dataclass(frozen=True, eq=False)
class VlData:
    """N examples over a set of pictures.

    Attributes:
        name: short name of the data for reports; contains "synthetic" for generated texts.
        task: the kind of question.
        synthetic: whether the texts were generated from metadata.
        images: the pictures; the split is stratified by their `labels` and `domain_of`.
        image_of: int64 `[N]`, index into `images`.
        texts: every distinct text.
        text_of: int64 `[N]`, index into `texts`; `[N, K]` for `choice`, one column per candidate.
        labels: int64 `[N]`: index into `answers`, or the right candidate.
        answers: names of the outputs; `("candidate 1", …)` for `choice`.
        statements: groups of sentences, of which exactly one is true of a picture, for the teacher's confidence.
        statements_of: int64 `[N]`, the example's group. truth: int64 `[N]`, index of the true sentence in it.
    """

    name: str
    task: Task
    synthetic: bool
    images: ImageSet
    image_of: NDArray[np.int64]
    texts: tuple[str, ...]
    text_of: NDArray[np.int64]
    labels: NDArray[np.int64]
    answers: tuple[str, ...]
    statements: tuple[tuple[str, ...], ...]
    statements_of: NDArray[np.int64]
    truth: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads examples of a `VlData` as inputs of a student."""

    data: VlData
    preprocess: Preprocess
    tokens: Tensor
    """int64 `[texts, L]`."""

    def texts(self, indices: NDArray[np.int64]) -> Tensor:
        """Return token ids, int64 `[B, L]`, for `choice` `[B, K, L]`."""
        return self.tokens[torch.from_numpy(self.data.text_of[indices])]

    def pixels(self, pictures: NDArray[np.int64]) -> Tensor:
        """Return pictures, preprocessed as on the device, RGB uint8 `[n, S, S, 3]`."""
        read = self.data.images.read
        return torch.from_numpy(np.stack([self.preprocess.pixels(read(int(i))) for i in pictures]))

    def pictures(self, indices: NDArray[np.int64]) -> Tensor:
        """Return the pictures of examples, RGB uint8 `[B, S, S, 3]`; each is decoded once."""
        own, back = np.unique(self.data.image_of[indices], return_inverse=True)
        return self.pixels(own)[torch.from_numpy(back)]

    def parts(self, indices: NDArray[np.int64], size: int = 256) -> Iterator[NDArray[np.int64]]:
        """Yield `indices` in order of their pictures, `size` at a time."""
        ordered = indices[np.argsort(self.data.image_of[indices], kind="stable")]
        for start in range(0, len(ordered), size):
            yield ordered[start : start + size]


@dataclass(frozen=True, eq=False)
class VlSplit:
    """Sorted int64 indices into a `VlData`; `images` is the split of its pictures, before low-shot subsets."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    id_test: NDArray[np.int64]
    ood_test: NDArray[np.int64]
    images: Split
    train_images: int


def split_examples(
    data: VlData, *, test_domain: str, fraction: float = 1.0, seed: int = 0
) -> VlSplit:
    """Split the examples like their pictures (`make_split`), then keep a fraction of the training pictures.

    `test_domain` is a domain's name (easy-VQA: `held-out`), or `none`. `fraction` of the training pictures train, in
    every class of every domain, at least one each; smaller shares are subsets of larger ones.
    """
    images = make_split(data.images, test_domain=test_domain, seed=seed)
    kept = low_shot(data.images, images.train, fraction, seed)
    if len(kept) == 0 or len(images.val) == 0:
        raise EdgekdError(
            f"{data.name} leaves no pictures to train or to select on.", "Give more images."
        )
    pictures = (kept, images.val, images.id_test, images.ood_test)
    train, val, id_test, ood_test = (
        np.flatnonzero(np.isin(data.image_of, part)) for part in pictures
    )
    return VlSplit(train, val, id_test, ood_test, images, len(kept))


def low_shot(
    images: ImageSet, pool: NDArray[np.int64], fraction: float, seed: int
) -> NDArray[np.int64]:
    """Return ⌈fraction · n⌉ pictures of every class of every domain in `pool`, by a hash of their content."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index in pool.tolist():
        group = (int(images.domain_of[index]), int(images.labels[index]))
        groups.setdefault(group, []).append(index)

    def order(index: int) -> bytes:
        return hashlib.sha256(f"low-shot-1 {seed} {images.keys[index]}".encode()).digest()

    kept: list[int] = []
    for own in groups.values():
        kept += sorted(own, key=order)[: math.ceil(fraction * len(own) - 1e-9)]
    return np.array(sorted(kept), dtype=np.int64)


def subset(indices: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return at most `most` of `indices`, the same ones every time, in their order.

    They are drawn at random, because the sentences of a picture are in order, and every third has the same answer.
    """
    if len(indices) <= most:
        return indices
    return np.sort(np.random.default_rng(0).choice(indices, most, replace=False))
