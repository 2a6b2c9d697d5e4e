"""Intervals and tests against known distributions and tables."""

from __future__ import annotations

import math
import time
from itertools import product

import numpy as np
import pytest

from edgekd.benchmark.evaluate import statistics
from edgekd.targets.timing import intervals


def test_percentile_is_a_real_sample() -> None:
    samples = np.array([5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    assert intervals.percentile(samples, 50) == 5.0
    assert intervals.percentile(samples, 90) == 9.0
    assert intervals.percentile(samples, 91) == 10.0


def test_interval_covers_the_true_median_of_independent_samples() -> None:
    covered = 0
    for trial in range(100):
        samples = np.random.default_rng(trial).exponential(size=600)
        blocks = np.arange(600) // 10
        [(low, high)] = intervals.percentile_intervals(
            samples, blocks, np.zeros(600, int), (50,), replicates=300
        )
        covered += low <= math.log(2) <= high
    assert covered >= 88


def test_interval_width_matches_the_asymptotic_standard_error() -> None:
    samples = np.random.default_rng(1).normal(size=20_000)
    blocks = np.arange(20_000) // 50
    half, ninety = intervals.percentile_intervals(samples, blocks, np.zeros(20_000, int), (50, 90))
    for (low, high), q, density in ((half, 0.5, 0.39894), (ninety, 0.9, 0.17550)):
        standard_error = math.sqrt(q * (1 - q) / 20_000) / density
        assert (high - low) == pytest.approx(2 * 1.96 * standard_error, rel=0.25)


def test_drift_between_blocks_widens_the_interval() -> None:
    rng = np.random.default_rng(2)
    drifting = np.repeat(rng.normal(10, 1, size=40), 50) + rng.normal(0, 0.1, size=2000)
    one = np.zeros(2000, int)
    [(low, high)] = intervals.percentile_intervals(drifting, np.arange(2000) // 50, one, (50,))
    [(naive_low, naive_high)] = intervals.percentile_intervals(
        drifting, np.arange(2000), one, (50,)
    )
    assert high - low > 3 * (naive_high - naive_low)


def test_processes_are_drawn_before_blocks() -> None:
    rng = np.random.default_rng(4)
    samples = np.concatenate(
        [rng.normal(level, 0.01, size=400) for level in (10.0, 11.0, 12.0, 13.0, 14.0)]
    )
    process = np.repeat(np.arange(5), 400)
    [(low, high)] = intervals.percentile_intervals(samples, np.arange(2000) // 20, process, (50,))
    assert low < 11.1
    assert high > 12.9


def test_interval_is_reproducible_and_ignores_the_order_of_block_numbers() -> None:
    samples = np.random.default_rng(5).normal(size=500)
    blocks, one = np.arange(500) // 25, np.zeros(500, int)
    first = intervals.percentile_intervals(samples, blocks, one, (50, 90))
    assert first == intervals.percentile_intervals(samples, blocks * 7 + 3, one, (50, 90))
    assert first != intervals.percentile_intervals(samples, blocks, one, (50, 90), seed=1)


def test_interval_of_a_hundred_thousand_samples_is_quick() -> None:
    samples = np.random.default_rng(6).normal(size=100_000)
    started = time.process_time()
    intervals.percentile_intervals(
        samples, np.arange(100_000) // 400, np.zeros(100_000, int), (50, 90)
    )
    assert time.process_time() - started < 8


@pytest.mark.parametrize(
    ("q", "queries"), [(90, 24_576), (95, 57_344), (97, 90_112), (99, 270_336)]
)
def test_queries_to_claim_is_mlperfs_table(q: float, queries: int) -> None:
    assert intervals.queries_to_claim(q) == queries


def test_wilson_interval_of_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert statistics.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert statistics.wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert statistics.wilson_interval(20, 20)[1] == 1.0


def test_paired_interval_matches_a_plain_bootstrap_over_images() -> None:
    rng = np.random.default_rng(7)
    first = rng.random(300) < 0.8
    second = np.where(rng.random(300) < 0.1, ~first, first)
    draws = rng.integers(0, 300, size=(4000, 300))
    plain = (first[draws].mean(axis=1) - second[draws].mean(axis=1)).astype(float)
    low, high = statistics.paired_interval([(first, second)])
    assert (low, high) == pytest.approx(tuple(np.percentile(plain, [2.5, 97.5])), abs=0.006)


def test_paired_interval_averages_suites_without_weights() -> None:
    always, never = np.ones(10, bool), np.zeros(10, bool)
    many = np.ones(1000, bool)
    assert statistics.paired_interval([(always, never), (many, many)]) == (0.5, 0.5)


def brute_force_mcnemar(won: int, lost: int) -> float:
    extreme = abs(won - lost)
    outcomes = [sum(signs) for signs in product((1, -1), repeat=won + lost)]
    return sum(abs(total) >= extreme for total in outcomes) / len(outcomes)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (5, 5), (1, 0), (6, 1), (2, 9), (0, 8)])
def test_mcnemar_is_the_exact_sign_test(won: int, lost: int) -> None:
    first = np.array([True] * won + [False] * lost + [True] * 20)
    second = np.array([False] * won + [True] * lost + [True] * 20)
    assert statistics.mcnemar_p(first, second) == pytest.approx(brute_force_mcnemar(won, lost))


def test_mcnemar_of_thousands_of_images() -> None:
    first = np.array([True] * 5200 + [False] * 4800)
    # Normal approximation with continuity correction: z = (400 − 1) / 100.
    assert statistics.mcnemar_p(first, ~first) == pytest.approx(
        math.erfc(3.99 / math.sqrt(2)), rel=0.02
    )
