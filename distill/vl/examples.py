"""A batch of examples: pictures at the student's size, tokens, labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.core.preprocess import Preprocess
from edgekd.distill.pixels import PixelStore, open_store
from edgekd.distill.vl.data import VlData
from edgekd.distill.vl.tokens import tokenize


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads examples of one `VlData` for a student."""

    data: VlData
    preprocess: Preprocess
    tokens: Tensor
    """int64 `[texts, L]`."""

    def texts(self, indices: NDArray[np.int64]) -> Tensor:
        """Token ids, int64 `[B, L]`, for `choice` `[B, K, L]`."""
        return self.tokens[torch.from_numpy(self.data.text_of[indices])]

    def pictures(self, indices: NDArray[np.int64]) -> Tensor:
        """RGB uint8 `[B, S, S, 3]`, prepared as on the device; a picture with several questions is decoded once."""
        own, back = np.unique(self.data.image_of[indices], return_inverse=True)
        return self.pixels(own)[torch.from_numpy(back)]

    def pixels(self, pictures: NDArray[np.int64]) -> Tensor:
        """The pictures themselves, prepared as on the device, RGB uint8 `[n, S, S, 3]`."""
        read = self.data.images.read
        return torch.from_numpy(np.stack([self.preprocess.pixels(read(int(i))) for i in pictures]))

    def parts(self, indices: NDArray[np.int64], size: int = 256) -> Iterator[NDArray[np.int64]]:
        """All of `indices` in order of their pictures, `size` at a time."""
        ordered = indices[np.argsort(self.data.image_of[indices], kind="stable")]
        for start in range(0, len(ordered), size):
            yield ordered[start : start + size]


def make_reader(data: VlData, preprocess: Preprocess, length: int) -> Reader:
    """A reader whose texts are `length` tokens long."""
    return Reader(data, preprocess, tokenize(data.texts, length))


def training_store(reader: Reader) -> PixelStore:
    """The pictures at the student's size, decoded once and shared between runs."""
    return open_store(reader.data.images, reader.preprocess.size)


def order(count: int, batch: int, seed: int, step: int) -> NDArray[np.int64]:
    """Positions 0…count−1 of the step's batch: one permutation after the other, a function of (seed, step)."""
    places = np.arange(step * batch, (step + 1) * batch)
    rounds = places // count
    permutations = {
        r: np.random.default_rng([seed, int(r)]).permutation(count) for r in np.unique(rounds)
    }
    return np.array(
        [permutations[r][p % count] for r, p in zip(rounds, places, strict=True)], dtype=np.int64
    )
