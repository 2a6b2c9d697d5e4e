from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgekd.distill.averaging import Ema, LastWeights, Swad, find_valley
from edgekd.distill.students import Student, make_student


def slow_valley(
    losses: list[float], patience: int, tolerance: int, ratio: float
) -> tuple[int, int]:
    """Algorithm 1 of the SWAD paper, evaluation by evaluation, as it is printed there."""
    start, end, threshold = 0, len(losses) - 1, None
    for i in range(len(losses)):
        if threshold is None:
            window = [losses[i - back] for back in range(patience) if i - back >= 0]
            if len(window) == patience and losses[i - patience + 1] == min(window):
                start = i - patience + 1
                threshold = (1 + ratio) / patience * sum(window)
        elif i - tolerance >= start and threshold < min(
            losses[i - back] for back in range(tolerance)
        ):
            return start, i - tolerance
    return start, end


def test_the_valley_is_that_of_the_published_algorithm() -> None:
    make = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(300):
        patience, tolerance = (int(torch.randint(1, 5, (), generator=make)) for _ in range(2))
        falling = torch.linspace(2, -1, 16).abs()
        losses = (falling + 0.4 * torch.rand(16, generator=make)).tolist()
        valley = find_valley(losses, patience, tolerance, 0.1)
        assert (valley.first or 0, valley.last) == slow_valley(losses, patience, tolerance, 0.1)
        seen.add((valley.first is None, valley.left))
    assert {(False, True), (False, False)} <= seen


def test_a_valley_by_hand() -> None:
    # The low of 1.0 outlasts three evaluations; threshold 1.3 · (1 + 1.1 + 1.2) / 3 = 1.43; then two lie above.
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
    assert model.projector is not None
    return model.projector.bias[0].item()


def test_swad_averages_every_step_of_the_valley(tmp_path: Path) -> None:
    model = student()
    #        evaluation:  0         1         2         3         4         5
    losses = iter([2.0, 1.0, 1.1, 1.2, 5.0, 6.0])
    swad = Swad(model, tmp_path / "swad", 2, 11, lambda _: next(losses), RULE)
    for step in range(11):
        set_to(model, float(step))
        swad.update(model, step)
        # Only what may still count is kept.
        assert len(list((tmp_path / "swad").glob("*.pt"))) <= 4
    # Evaluations 1 to 3 are the valley: steps 2 to 7.
    assert weight(swad.result()) == pytest.approx(sum(range(2, 8)) / 6)
    assert "steps 3 to 8" in swad.label


def test_a_loss_that_only_falls_gives_the_last_segment_and_says_so(tmp_path: Path) -> None:
    model = student()
    losses = iter([3.0, 2.0, 1.0])
    swad = Swad(model, tmp_path, 2, 5, lambda _: next(losses), RULE)
    for step in range(5):
        set_to(model, float(step))
        swad.update(model, step)
    assert weight(swad.result()) == pytest.approx(4)
    assert "never stopped falling" in swad.label


def test_swad_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    curve = [2.0, 1.0, 1.1, 1.2, 1.15]

    def walk(swad: Swad, model: Student, steps: range) -> None:
        for step in steps:
            set_to(model, float(step))
            swad.update(model, step)

    results = []
    for stop in (None, 5):
        model, folder = student(), tmp_path / str(stop)
        losses = iter(curve)
        swad = Swad(model, folder, 2, 9, lambda _, losses=losses: next(losses), RULE)  # type: ignore[misc]
        if stop is None:
            walk(swad, model, range(9))
        else:
            walk(swad, model, range(stop))
            state = swad.state_dict()
            model = student()
            rest = iter(curve[len(state["losses"]) :])
            swad = Swad(model, folder, 2, 9, lambda _, rest=rest: next(rest), RULE)  # type: ignore[misc]
            swad.load_state_dict(state)
            walk(swad, model, range(stop, 9))
        results.append(weight(swad.result()))
    assert results[0] == pytest.approx(results[1])
    assert results[0] == pytest.approx(sum(range(2, 9)) / 7)


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
