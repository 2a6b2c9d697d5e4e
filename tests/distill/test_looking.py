from __future__ import annotations

import pytest

from edgekd.configs.train import TrainConfig
from edgekd.distill.progress import places, validation_every


@pytest.mark.parametrize(
    ("span", "every", "expected"),
    [
        (range(20), None, (2, 4, 6, 8, 10, 12, 14, 16, 18, 20)),
        (range(100, 125), None, (103, 105, 108, 110, 113, 115, 118, 120, 123, 125)),
        (range(5, 8), None, (6, 7, 8)),  # fewer steps than places
        (range(10), 4, (4, 8, 10)),
        (range(3, 10), 4, (4, 8, 10)),  # of the run's steps, not the stage's
        (range(4, 12), 4, (8, 12)),
        (range(3), 50, (3,)),
    ],
)
def test_places_end_with_the_stage(
    span: range, every: int | None, expected: tuple[int, ...]
) -> None:
    assert places(span, every) == expected


def test_validation_is_looked_at_as_often_as_the_settings_say() -> None:
    assert validation_every(TrainConfig(), 80) is None
    assert validation_every(TrainConfig(select="best"), 80) == 10
    assert validation_every(TrainConfig(select="best"), 5) == 1
    assert validation_every(TrainConfig(select="best", eval_every=3), 80) == 3
