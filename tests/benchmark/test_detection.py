"""Detection metrics by hand, and against scikit-learn where it is installed: ties, constant scores, any sizes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edgekd.benchmark.evaluate.metrics import auroc, auroc_draws, average_precision, fpr_at_95

KNOWN = np.array([0.9, 0.8, 0.6, 0.6])
UNKNOWN = np.array([0.7, 0.6, 0.1])


def cases() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(5)
    spread = [
        (rng.normal(0.7, 1, n), rng.normal(0, 1, m))
        for n, m in ((40, 25), (7, 90), (1, 1), (203, 1))
    ]
    tied = [(np.round(known, 0), np.round(unknown, 0)) for known, unknown in spread]
    return [
        *spread,
        *tied,
        (np.ones(9), np.ones(5)),
        (np.zeros(9), np.ones(5)),
        (np.ones(9), np.zeros(5)),
    ]


def test_by_hand() -> None:
    # Of 12 pairs: 0.9 and 0.8 win 3 each; each 0.6 beats 0.1, ties with 0.6, loses to 0.7.
    assert auroc(KNOWN, UNKNOWN) == pytest.approx((3 + 3 + 1.5 + 1.5) / 12)
    # Known positive: 0.9 and 0.8 are found at precision 1, both 0.6 at 4 of 6 images.
    assert average_precision(KNOWN, UNKNOWN) == pytest.approx((1 + 1 + 2 * 4 / 6) / 4)
    # Unknown positive: 0.1 first (1 of 1), then 0.6 with both known ones (2 of 4), then 0.7 (3 of 5).
    assert average_precision(-UNKNOWN, -KNOWN) == pytest.approx((1 + 2 / 4 + 3 / 5) / 3)
    # All four known images must pass, so the threshold is 0.6, which 0.7 and the tied 0.6 pass too.
    assert fpr_at_95(KNOWN, UNKNOWN) == pytest.approx(2 / 3)


def test_nineteen_of_twenty_known_images_are_enough() -> None:
    known = np.arange(20, dtype=float)
    assert fpr_at_95(known, np.array([0.0, 0.5, 1.0, 30.0])) == 0.5
    assert fpr_at_95(np.arange(21, dtype=float), np.array([0.5, 1.0])) == 0.5, (
        "19 of 21 would be fewer than 95 %"
    )


def test_a_constant_score_detects_nothing() -> None:
    same = np.full(8, 0.25)
    assert auroc(same, same[:4]) == 0.5
    assert average_precision(-same[:4], -same) == pytest.approx(4 / 12)
    assert fpr_at_95(same, same[:4]) == 1.0
    assert set(auroc_draws(same, same[:4], replicates=20)) == {0.5}


def test_draws_are_aurocs_of_resampled_images() -> None:
    known, unknown = cases()[4]
    draws = auroc_draws(known, unknown, replicates=50, seed=3)
    rng = np.random.default_rng(3)
    for draw in draws:
        chosen = (
            rng.integers(len(known), size=len(known)),
            rng.integers(len(unknown), size=len(unknown)),
        )
        assert draw == pytest.approx(auroc(known[chosen[0]], unknown[chosen[1]]))


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


def test_draws_of_two_models_are_paired() -> None:
    known, unknown = cases()[0]
    shift = auroc_draws(known, unknown) - auroc_draws(2 * known + 1, 2 * unknown + 1)
    assert np.abs(shift).max() == 0.0, "the same order gives the same draws"


@pytest.mark.parametrize("measure", [auroc, average_precision])
def test_one_group_alone_has_no_number(measure: Callable[..., float]) -> None:
    some, none = np.array([0.1, 0.9]), np.empty(0)
    for known, unknown in ((some, none), (none, some)):
        with pytest.raises(ValueError, match="known and unknown"):
            measure(known, unknown)
