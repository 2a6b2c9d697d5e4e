"""Batches for the training loop: sampling of images, stored pixels, and prefetching.

The images of step t depend only on (seed, t), so resuming and sharding need no state. Training reads every image many
times, and decoding a JPEG costs about as much as a small student's forward pass. So each data set is decoded once into
a uint8 array on disk, squash-resized to the side that a model needs and shared between runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from edgekd.core.ahead import batched, map_ahead
from edgekd.core.console import say
from edgekd.core.files import cache_folder, short_hash, stored_array
from edgekd.core.preprocess import Preprocess
from edgekd.data.image_set import ImageSet, JoinedReader
from edgekd.distill.inputs.mixing import Mixing
from edgekd.distill.inputs.restyle import Restyle, restyle_params
from edgekd.distill.inputs.views import Augmentation, ViewParams, view_params

MAX_BYTES = 8 * 2**30
"""Maximum size of stored pixels (8 GiB: about 100,000 images at 160 px). Larger sets are decoded on the fly."""

Drawn = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Image indices, int64 `[batch]`, and the number of earlier draws of each image, int64 `[batch]`."""


# --- sampling


@dataclass(frozen=True)
class BalancedSampler:
    """Sample global batches with equal shares of the source domains (the rule of DomainBed and VL2V-ADiP).

    Args:
        groups: training image indices of each source domain.
        batch: images per step over all processes.
        seed: determines every batch of the run.
    """

    groups: tuple[NDArray[np.int64], ...]
    batch: int
    seed: int

    @property
    def images(self) -> int:
        return sum(map(len, self.groups))

    def step(self, step: int) -> Drawn:
        """Return the images of a step; each domain has a new permutation per pass.

        If the batch size is not a multiple of the number of domains, the extra places go to the domains in turn.
        """
        indices, visits = [], []
        n_groups = len(self.groups)
        for slot, group in enumerate(self.groups):
            # Global positions step*batch … (step+1)*batch - 1 are assigned to the domains in turn.
            first = -(-(step * self.batch - slot) // n_groups)
            last = -(-((step + 1) * self.batch - slot) // n_groups)
            for position in range(first, last):
                visit, place = divmod(position, len(group))
                indices.append(group[_permutation(self.seed, slot, visit, len(group))[place]])
                visits.append(visit)
        return np.array(indices, dtype=np.int64), np.array(visits, dtype=np.int64)


@dataclass(frozen=True)
class ShotSampler:
    """Sample a fixed number of shots per batch, which would rarely be drawn otherwise (Li et al. 2023).

    Args:
        shots: image indices. batch: number of shots per batch, drawn without replacement for each batch.
        slot: makes this order independent of those of the domains.
    """

    shots: NDArray[np.int64]
    batch: int
    seed: int
    slot: int

    @property
    def images(self) -> int:
        return len(self.shots)

    def step(self, step: int) -> Drawn:
        order = _permutation(self.seed, self.slot, step, len(self.shots))
        return self.shots[order[: self.batch]], np.full(self.batch, step)


@dataclass(frozen=True)
class Sampler:
    """Sample the images of a run's batches: `labelled` images followed by `unlabelled` ones."""

    labelled: tuple[BalancedSampler | ShotSampler, ...]
    unlabelled: tuple[BalancedSampler, ...] = ()

    @property
    def epoch_steps(self) -> int:
        """Return the number of steps of one pass over the labelled images, or the unlabelled ones if there are no
        others."""
        parts = self.labelled or self.unlabelled
        return max(1, round(sum(p.images for p in parts) / sum(p.batch for p in parts)))

    def step(self, step: int) -> Drawn:
        """Return the images of a step for all processes."""
        drawn = [part.step(step) for part in (*self.labelled, *self.unlabelled)]
        return np.concatenate([i for i, _ in drawn]), np.concatenate([v for _, v in drawn])


def make_sampler(
    train: NDArray[np.int64],
    unlabelled: NDArray[np.int64],
    group_of: NDArray[np.int64],
    is_shot: NDArray[np.bool_],
    *,
    share: float,
    batch: int,
    seed: int,
) -> Sampler:
    """Return the sampler of a run: equal shares of the groups, then shots, then unlabelled images.

    Args:
        train, unlabelled: int64 `[n]`, indices of images. group_of, is_shot: of all images, int64, bool `[N]`; groups
            are domains, or the classes of each domain.
        share: fraction of unlabelled images in each batch, each at most once, with at least one labelled image.
        batch: images per step. Each batch has all shots, or half of the labelled places if that is less, as published.
    """
    if not len(train):
        return Sampler((), (BalancedSampler((unlabelled,), batch, seed),))
    places = min(round(share * batch), len(unlabelled), batch - 1)
    labelled = batch - places
    many, few = train[~is_shot[train]], train[is_shot[train]]
    groups = tuple(many[group_of[many] == group] for group in np.unique(group_of[many]))
    shots = min(labelled // 2, len(few))
    few_sampler = (ShotSampler(few, shots, seed, len(groups)),) if shots else ()
    # A separate seed makes the order of the unlabelled images independent of the domains.
    others = (BalancedSampler((unlabelled,), places, seed + 2**32),) if places else ()
    return Sampler((BalancedSampler(groups, labelled - shots, seed), *few_sampler), others)


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, slot: int, visit: int, size: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=[seed, (slot << 32) + visit])).permutation(size)


# --- pixels


@dataclass(frozen=True)
class PixelStore:
    """Random access to squash-resized images.

    `array` is uint8 `[N, side, side, 3]` mapped from disk, or None if images are decoded on the fly. `parts` are the
    stores of joined image sets, each of which is decoded only once.
    """

    images: ImageSet
    side: int
    array: NDArray[np.uint8] | None
    parts: tuple[PixelStore, ...] = ()

    def batch(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return uint8 `[len(indices), side, side, 3]`."""
        if self.parts:
            pixels = np.empty((len(indices), self.side, self.side, 3), dtype=np.uint8)
            first = 0
            for part in self.parts:
                own = (indices >= first) & (indices < first + len(part.images))
                if own.any():
                    pixels[own] = part.batch(indices[own] - first)
                first += len(part.images)
            return pixels
        if self.array is not None:
            return self.array[indices]
        return next(_stacked(lambda i: squashed(self.images, i, self.side), indices, len(indices)))


def squashed(images: ImageSet, index: int, side: int) -> NDArray[np.uint8]:
    """Return image `index` as uint8 `[side, side, 3]`, resized with antialiasing and without keeping the aspect
    ratio."""
    image = images.read(index, draft=2 * side)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def store_side(size: int) -> int:
    """Return the side to store for views of `size` px, so that the smallest crop (70 % of the area) is hardly
    enlarged."""
    return round(size * 1.2)


def open_store(images: ImageSet, side: int, *, max_bytes: int = MAX_BYTES) -> PixelStore:
    """Open the stored pixels of `images`, decoding them first unless it was done before."""
    if isinstance(images.reader, JoinedReader):
        parts = tuple(open_store(part, side, max_bytes=max_bytes) for part in images.reader.parts)
        return PixelStore(images, side, None, parts)
    shape = (len(images), side, side, 3)
    if int(np.prod(shape)) > max_bytes:
        return PixelStore(images, side, None)
    folder = cache_folder("pixels")
    path = folder / f"{short_hash('pixels-1', str(side), *images.keys)}-{side}px.npy"
    decoded = functools.partial(_decoded, images, side, folder)
    return PixelStore(images, side, stored_array(path, "stored pixels", shape, decoded))


def _decoded(images: ImageSet, side: int, folder: Path) -> Iterator[NDArray[np.uint8]]:
    """Return the squashed images, uint8 `[≤ block, side, side, 3]`."""
    count, size = len(images), side * side * 3
    say(
        f"decoding {count:,} images to {side} px once ({count * size / 2**20:,.0f} MiB in {folder})"
    )
    return _stacked(lambda i: squashed(images, i, side), range(count), max(1, 2**24 // size))


def pixel_batches(
    images: ImageSet, indices: NDArray[np.int64], preprocess: Preprocess, batch: int = 64
) -> Iterator[NDArray[np.uint8]]:
    """Yield the images at `indices`, preprocessed as on the device, as uint8 `[≤batch, H, W, 3]`.

    The next batch is decoded in the background.
    """
    return _stacked(lambda i: preprocess.pixels(images.read(i)), indices, batch)


def _stacked(
    make: Callable[[int], NDArray[np.uint8]], indices: Iterable[int], batch: int
) -> Iterator[NDArray[np.uint8]]:
    """Return `make` of so many indices at a time; threads make those of the next batch meanwhile."""
    made = map_ahead(lambda i: make(int(i)), indices, ahead=batch)
    return (np.stack(part) for part in batched(made, batch))


# --- batches


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
    """Restyling of the views."""
    partner: RawBatch | None = None
    """The partner of each mixed image."""
    own: Tensor | None = None
    """Share of the own image at every pixel, float32 `[b, 1, S, S]` in 0–1, if there is a partner."""


@dataclass(frozen=True)
class BatchSource:
    """Create the batch of any step, without state.

    Args:
        views: number of cached views of each image, int64 `[N]`; None draws a new view at every visit.
        embeddings: `(image indices, views)` → the teacher's embeddings, float32 `[b, D]`.
    """

    store: PixelStore
    sampler: Sampler
    augmentation: Augmentation
    views: NDArray[np.int64] | None = None
    embeddings: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]] | None = None
    teacher_store: PixelStore | None = None
    rank: int = 0
    world: int = 1
    mixing: Mixing | None = None

    def __call__(self, step: int) -> RawBatch:
        """Return this process's share of the batch of a step."""
        drawn = self.sampler.step(step)
        places = np.arange(self.rank, len(drawn[0]), self.world)
        raw = self._share(drawn, places)
        if self.mixing is None:
            return raw
        partners, own = self.mixing.draw(step, len(drawn[0]))
        return replace(raw, partner=self._share(drawn, partners[places]), own=own[places])

    def _share(self, batch: Drawn, rows: NDArray[np.int64]) -> RawBatch:
        """Return the images at `rows` of a global batch."""
        images, drawn = self.store.images, batch[0]
        indices, visits = (part[rows] for part in batch)
        # Each image starts its cycle of views at a different view, so that a batch has all kinds of views.
        views = visits if self.views is None else (visits + indices) % self.views[indices]
        keys, numbers = [images.keys[i] for i in indices], views.tolist()
        restyle = None
        if self.augmentation.restyle:
            restyle, places = restyle_params(keys, numbers, self.augmentation.restyle)
            partners = self.store.batch(drawn[(places * len(drawn)).astype(np.int64)])
            restyle = restyle._replace(partners=torch.from_numpy(partners))
        online = self.teacher_store
        return RawBatch(
            indices=indices,
            pixels=torch.from_numpy(self.store.batch(indices)),
            params=view_params(keys, numbers, self.augmentation.policy),
            labels=torch.from_numpy(images.labels[indices]),
            teacher=torch.from_numpy(self.embeddings(indices, views)) if self.embeddings else None,
            teacher_pixels=torch.from_numpy(online.batch(indices)) if online else None,
            restyle=restyle,
        )
