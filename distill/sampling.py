"""Which images make up step t: a pure function of (seed, t), so that resuming and sharding need no state."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class BalancedSampler:
    """Global batches with the same share of every source domain (DomainBed's and VL2V-ADiP's rule).

    Args:
        groups: image indices of each source domain's training part.
        batch: images per step over all processes.
        seed: fixes every batch of the run.
    """

    groups: tuple[NDArray[np.int64], ...]
    batch: int
    seed: int

    @property
    def epoch_steps(self) -> int:
        """Steps after which as many images were drawn as there are."""
        return max(1, round(sum(len(group) for group in self.groups) / self.batch))

    def step(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Image indices int64 `[batch]` and, for each, how often that image was drawn before, int64 `[batch]`.

        A domain is walked through in a fresh permutation per pass; when the batch does not divide by the number of
        domains, the surplus places go round the domains in turn.
        """
        indices, visits = [], []
        n_groups = len(self.groups)
        for slot, group in enumerate(self.groups):
            # Global positions step*batch … (step+1)*batch - 1 are dealt to the domains like cards.
            first = -(-(step * self.batch - slot) // n_groups)
            last = -(-((step + 1) * self.batch - slot) // n_groups)
            for position in range(first, last):
                visit, place = divmod(position, len(group))
                indices.append(group[_permutation(self.seed, slot, visit, len(group))[place]])
                visits.append(visit)
        return np.array(indices, dtype=np.int64), np.array(visits, dtype=np.int64)


@dataclass(frozen=True)
class ShotSampler:
    """Batches with a fixed number of shots: a few images that would hardly ever be drawn among many (Li et al. 2023).

    Args:
        rest: deals the images of the classes with many.
        shots: indices of the few. places: how many of them a batch has, drawn anew for each batch, none of them twice.
    """

    rest: BalancedSampler
    shots: NDArray[np.int64]
    places: int

    @property
    def epoch_steps(self) -> int:
        """Steps after which as many images were drawn as there are."""
        images = sum(len(group) for group in self.rest.groups) + len(self.shots)
        return max(1, round(images / (self.rest.batch + self.places)))

    def step(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """As `BalancedSampler.step`; the shots come last, and the step stands for their visit."""
        many, visits = self.rest.step(step)
        # A place behind all domains keeps this order apart from theirs.
        few = self.shots[
            _permutation(self.rest.seed, len(self.rest.groups), step, len(self.shots))[
                : self.places
            ]
        ]
        return np.concatenate([many, few]), np.concatenate([visits, np.full(self.places, step)])


@dataclass(frozen=True)
class MixedSampler:
    """Batches with a fixed number of unlabelled images behind the labelled ones.

    Args:
        labelled: deals the labelled images.
        unlabelled: deals the unlabelled images, as one domain of its own.
    """

    labelled: BalancedSampler | ShotSampler
    unlabelled: BalancedSampler

    @property
    def epoch_steps(self) -> int:
        """Steps after which as many labelled images were drawn as there are."""
        return self.labelled.epoch_steps

    def step(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return what `BalancedSampler.step` returns; the unlabelled images come last."""
        parts = (self.labelled.step(step), self.unlabelled.step(step))
        return (
            np.concatenate([indices for indices, _ in parts]),
            np.concatenate([visits for _, visits in parts]),
        )


Sampler = BalancedSampler | ShotSampler | MixedSampler


def mix(
    unlabelled: NDArray[np.int64], share: float, batch: int, seed: int
) -> tuple[int, BalancedSampler | None]:
    """Return how many images of a batch are labelled, and what deals the others.

    Args:
        unlabelled: int64 `[m]`, indices of the unlabelled images.
        share: of them in each batch of `batch`; at most each of them once, and at least one labelled image.
        seed: fixes every batch of the run.
    """
    places = min(round(share * batch), len(unlabelled), batch - 1)
    if not places:
        return batch, None
    # A seed of its own keeps this order apart from the domains'.
    return batch - places, BalancedSampler((unlabelled,), places, seed + 2**32)


def make_sampler(
    train: NDArray[np.int64],
    domain_of: NDArray[np.int64],
    is_shot: NDArray[np.bool_],
    batch: int,
    seed: int,
) -> BalancedSampler | ShotSampler:
    """The sampler of a run.

    Args:
        train: int64 `[n]`, indices of the training images. domain_of: int64 `[N]`, of all images. is_shot: bool `[N]`.
        batch: images per step. Shots take all of their places or half of it, whichever is less, as published.
    """
    many, few = train[~is_shot[train]], train[is_shot[train]]
    groups = tuple(many[domain_of[many] == domain] for domain in np.unique(domain_of[many]))
    if not len(few):
        return BalancedSampler(groups, batch, seed)
    places = min(batch // 2, len(few))
    return ShotSampler(BalancedSampler(groups, batch - places, seed), few, places)


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, slot: int, visit: int, size: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=[seed, (slot << 32) + visit])).permutation(size)
