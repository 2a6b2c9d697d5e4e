from __future__ import annotations

import math

import numpy as np
import pytest

from edgekd.core.errors import EdgekdError
from edgekd.export.parity import check, compare


def logits(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def test_numbers_against_hand_computed_values() -> None:
    parity = compare(logits([0, 1], [3, -1]), logits([0.5, 1], [3, 4]))
    assert parity["n"] == 2
    assert parity["max_abs_error"] == 5
    assert parity["mean_abs_error"] == pytest.approx(5.5 / 4)
    assert parity["logit_range"] == 4
    assert parity["max_error_relative"] == pytest.approx(1.25)
    assert parity["top1_agreement"] == 0.5
    first, second = 1 / math.hypot(0.5, 1), (9 - 4) / (math.hypot(3, 1) * 5)
    assert parity["cosine"] == pytest.approx((first + second) / 2)


def test_kl_of_two_known_distributions() -> None:
    parity = compare(logits([math.log(3), 0]), logits([0, 0]))  # (3/4, 1/4) against (1/2, 1/2)
    assert parity["kl"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)


def test_constant_shift_is_an_error_of_logits_but_not_of_probabilities() -> None:
    reference = logits([1, 2, 3])
    parity = compare(reference, reference + 100)
    assert parity["kl"] == pytest.approx(0, abs=1e-9)
    assert parity["max_abs_error"] == 100


@pytest.mark.parametrize(("precision", "wrong", "passed"), [("fp32", 0, True), ("fp32", 1, False)])
def test_one_wrong_image_in_five_hundred(precision: str, wrong: int, passed: bool) -> None:
    reference = np.tile(logits([1, 0]), (500, 1))
    candidate = reference.copy()
    candidate[:wrong] = [0, 1]
    result = check(compare(reference, candidate), precision)
    assert result["passed"] is passed
    assert ("reason" in result) is not passed


@pytest.mark.parametrize(
    ("precision", "agreement", "error", "passed"),
    [
        ("fp32", 1.0, 1e-3, True),
        ("fp32", 1.0, 1.1e-3, False),
        ("fp16", 0.995, 0.1, True),
        ("fp16", 0.994, 0.0, False),
        ("int8", 0.97, 0.3, True),
        ("int8", 0.969, 0.0, False),
    ],
)
def test_thresholds(precision: str, agreement: float, error: float, passed: bool) -> None:
    assert (
        check({"top1_agreement": agreement, "max_error_relative": error}, precision)["passed"]
        is passed
    )


@pytest.mark.parametrize(
    ("reference", "candidate", "message"),
    [
        (logits([1, 2]), logits([1, 2], [3, 4]), "cannot be compared"),
        (np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32), "cannot be compared"),
        (logits([1, 2]), logits([1, math.nan]), "not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    reference: np.ndarray, candidate: np.ndarray, message: str
) -> None:
    with pytest.raises(EdgekdError, match=message):
        compare(reference, candidate)
