"""How sure a number is: intervals for percentiles, accuracies and differences, and when a percentile may be named.

Every random draw is seeded: the same samples give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
_Z95, _Z99 = 1.959963984540054, 2.5758293035489004


def percentile(samples: NDArray[np.float64], q: float) -> float:
    """The smallest sample that at least `q` percent of all do not exceed (nearest rank: always a real sample)."""
    return float(np.percentile(samples, q, method="inverted_cdf"))


def percentile_intervals(
    samples: NDArray[np.float64],
    blocks: NDArray[np.int64],
    processes: NDArray[np.int64],
    qs: Sequence[float],
    *,
    replicates: int = 1000,
    seed: int = 0,
) -> list[Interval]:
    """Bootstrap 95 % intervals of percentiles of latencies, resampling processes and, inside them, blocks.

    Neighbouring latencies resemble each other (clocks, other work on the machine), so drawing single samples would
    give intervals far too narrow. Whole blocks of consecutive samples are drawn instead (Künsch 1989), and, where
    there are several, whole processes first (two-stage cluster bootstrap, Davison & Hinkley 1997, section 3.8).

    Args:
        samples: `[n]`.
        blocks: `[n]`, block number of each sample, unique over all processes.
        processes: `[n]`, process number of each sample.
        qs: percents, 0–100.

    Returns:
        For each of `qs` the 2.5th and 97.5th percentile of the resampled percentile, in the unit of the samples.
    """
    draws = percentile_draws(samples, blocks, processes, qs, replicates=replicates, seed=seed)
    return [interval_of(draws[:, column]) for column in range(len(qs))]


def percentile_draws(
    samples: NDArray[np.float64],
    blocks: NDArray[np.int64],
    processes: NDArray[np.int64],
    qs: Sequence[float],
    *,
    replicates: int = 1000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Bootstrap draws `[R, len(qs)]` behind `percentile_intervals`, with the same arguments."""
    rng = np.random.default_rng(seed)
    order = np.argsort(samples, kind="stable")
    block_names, block_of = np.unique(blocks, return_inverse=True)
    process_of_block = np.zeros(len(block_names), dtype=np.int64)
    process_of_block[block_of] = processes
    times = _draw_blocks(process_of_block, replicates, rng)
    ranked, block_ranked = samples[order], block_of[order]
    wanted = np.asarray(qs) / 100
    found = np.empty((replicates, len(qs)))
    for replicate in range(replicates):
        weight = np.cumsum(times[replicate][block_ranked], dtype=np.int32)  # [n]
        found[replicate] = ranked[np.searchsorted(weight, wanted * weight[-1] - 1e-9)]
    return found


def _draw_blocks(
    process_of_block: NDArray[np.int64], replicates: int, rng: np.random.Generator
) -> NDArray[np.int32]:
    """How often each block is drawn in each replicate, `[R, blocks]`: processes first, then blocks inside them."""
    names = np.unique(process_of_block)
    chosen = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=replicates)
    times = np.zeros((replicates, len(process_of_block)), dtype=np.int32)
    for number, process in enumerate(names):
        members = np.flatnonzero(process_of_block == process)
        uniform = np.full(len(members), 1 / len(members))
        times[:, members] = rng.multinomial(chosen[:, number] * len(members), uniform)
    return times


def ratio_interval(
    first: Sequence[NDArray[np.float64]],
    second: Sequence[NDArray[np.float64]],
    processes: NDArray[np.int64],
    *,
    replicates: int = 1000,
    seed: int = 0,
) -> Interval:
    """Bootstrap 95 % interval of p50(first) / p50(second) from turns in which both were measured one after the other.

    A turn is drawn with both its blocks, so that what slowed both of them leaves the ratio alone; where there are
    several processes, these are drawn first (as in `percentile_intervals`).

    Args:
        first, second: the samples of each turn.
        processes: `[turns]`, process number of each turn.
    """
    times = _draw_blocks(processes, replicates, np.random.default_rng(seed))
    medians = []
    for parts in (first, second):
        samples = np.concatenate(parts)
        order = np.argsort(samples, kind="stable")
        turn = np.repeat(np.arange(len(parts)), [len(part) for part in parts])[order]
        found = np.empty(replicates)
        for replicate in range(replicates):
            weight = np.cumsum(times[replicate][turn], dtype=np.int32)
            found[replicate] = samples[order[np.searchsorted(weight, 0.5 * weight[-1] - 1e-9)]]
        medians.append(found)
    return interval_of(medians[0] / medians[1])


def interval_of(draws: NDArray[np.float64]) -> Interval:
    """The 95 % percentile interval of bootstrap draws `[R]`."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def rate_interval(
    samples_ms: NDArray[np.float64],
    blocks: NDArray[np.int64],
    each: int,
    *,
    replicates: int = 1000,
    seed: int = 0,
) -> Interval:
    """Bootstrap 95 % interval of `each` items per sample over the time taken, per second; whole blocks are drawn.

    Args:
        samples_ms: `[n]`, of one process.
        blocks: `[n]`, block number of each sample.
    """
    number = np.unique(blocks, return_inverse=True)[1]
    count = np.bincount(number)
    times = _draw_blocks(
        np.zeros(len(count), dtype=np.int64), replicates, np.random.default_rng(seed)
    )  # [R, blocks]
    rates = each * (times @ count) / (times @ np.bincount(number, weights=samples_ms) / 1e3)
    return interval_of(rates)


def queries_to_claim(q: float) -> int:
    """Queries needed to state percentile `q` at 99 % confidence with a margin of (1 − q/100) / 20.

    Source: MLPerf inference rules, appendix on statistical confidence; rounded up to a multiple of 2^13 as there
    (p90 24,576; p95 57,344; p97 90,112; p99 270,336).
    """
    p = q / 100
    margin = (1 - p) / 20
    return math.ceil(_Z99**2 * p * (1 - p) / margin**2 / 2**13) * 2**13


def wilson_interval(hits: int, n: int) -> Interval:
    """95 % interval of a fraction (Wilson 1927), inside 0–1 even for 0 or `n` hits."""
    p = hits / n
    spread = 1 + _Z95**2 / n
    centre = (p + _Z95**2 / (2 * n)) / spread
    half = _Z95 * math.sqrt(p * (1 - p) / n + _Z95**2 / (4 * n * n)) / spread
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_interval(
    pairs: Sequence[tuple[NDArray[np.bool_], NDArray[np.bool_]]],
    *,
    replicates: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Bootstrap 95 % interval of accuracy(first) − accuracy(second), averaged without weights over suites.

    Args:
        pairs: for each suite, which images the first and the second model classify rightly, bool `[n]` each, in the
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
    """As `paired_interval`, for models trained from several seeds: accuracies are means over the seeds.

    An image is drawn with the answers of all seeds, which are not independent: what is hard for one is hard for the
    others.

    Args:
        pairs: for each suite, which images the first and the second recipe's models classify rightly, bool
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
    """Exact two-sided McNemar p-value for "both models are right equally often" (McNemar 1947, binomial form).

    1.0 when they never differ in being right.
    """
    won, lost = int((first & ~second).sum()), int((~first & second).sum())
    discordant, fewer = won + lost, min(won, lost)
    if won == lost:
        return 1.0
    tail = term = 1
    for k in range(fewer):
        term = term * (discordant - k) // (k + 1)
        tail += term
    return min(1.0, float(tail / 2 ** (discordant - 1)))
