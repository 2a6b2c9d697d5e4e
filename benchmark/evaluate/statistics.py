"""Intervals and tests of accuracies: Wilson's interval, the paired bootstrap, McNemar's test.

Every random draw is seeded: the same answers give the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgekd.targets.timing.intervals import Interval, interval_of


def wilson_interval(hits: int, n: int) -> Interval:
    """Return the 95 % interval of a fraction (Wilson 1927), inside 0–1 even for 0 or `n` hits."""
    from scipy.stats import binomtest

    found = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def paired_interval(
    pairs: Sequence[tuple[NDArray[np.bool_], NDArray[np.bool_]]],
    *,
    replicates: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the bootstrap 95 % interval of accuracy(first) − accuracy(second), averaged without weights over suites.

    Args:
        pairs: for each suite, which images the first and the second model classify correctly, bool `[n]` each, in the
            same order. Images are drawn in pairs, each suite on its own.
    """
    rng = np.random.default_rng(seed)
    drawn = np.zeros(replicates)
    for first, second in pairs:
        n = len(first)
        won, lost = int((first & ~second).sum()), int((~first & second).sum())
        # Resampling images only changes how many of them differ in either direction: three counts, one multinomial.
        counts = rng.multinomial(n, [won / n, lost / n, 1 - (won + lost) / n], size=replicates)
        drawn += (counts[:, 0] - counts[:, 1]) / n
    return interval_of(drawn / len(pairs))


def paired_seeds_interval(
    pairs: Sequence[tuple[NDArray[np.bool_], NDArray[np.bool_]]],
    *,
    replicates: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return `paired_interval` for models of several seeds: accuracies are means over the seeds.

    An image is drawn with the answers of all seeds, which are not independent: what is hard for one is hard for the
    others.

    Args:
        pairs: for each suite, which images the first and the second recipe's models classify correctly, bool
            `[seeds, n]` each.
    """
    rng = np.random.default_rng(seed)
    drawn = np.zeros(replicates)
    for first, second in pairs:
        lead = first.sum(axis=0) - second.sum(
            axis=0, dtype=np.int64
        )  # [n], seeds won less seeds lost
        values, counts = np.unique(lead, return_counts=True)
        drawn += (
            rng.multinomial(len(lead), counts / len(lead), size=replicates)
            @ values
            / (len(lead) * len(first))
        )
    return interval_of(drawn / len(pairs))


def mcnemar_p(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Return the exact two-sided McNemar p-value for "both models are right equally often" (McNemar 1947, binomial).

    1.0 when they never differ in being right.
    """
    from scipy.stats import binomtest

    won, lost = int((first & ~second).sum()), int((~first & second).sum())
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
