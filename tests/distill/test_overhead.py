"""What the harness adds to a model: measured on one that does nothing, and on one that takes a known time."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from edgekd.targets.timing.stopwatch import Protocol, measure, rotating

RULE = Protocol("quick", 50, 0.05, 0.5, 500, 0.4, 2.0, 0.05, 1)
IMAGES = np.zeros((64, 32, 32, 3), dtype=np.uint8)


def test_an_empty_session_takes_less_than_a_hundredth_of_a_millisecond() -> None:
    """Reading the clock, choosing the image and the call: under 1 % of a model of 1 ms."""
    samples = measure(rotating(lambda images: None, IMAGES), RULE)
    assert np.median(samples.samples_ms) < 0.01


def noting(inside: list[float], model: Callable[[], None]) -> Callable[[np.ndarray], None]:
    """`model`, which writes down itself how many ms it was at work."""

    def known(images: np.ndarray) -> None:
        before = time.perf_counter_ns()
        model()
        inside.append((time.perf_counter_ns() - before) / 1e6)

    return known


def work_1_ms() -> None:
    end = time.perf_counter_ns() + 1_000_000
    while time.perf_counter_ns() < end:
        pass


def added_share(model: Callable[[], None]) -> float:
    """Median of what the harness adds to each call, as a share of the model's own median; the quietest of three."""
    shares = []
    for _ in range(3):
        inside: list[float] = []
        samples = measure(rotating(noting(inside, model), IMAGES), RULE)
        own = np.asarray(inside[-len(samples.samples_ms) :])
        assert np.median(own) >= 1.0
        added = np.median(samples.samples_ms - own)
        assert added >= 0
        shares.append(float(added / np.median(own)))
    return min(shares)


def test_a_model_that_works_for_a_known_time_comes_back_within_one_percent() -> None:
    assert added_share(work_1_ms) < 0.01


def against_a_bare_loop(model: Callable[[], None]) -> float:
    """Median latency by the harness over that of a bare loop with the same clock, which take turns; of 15 rounds."""
    brief = Protocol("quick", 2, 0.0, 0.01, 40, 0.0, 5.0, 0.01, 1)
    ratios = []
    for _ in range(15):
        samples = measure(rotating(lambda images: model(), IMAGES), brief).samples_ms
        bare = []
        for _ in range(len(samples)):
            before = time.perf_counter_ns()
            model()
            bare.append((time.perf_counter_ns() - before) / 1e6)
        ratios.append(float(np.median(samples) / np.median(bare)))
    return float(np.median(ratios))


@pytest.mark.parametrize("model", [work_1_ms, lambda: time.sleep(0.001)], ids=["works", "sleeps"])
def test_p50_of_one_millisecond_is_a_bare_loops_within_one_percent(
    model: Callable[[], None],
) -> None:
    """Of three tries one must be quiet enough; a harness that adds 1 % would pass none."""
    ratios = []
    for _ in range(3):
        ratios.append(against_a_bare_loop(model))
        if 0.99 < ratios[-1] < 1.01:
            return
    raise AssertionError(f"p50 against a bare loop: {ratios}")
