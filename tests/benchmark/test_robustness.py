"""Effective robustness against lines that are known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from edgekd.benchmark.report.comparison import effective_robustness, log_odds


def entry(
    name: str, kind: str, top1: dict[str, float], *, run: str | None = None, n: int = 10_000
) -> Any:
    rows = {suite: SimpleNamespace(top1=value, n=n) for suite, value in top1.items()}
    summary = SimpleNamespace(kind=kind, run=run or name)
    return SimpleNamespace(
        name=name,
        summary=summary,
        source=SimpleNamespace(letter=""),
        accuracy=rows,
        outside=[suite for suite in rows if suite.startswith("ood:")],
    )


def on_line(inside: float, slope: float, intercept: float) -> float:
    """Written out again: σ(slope · ln(p / (1 − p)) + intercept)."""
    return 1 / (1 + math.exp(-(slope * math.log(inside / (1 - inside)) + intercept)))


def student(
    name: str, inside: float, *, beyond: float = 0.0, kind: str = "torch", run: str | None = None
) -> Any:
    return entry(name, kind, {"id": inside, "ood:x": on_line(inside, 0.8, -1.0) + beyond}, run=run)


def test_students_on_a_line_shape_it_and_a_teacher_is_set_against_it() -> None:
    group = [
        student("a", 0.6), student("b", 0.75), student("c", 0.9),
        student("c int8", 0.88, beyond=-0.03, kind="artifact", run="c"), student("t", 0.7, beyond=0.2, kind="teacher"),
    ]  # fmt: skip
    found = effective_robustness(group)
    assert found.lines == {"ood:x": pytest.approx((0.8, -1.0, 1.0))}
    assert found.models == ("a", "b", "c")
    assert [beyond["ood:x"] for beyond in found.beyond] == pytest.approx(
        [0, 0, 0, -0.03, 0.2], abs=1e-9
    )


def test_residuals_of_least_squares_by_hand() -> None:
    """Log-odds 0, 1, 2 in domain and 0, 1, 0 outside: the line is flat at 1/3."""

    def sigmoid(odds: float) -> float:
        return 1 / (1 + math.exp(-odds))

    group = [
        entry(n, "torch", {"id": sigmoid(x), "ood:x": sigmoid(y)})
        for n, x, y in (("a", 0, 0), ("b", 1, 1), ("c", 2, 0))
    ]
    found = effective_robustness(group)
    slope, _, r2 = found.lines["ood:x"]
    assert (slope, r2) == pytest.approx((0, 0), abs=1e-9)
    assert found.beyond[1]["ood:x"] == pytest.approx(sigmoid(1) - sigmoid(1 / 3))


def test_files_stand_in_for_students_that_were_not_measured() -> None:
    group = [student(name, 0.5 + 0.1 * n, kind="artifact") for n, name in enumerate("abc")]
    assert effective_robustness(group).models == ("a", "b", "c")


def test_all_or_none_right_is_half_an_image_away() -> None:
    for top1, odds in ((1.0, math.log(99)), (0.0, -math.log(99))):
        assert log_odds(SimpleNamespace(top1=top1, n=50)) == pytest.approx(odds)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("group", "said"),
    [
        (
            [
                student("a", 0.5),
                student("b", 0.6),
                student("b int8", 0.7, kind="artifact", run="b"),
            ],
            "there are 2",
        ),
        ([student(name, 0.5) for name in "abc"], "equally accurate"),
        ([entry(name, "torch", {"ood:x": 0.5}) for name in "abc"], "not both in and out"),
        ([entry(name, "torch", {"id": 0.5}) for name in "abc"], "not both in and out"),
    ],
)
def test_a_reason_is_given_where_there_is_no_line(group: list[Any], said: str) -> None:
    found = effective_robustness(group)
    assert said in found
