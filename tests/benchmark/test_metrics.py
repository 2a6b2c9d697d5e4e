from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import scipy.special
import sklearn.metrics

from edgekd.benchmark.evaluate import metrics, statistics
from edgekd.benchmark.evaluate.metrics import auroc, auroc_draws, average_precision, fpr_at_95
from edgekd.targets.timing import intervals


def logits_of(probabilities: list[list[float]]) -> np.ndarray:
    return np.log(np.asarray(probabilities, dtype=np.float32))


FOUR = logits_of([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])

LABELS = np.array([0, 1, 1, 2])


def test_accuracy_by_hand() -> None:
    assert metrics.top1(FOUR, LABELS) == 0.75
    assert metrics.per_class(FOUR, LABELS).tolist() == [1.0, 0.5, 1.0]
    assert metrics.macro(FOUR, LABELS) == pytest.approx(2.5 / 3)
    assert metrics.worst_class(FOUR, LABELS) == (1, 0.5)
    assert metrics.agreement(FOUR, FOUR[[0, 1, 0, 3]]) == 0.75
    without = np.array([0, 1, 1, 1])  # a class without images counts for nothing
    assert np.isnan(metrics.per_class(FOUR, without)[2])
    assert metrics.macro(FOUR, without) == pytest.approx((1 + 1 / 3) / 2)
    assert metrics.worst_class(FOUR, without)[0] == 1


def test_calibration_errors_by_hand() -> None:
    # Confidence exactly 0.5 belongs to (0, 0.5]; with 0.75 in the same bin the errors would cancel to 0.125.
    logits = np.array([[0.0, 0.0], [math.log(3), 0.0]])
    assert metrics.ece(logits, np.array([0, 1]), bins=2) == pytest.approx((0.5 + 0.75) / 2)
    logits = logits_of([[0.95, 0.05], [0.6, 0.4], [0.9, 0.1], [0.7, 0.3]])
    # Sorted by confidence: 0.6 right, 0.7 wrong | 0.9 wrong, 0.95 right.
    expected = (abs(1 - 1.3) + abs(1 - 1.85)) / 4
    found = metrics.adaptive_ece(logits, np.array([0, 0, 1, 1]), bins=2)
    assert found == pytest.approx(expected, rel=1e-5)
    large = np.array([[5e4, 0.0], [0.0, 5e4]], dtype=np.float32)
    assert metrics.nll(large, np.array([0, 0])) == pytest.approx(2.5e4)
    assert metrics.brier(large, np.array([0, 0])) == pytest.approx(1.0)


def test_against_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 6, 500)
    logits = rng.normal(size=(500, 6)).astype(np.float32)
    logits[np.arange(500), labels] += 1.0
    probabilities = scipy.special.softmax(logits.astype(np.float64), axis=1)
    balanced = sklearn.metrics.balanced_accuracy_score(labels, logits.argmax(axis=1))
    assert metrics.macro(logits, labels) == pytest.approx(balanced)
    nll = sklearn.metrics.log_loss(labels, probabilities)
    assert metrics.nll(logits, labels) == pytest.approx(nll, rel=1e-6)
    each = [sklearn.metrics.brier_score_loss(labels == c, probabilities[:, c]) for c in range(6)]
    assert metrics.brier(logits, labels) == pytest.approx(sum(each), rel=1e-6)


KNOWN = np.array([0.9, 0.8, 0.6, 0.6])

UNKNOWN = np.array([0.7, 0.6, 0.1])


def test_detection_by_hand() -> None:
    # Of 12 pairs: 0.9 and 0.8 win 3 each; each 0.6 beats 0.1, ties with 0.6, loses to 0.7.
    assert auroc(KNOWN, UNKNOWN) == pytest.approx((3 + 3 + 1.5 + 1.5) / 12)
    # Known positive: 0.9 and 0.8 are found at precision 1, both 0.6 at 4 of 6 images.
    assert average_precision(KNOWN, UNKNOWN) == pytest.approx((1 + 1 + 2 * 4 / 6) / 4)
    # Unknown positive: 0.1 first (1 of 1), then 0.6 with both known ones (2 of 4), then 0.7 (3 of 5).
    assert average_precision(-UNKNOWN, -KNOWN) == pytest.approx((1 + 2 / 4 + 3 / 5) / 3)
    # All four known images must pass, so the threshold is 0.6, which 0.7 and the tied 0.6 pass too.
    assert fpr_at_95(KNOWN, UNKNOWN) == pytest.approx(2 / 3)
    # 19 of 20 are enough; 19 of 21 would be fewer than 95 %.
    known = np.arange(21, dtype=float)
    assert fpr_at_95(known[:20], np.array([0.0, 0.5, 1.0, 30.0])) == 0.5
    assert fpr_at_95(known, np.array([0.5, 1.0])) == 0.5
    for measure in (auroc, average_precision):
        for one, other in ((KNOWN, KNOWN[:0]), (KNOWN[:0], UNKNOWN)):
            with pytest.raises(ValueError, match="known and unknown"):
                measure(one, other)


