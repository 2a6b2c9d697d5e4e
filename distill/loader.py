"""Batches for the training loop, made one step ahead in a background thread; the time spent waiting is counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.distill.cache import UNAUGMENTED, EmbeddingCache
from edgekd.distill.pixels import PixelStore
from edgekd.distill.restyle import Restyle, RestylePolicy, restyle_params
from edgekd.distill.sampling import Sampler
from edgekd.distill.views import ViewParams, ViewPolicy, view_params


@dataclass(frozen=True)
class RawBatch:
    """One process's share of a global batch, on the CPU."""

    indices: NDArray[np.int64]
    pixels: Tensor
    """uint8 `[b, S, S, 3]`."""
    params: ViewParams
    labels: Tensor
    teacher: Tensor | None
    """Cached teacher embeddings of these views, float32 `[b, D]`."""
    teacher_pixels: Tensor | None
    """For an online teacher: uint8 `[b, S', S', 3]`."""
    restyle: Restyle | None = None
    """How the views are redrawn."""


@dataclass(frozen=True)
class BatchSource:
    """Makes the batch of any step from scratch; holds no state.

    `views`, int64 `[N]`, is the number of cached views of each image; None draws a fresh view at every visit.
    """

    store: PixelStore
    sampler: Sampler
    policy: ViewPolicy
    views: NDArray[np.int64] | None
    embeddings: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]] | None
    teacher_store: PixelStore | None
    rank: int
    world: int
    restyle: RestylePolicy | None = None

    def __call__(self, step: int) -> RawBatch:
        images = self.store.images
        every, every_visit = self.sampler.step(step)
        indices, visits = (part[self.rank :: self.world] for part in (every, every_visit))
        # An image starts its round of views at its own place, so that one batch holds all kinds.
        views = visits if self.views is None else (visits + indices) % self.views[indices]
        keys = [images.keys[i] for i in indices]
        teacher = torch.from_numpy(self.embeddings(indices, views)) if self.embeddings else None
        return RawBatch(
            indices=indices,
            pixels=torch.from_numpy(self.store.batch(indices)),
            params=view_params(keys, views.tolist(), self.policy),
            labels=torch.from_numpy(images.labels[indices]),
            teacher=teacher,
            restyle=self._restyle(keys, views, every) if self.restyle else None,
            teacher_pixels=torch.from_numpy(self.teacher_store.batch(indices))
            if self.teacher_store
            else None,
        )

    def _restyle(
        self, keys: list[str], views: NDArray[np.int64], batch: NDArray[np.int64]
    ) -> Restyle:
        assert self.restyle is not None
        how, places = restyle_params(keys, views.tolist(), self.restyle)
        partners = self.store.batch(batch[(places * len(batch)).astype(np.int64)])
        return how._replace(partners=torch.from_numpy(partners))


def cached(
    images_keys: tuple[str, ...], cache: EmbeddingCache, *, plain: bool
) -> Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]:
    """A lookup `(image indices, views) → embeddings`; `plain` gives every view its image's one embedding."""

    def lookup(indices: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.float32]:
        wanted = [UNAUGMENTED] * len(indices) if plain else views.tolist()
        return cache.lookup([images_keys[i] for i in indices], wanted)

    return lookup


class Prefetcher:
    """Iterates over the batches of `steps`, one ahead.

    `waited_s` is how long the consumer has stood still for data since the last `reset`.
    """

    def __init__(self, source: Callable[[int], RawBatch], steps: range) -> None:
        self._source, self._steps = source, steps
        self.waited_s = 0.0

    def reset(self) -> None:
        """Start counting anew."""
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[tuple[int, RawBatch]]:
        with ThreadPoolExecutor(1, thread_name_prefix="edgekd-data") as pool:
            upcoming = None
            for step in self._steps:
                current = upcoming or pool.submit(self._source, step)
                upcoming = pool.submit(self._source, step + 1) if step + 1 in self._steps else None
                started = time.perf_counter()
                batch = current.result()
                self.waited_s += time.perf_counter() - started
                yield step, batch
