"""Metrics against numbers computed by hand and against scikit-learn where it is installed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgekd.benchmark.evaluate import metrics


def logits_of(probabilities: list[list[float]]) -> np.ndarray:
    return np.log(np.asarray(probabilities, dtype=np.float32))


FOUR = logits_of([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
LABELS = np.array([0, 1, 1, 2])


def random_case(n: int = 500, classes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)).astype(np.float32)
    logits[np.arange(n), labels] += 1.0
    return logits, labels


def test_accuracy_by_hand() -> None:
    assert metrics.top1(FOUR, LABELS) == 0.75
    assert metrics.per_class(FOUR, LABELS).tolist() == [1.0, 0.5, 1.0]
    assert metrics.macro(FOUR, LABELS) == pytest.approx(2.5 / 3)
    assert metrics.worst_class(FOUR, LABELS) == (1, 0.5)


def test_a_class_without_images_counts_for_nothing() -> None:
    labels = np.array([0, 1, 1, 1])
    assert np.isnan(metrics.per_class(FOUR, labels)[2])
    assert metrics.macro(FOUR, labels) == pytest.approx((1 + 1 / 3) / 2)
    assert metrics.worst_class(FOUR, labels)[0] == 1


def test_nll_and_brier_by_hand() -> None:
    expected = -sum(math.log(p) for p in (0.7, 0.3, 0.5, 0.8)) / 4
    assert metrics.nll(FOUR, LABELS) == pytest.approx(expected, rel=1e-6)
    brier = (
        (0.09 + 0.04 + 0.01) + (0.36 + 0.49 + 0.01) + (0.04 + 0.25 + 0.09) + (0.01 + 0.01 + 0.04)
    )
    assert metrics.brier(FOUR, LABELS) == pytest.approx(brier / 4, rel=1e-6)


def test_ece_by_hand() -> None:
    # Five bins of 0.2: 0.5 falls into the third, 0.7 and 0.65 into the fourth, 0.8+ into the last.
    logits = logits_of([[0.7, 0.3], [0.65, 0.35], [0.9, 0.1], [0.95, 0.05], [0.55, 0.45]])
    labels = np.array([0, 1, 0, 0, 1])
    fourth = abs(1 - 1.35)
    fifth = abs(2 - 1.85)
    third = abs(0 - 0.55)
    assert metrics.ece(logits, labels, bins=5) == pytest.approx(
        (third + fourth + fifth) / 5, rel=1e-5
    )


def test_ece_bins_are_closed_on_the_right() -> None:
    # Confidence exactly 0.5 belongs to (0, 0.5]; with 0.75 in the same bin the errors would cancel to 0.125.
    logits = np.array([[0.0, 0.0], [math.log(3), 0.0]])
    assert metrics.ece(logits, np.array([0, 1]), bins=2) == pytest.approx((0.5 + 0.75) / 2)


def test_adaptive_ece_by_hand() -> None:
    logits = logits_of([[0.95, 0.05], [0.6, 0.4], [0.9, 0.1], [0.7, 0.3]])
    labels = np.array([0, 0, 1, 1])
    # Sorted by confidence: 0.6 right, 0.7 wrong | 0.9 wrong, 0.95 right.
    expected = (abs(1 - 1.3) + abs(1 - 1.85)) / 4
    assert metrics.adaptive_ece(logits, labels, bins=2) == pytest.approx(expected, rel=1e-5)


def test_calibrated_predictions_have_small_errors_and_overconfident_ones_large() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), size=20_000)
    labels = (probabilities.cumsum(axis=1) > rng.random((20_000, 1))).argmax(axis=1)
    calibrated = np.log(probabilities)
    assert metrics.ece(calibrated, labels) < 0.015
    assert metrics.adaptive_ece(calibrated, labels) < 0.015
    assert metrics.ece(3 * calibrated, labels) > 0.15
    assert metrics.adaptive_ece(3 * calibrated, labels) > 0.15


def test_agreement_counts_equal_answers_right_or_wrong() -> None:
    other = logits_of([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.1, 0.1, 0.8]])
    assert metrics.agreement(FOUR, other) == 0.75


def test_large_logits_stay_finite() -> None:
    logits = np.array([[5e4, 0.0], [0.0, 5e4]], dtype=np.float32)
    assert metrics.nll(logits, np.array([0, 0])) == pytest.approx(2.5e4)
    assert metrics.brier(logits, np.array([0, 0])) == pytest.approx(1.0)


def test_against_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    logits, labels = random_case()
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    predicted = logits.argmax(axis=1)
    assert metrics.top1(logits, labels) == pytest.approx(sklearn.accuracy_score(labels, predicted))
    assert metrics.macro(logits, labels) == pytest.approx(
        sklearn.balanced_accuracy_score(labels, predicted)
    )
    assert metrics.nll(logits, labels) == pytest.approx(
        sklearn.log_loss(labels, probabilities), rel=1e-6
    )
    one_against_rest = sum(
        sklearn.brier_score_loss(labels == c, probabilities[:, c])
        for c in range(probabilities.shape[1])
    )
    assert metrics.brier(logits, labels) == pytest.approx(one_against_rest, rel=1e-6)
