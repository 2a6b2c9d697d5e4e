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


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, slot: int, visit: int, size: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=[seed, (slot << 32) + visit])).permutation(size)