def test_a_constant_score_detects_nothing() -> None:
    same = np.full(8, 0.25)
    assert auroc(same, same[:4]) == 0.5
    assert average_precision(-same[:4], -same) == pytest.approx(4 / 12)
    assert fpr_at_95(same, same[:4]) == 1.0
    assert set(auroc_draws(same, same[:4], replicates=20)) == {0.5}


def test_draws_spread_as_by_delong() -> None:
    """DeLong et al. 1988: the variance of an AUROC from the share of the other side that each image beats."""
    rng = np.random.default_rng(0)
    known, unknown = rng.normal(1, 1, 300), rng.normal(0, 1, 200)
    beaten = (known[:, None] > unknown).mean(axis=1)
    beating = (known[:, None] > unknown).mean(axis=0)
    expected = np.sqrt(beaten.var(ddof=1) / 300 + beating.var(ddof=1) / 200)
    draws = auroc_draws(known, unknown)
    assert draws.std() == pytest.approx(expected, rel=0.06)
    assert draws.mean() == pytest.approx(auroc(known, unknown), abs=0.002)
    paired = auroc_draws(2 * known + 1, 2 * unknown + 1)
    assert np.array_equal(draws, paired), "the same order gives the same draws"


def test_percentile_is_a_real_sample() -> None:
    samples = np.array([5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    assert intervals.percentile(samples, 50) == 5.0
    assert intervals.percentile(samples, 90) == 9.0
    assert intervals.percentile(samples, 91) == 10.0
    # MLPerf's table of the queries that a percentile needs.
    assert [intervals.queries_to_claim(q) for q in (90, 99)] == [24_576, 270_336]


def _intervals(*data: object, replicates: int = 1000) -> list[tuple[float, float]]:
    draws = intervals.percentile_draws(*data, replicates=replicates)  # type: ignore[arg-type]
    return [intervals.interval_of(column) for column in draws.T]


def test_interval_width_matches_the_asymptotic_standard_error() -> None:
    samples = np.random.default_rng(1).normal(size=20_000)
    blocks = np.arange(20_000) // 50
    half, ninety = _intervals(samples, blocks, np.zeros(20_000, int), (50, 90))
    for (low, high), q, density in ((half, 0.5, 0.39894), (ninety, 0.9, 0.17550)):
        standard_error = math.sqrt(q * (1 - q) / 20_000) / density
        assert (high - low) == pytest.approx(2 * 1.96 * standard_error, rel=0.25)


def test_drift_between_blocks_widens_the_interval() -> None:
    rng = np.random.default_rng(2)
    drifting = np.repeat(rng.normal(10, 1, size=40), 50) + rng.normal(0, 0.1, size=2000)
    one = np.zeros(2000, int)
    [(low, high)] = _intervals(drifting, np.arange(2000) // 50, one, (50,))
    [(naive_low, naive_high)] = _intervals(drifting, np.arange(2000), one, (50,))
    assert high - low > 3 * (naive_high - naive_low)


def test_processes_are_drawn_before_blocks() -> None:
    rng = np.random.default_rng(4)
    samples = np.concatenate(
        [rng.normal(level, 0.01, size=400) for level in (10.0, 11.0, 12.0, 13.0, 14.0)]
    )
    process = np.repeat(np.arange(5), 400)
    [(low, high)] = _intervals(samples, np.arange(2000) // 20, process, (50,))
    assert low < 11.1
    assert high > 12.9


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
    # Suites are averaged without weights.
    always, never, many = np.ones(10, bool), np.zeros(10, bool), np.ones(1000, bool)
    assert statistics.paired_interval([(always, never), (many, many)]) == (0.5, 0.5)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (5, 5), (2, 9), (0, 8)])
def test_mcnemar_is_the_exact_sign_test(won: int, lost: int) -> None:
    first = np.array([True] * won + [False] * lost + [True] * 20)
    second = np.array([False] * won + [True] * lost + [True] * 20)
    sums = np.array([sum(signs) for signs in product((1, -1), repeat=won + lost)])
    expected = (np.abs(sums) >= abs(won - lost)).mean()
    assert statistics.mcnemar_p(first, second) == pytest.approx(expected)
