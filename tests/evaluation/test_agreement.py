from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from edgekd.benchmark.evaluate.agreement import (
    angle_degrees,
    m_neigh,
    m_vlalign,
    recall_at,
    squared_distance,
)

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(size=(40, 6)), RNG.normal(size=(40, 6))
TEACHER = STUDENT + 0.8 * TEACHER


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.sqrt((rows * rows).sum(axis=1))[:, None]


def test_relative_position_is_counted_image_by_image() -> None:
    s, t = unit(STUDENT), unit(TEACHER)
    ranks = [
        sorted(range(40), key=lambda j, i=i: float(((t[j] - s[i]) ** 2).sum())).index(i)
        for i in range(40)
    ]  # type: ignore[misc]
    assert recall_at(STUDENT, TEACHER, 1) == sum(rank == 0 for rank in ranks) / 40
    assert 0 < recall_at(STUDENT, TEACHER, 1) < recall_at(STUDENT, TEACHER, 5) < 1
    assert recall_at(STUDENT, TEACHER, 5) == sum(rank < 5 for rank in ranks) / 40


def test_common_neighbours_are_counted_image_by_image() -> None:
    def nearest(rows: np.ndarray, i: int) -> set[int]:
        u = unit(rows)
        return set(
            sorted(
                (j for j in range(40) if j != i), key=lambda j: float(((u[j] - u[i]) ** 2).sum())
            )[:3]
        )

    shared = sum(len(nearest(STUDENT, i) & nearest(TEACHER, i)) for i in range(40))
    assert m_neigh(STUDENT, TEACHER, 3) == pytest.approx(shared / 120)
    assert m_neigh(STUDENT, 2 * STUDENT, 3) == 1
    assert m_neigh(STUDENT[:3], TEACHER[:3], 10) == 1  # two others are all there are
    assert math.isnan(m_neigh(STUDENT[:1], TEACHER[:1], 3))


def test_inversions_are_counted_pair_by_pair() -> None:
    s, t = RNG.normal(size=(20, 7)), RNG.normal(size=(20, 7))
    total = 0
    for ours, theirs in zip(s, t, strict=True):
        best = sorted(range(7), key=lambda c: -theirs[c])[:4]
        total += sum(ours[a] < ours[b] for a, b in itertools.combinations(best, 2))
    assert m_vlalign(s, t, 4) == pytest.approx(total / 20)
    assert m_vlalign(t, t, 5) == 0
    assert m_vlalign(-t, t, 5) == 10
    assert m_vlalign(s, t, 7) == m_vlalign(s, t, 100)


def test_angle_and_distance_say_the_same() -> None:
    one = np.array([[1.0, 0], [0, 2.0]])
    other = np.array([[1.0, 1.0], [0, 1.0]])
    assert angle_degrees(one, other) == pytest.approx(22.5, abs=1e-3)
    assert squared_distance(one, other) == pytest.approx((2 - math.sqrt(2)) / 2, abs=1e-6)


def test_metrics_do_not_depend_on_how_many_rows_are_compared_at_once() -> None:
    many = RNG.normal(size=(1100, 4))
    near = many + 0.1 * RNG.normal(size=many.shape)
    cosines = unit(many) @ unit(near).T
    assert recall_at(many, near, 1) == pytest.approx(
        np.mean(cosines.argmax(axis=1) == np.arange(1100))
    )
