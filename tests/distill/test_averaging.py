from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgekd.distill.averaging import Ema, LastWeights, Swad, find_valley
from edgekd.distill.models.students import Student, make_student


def test_the_valley_is_that_of_the_published_algorithm() -> None:
    """Algorithm 1 of SWAD: the low of 1.0 outlasts three evaluations, and two lie above 1.3 · 1.1 = 1.43."""
    losses = [3.0, 2.0, 1.0, 1.1, 1.2, 1.4, 1.5, 1.6, 0.5]
    assert find_valley(losses, 3, 2, 0.3).__dict__ == {"first": 2, "last": 5, "left": True}
    assert find_valley(losses[:7], 3, 2, 0.3).__dict__ == {"first": 2, "last": 6, "left": False}
    assert find_valley([3.0, 2.0, 1.0], 3, 2, 0.3).first is None


RULE: dict[str, Any] = {"patience": 2, "tolerance": 2, "ratio": 0.3}


def student() -> Student:
    return make_student("test_efficientnet", pretrained="scratch", size=32, dim=4)


def set_to(model: Student, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def weight(model: Student) -> float:
    return model.projector.bias[0].item()


@pytest.mark.parametrize(
    ("losses", "steps", "mean", "label"),
    [
        # evaluations 1 to 3: steps 2 to 7
        ([2.0, 1.0, 1.1, 1.2, 5.0, 6.0], 11, 4.5, "steps 3 to 8"),
        ([3.0, 2.0, 1.0], 5, 4.0, "never stopped falling"),
    ],
)
def test_swad_averages_the_valley(
    losses: list[float], steps: int, mean: float, label: str, tmp_path: Path
) -> None:
    model, curve = student(), iter(losses)
    swad = Swad(model, tmp_path / "swad", 2, steps, lambda _: next(curve), RULE)
    walk(swad, model, range(steps))
    assert weight(swad.result()) == pytest.approx(mean)
    assert label in swad.label
    assert len(list((tmp_path / "swad").glob("*.pt"))) <= 4  # only what may still count is kept


def walk(swad: Swad, model: Student, steps: range) -> None:
    for step in steps:
        set_to(model, float(step))
        swad.update(model, step)


def test_swad_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    curve = [2.0, 1.0, 1.1, 1.2, 1.15]
    model, losses = student(), iter(curve)
    swad = Swad(model, tmp_path, 2, 9, lambda _: next(losses), RULE)
    walk(swad, model, range(5))
    state = swad.state_dict()

    resumed, rest = student(), iter(curve[len(state["losses"]) :])
    swad = Swad(resumed, tmp_path, 2, 9, lambda _: next(rest), RULE)
    swad.load_state_dict(state)
    walk(swad, resumed, range(5, 9))

    assert weight(swad.result()) == pytest.approx(sum(range(2, 9)) / 7)


def test_the_moving_average_and_no_average() -> None:
    model = student()
    set_to(model, 0.0)
    ema, last = Ema(model, 0.5), LastWeights(model)
    set_to(model, 1.0)
    for step in range(1000, 1003):  # long past the decay's warm-up
        ema.update(model, step)
    assert weight(ema.result()) == pytest.approx(1 - 0.5**3)
    assert last.result() is model
    assert (ema.label, last.label) == ("EMA 0.5", "weights")
