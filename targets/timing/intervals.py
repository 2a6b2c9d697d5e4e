"""Bootstrap intervals of percentiles, ratios and rates, and the samples needed to state a percentile.

Consecutive latencies are correlated (clocks, other work on the machine), so drawing single samples would give intervals
that are far too narrow. Instead, blocks of consecutive samples are drawn (Künsch 1989), and if there are several
processes, processes first (two-stage cluster bootstrap, Davison & Hinkley 1997, section 3.8). Draws are seeded, so the
same samples give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
_Z99 = 2.5758293035489004


def percentile(samples: NDArray[np.float64], q: float) -> float:
    """Return the percentile by nearest rank: the smallest sample that at least `q` percent of all do not exceed."""
    return float(np.percentile(samples, q, method="inverted_cdf"))


def interval_of(draws: NDArray[np.float64]) -> Interval:
    """Return the 95 % percentile interval of bootstrap draws `[R]`."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def percentile_draws(
    samples: NDArray[np.float64],
    blocks: NDArray[np.int64],
    processes: NDArray[np.int64],
    qs: Sequence[float],
    *,
    replicates: int = 1000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Return bootstrap draws `[R, len(qs)]` of percentiles of latencies, in the unit of the samples.

    Args:
        samples: `[n]`.
        blocks: `[n]`, block number of each sample, unique over all processes.
        processes: `[n]`, process number of each sample.
        qs: percents, 0–100.
    """
    names, block_of = np.unique(blocks, return_inverse=True)
    process_of_block = np.zeros(len(names), dtype=np.int64)
    process_of_block[block_of] = processes
    times = _draw_blocks(process_of_block, replicates, seed)
    return _percentiles(samples, block_of, times, np.asarray(qs) / 100)


def ratio_interval(
    first: Sequence[NDArray[np.float64]],
    second: Sequence[NDArray[np.float64]],
    processes: NDArray[np.int64],
    *,
    replicates: int = 1000,
) -> Interval:
    """Return the bootstrap 95 % interval of p50(first) / p50(second) from turns in which both were measured.

    A turn is drawn with both its blocks, so that common slowdowns do not affect the ratio.

    Args:
        first, second: the samples of each turn.
        processes: `[turns]`, process number of each turn.
    """
    times = _draw_blocks(processes, replicates)
    medians = []
    for parts in (first, second):
        turn = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        medians.append(_percentiles(np.concatenate(parts), turn, times, np.asarray([0.5]))[:, 0])
    return interval_of(medians[0] / medians[1])


def rate_interval(
    samples_ms: NDArray[np.float64], blocks: NDArray[np.int64], each: int
) -> Interval:
    """Return the bootstrap 95 % interval of `each` items per sample, per second.

    Args:
        samples_ms: `[n]`, of one process.
        blocks: `[n]`, block number of each sample.
    """
    number = np.unique(blocks, return_inverse=True)[1]
    count = np.bincount(number)
    times = _draw_blocks(np.zeros(len(count), dtype=np.int64), 1000)  # [R, blocks]
    rates = each * (times @ count) / (times @ np.bincount(number, weights=samples_ms) / 1e3)
    return interval_of(rates)


def _draw_blocks(
    process_of_block: NDArray[np.int64], replicates: int, seed: int = 0
) -> NDArray[np.int32]:
    """Return how often each block is drawn in each replicate, `[R, blocks]`: processes first, then blocks."""
    rng = np.random.default_rng(seed)
    names = np.unique(process_of_block)
    chosen = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=replicates)
    times = np.zeros((replicates, len(process_of_block)), dtype=np.int32)
    for number, process in enumerate(names):
        members = np.flatnonzero(process_of_block == process)
        uniform = np.full(len(members), 1 / len(members))
        times[:, members] = rng.multinomial(chosen[:, number] * len(members), uniform)
    return times


def _percentiles(
    samples: NDArray[np.float64],
    block_of: NDArray[np.int64],
    times: NDArray[np.int32],
    shares: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the percentiles, `shares` 0–1, of the samples of the drawn blocks, `[R, len(shares)]`."""
    order = np.argsort(samples, kind="stable")
    ranked, block_ranked = samples[order], block_of[order]
    result = np.empty((len(times), len(shares)))
    for replicate, drawn in enumerate(times):
        weight = np.cumsum(drawn[block_ranked], dtype=np.int32)  # [n]
        result[replicate] = ranked[np.searchsorted(weight, shares * weight[-1] - 1e-9)]
    return result


def queries_to_claim(q: float) -> int:
    """Return the queries needed to state percentile `q` at 99 % confidence with a margin of (1 − q/100) / 20.

    Source: MLPerf inference rules, appendix on statistical confidence; rounded up to a multiple of 2^13 as there
    (p90 24,576; p95 57,344; p97 90,112; p99 270,336).
    """
    p = q / 100
    margin = (1 - p) / 20
    return math.ceil(_Z99**2 * p * (1 - p) / margin**2 / 2**13) * 2**13
