"""Intervals and tests of accuracies: Wilson's interval, the paired bootstrap, McNemar's test.

Random draws are seeded, so the same predictions give the same interval. A pair says which images of a suite the first
and the second model classify correctly: bool `[n]` each, or `[seeds, n]` for models of several seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.results.rows import Difference
from edgekd.targets.timing.intervals import Interval, interval_of

Pair = tuple[NDArray[np.bool_], NDArray[np.bool_]]
_REPLICATES = 10_000


def wilson_interval(hits: int, n: int) -> Interval:
    """Return the 95 % interval of a fraction (Wilson 1927), inside 0–1 even for 0 or `n` hits."""
    from scipy.stats import binomtest

    interval = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def paired_interval(pairs: Sequence[Pair]) -> Interval:
    """Return the bootstrap 95 % interval of accuracy(first) − accuracy(second), averaged without weights over suites.

    Images are drawn in pairs, separately for each suite. For several seeds, accuracies are means over the seeds, and an
    image is drawn with the predictions of all seeds, which are not independent.
    """
    rng = np.random.default_rng(0)
    drawn = np.zeros(_REPLICATES)
    for first, second in ((np.atleast_2d(a), np.atleast_2d(b)) for a, b in pairs):
        lead = first.sum(axis=0) - second.sum(axis=0, dtype=np.int64)  # [n], seeds won less lost
        # Resampling images only changes how many of them have which lead: a few counts, one multinomial.
        values, counts = np.unique(lead, return_counts=True)
        times = rng.multinomial(lead.size, counts / lead.size, size=_REPLICATES)
        drawn += times @ values / first.size
    return interval_of(drawn / len(pairs))


def mcnemar_p(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Return the exact two-sided McNemar p-value for "both models are right equally often" (McNemar 1947, binomial).

    1.0 when they never differ in being right.
    """
    from scipy.stats import binomtest

    won, lost = int((first & ~second).sum()), int((~first & second).sum())
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def difference(pairs: Sequence[Pair]) -> Difference:
    """Return accuracy of the first minus that of the second: mean over suites, paired interval, McNemar over all."""
    return Difference(
        value=float(np.mean([first.mean() - second.mean() for first, second in pairs])),
        ci95=paired_interval(pairs),
        mcnemar_p=mcnemar_p(*(np.concatenate(side) for side in zip(*pairs, strict=True))),
    )
