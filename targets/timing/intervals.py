"""Bootstrap intervals of percentiles, ratios and rates, and when a percentile may be stated.

Every random draw is seeded: the same samples give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
_Z99 = 2.5758293035489004


def percentile(samples: NDArray[np.float64], q: float) -> float:
    """Return the smallest sample that at least `q` percent of all do not exceed (nearest rank: a real sample)."""
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
    """Return bootstrap 95 % intervals of percentiles of latencies, resampling processes and, inside them, blocks.

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
    """Return the bootstrap draws `[R, len(qs)]` behind `percentile_intervals`, with the same arguments."""
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
    """Return how often each block is drawn in each replicate, `[R, blocks]`: processes first, then blocks."""
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
    """Return the bootstrap 95 % interval of p50(first) / p50(second) from turns in which both were measured.

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
    """Return the 95 % percentile interval of bootstrap draws `[R]`."""
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
    """Return the bootstrap 95 % interval of `each` items per sample, per second; whole blocks are drawn.

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
    """Return the queries needed to state percentile `q` at 99 % confidence with a margin of (1 − q/100) / 20.

    Source: MLPerf inference rules, appendix on statistical confidence; rounded up to a multiple of 2^13 as there
    (p90 24,576; p95 57,344; p97 90,112; p99 270,336).
    """
    p = q / 100
    margin = (1 - p) / 20
    return math.ceil(_Z99**2 * p * (1 - p) / margin**2 / 2**13) * 2**13
