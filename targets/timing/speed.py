"""The ratio of two latencies with its interval, and whether it may be stated as a speed.

Every statement of the form "N times as fast" comes from here. It is withheld, with the reason, if the samples had not
settled, vary too much, or were taken on a busy machine, or if the interval includes 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekd.targets.timing.intervals import Interval, percentile, ratio_interval
from edgekd.targets.timing.stopwatch import LatencySamples, Protocol, measure_interleaved, rotating

WIDE_CV = 0.3
"""Coefficient of variation above which a percentile is not meaningful, because of other work or several states."""
BUSY = 0.2
"""Maximum share of all cores' time for other processes while the clock runs."""
STOLEN = 0.05
"""Maximum share of all cores' time that a hypervisor gives to other machines."""
LOADED = 0.5
"""Load average per core before the run above which a machine counts as busy, if there is no better information."""
NOTE = Protocol("note", 20, 0.3, 2.0, 40, 1.0, 4.0, 0.05, 1)
"""A short protocol of a few seconds."""


@dataclass(frozen=True)
class Timing:
    """Quality of a latency measurement, for claims about it; shares are 0–1 of all cores' time."""

    subject: str
    settled: bool
    cv: float
    other_cpu: float | None
    stolen_cpu: float | None


@dataclass(frozen=True)
class Ratio:
    """p50 of A / p50 of B with its 95 % interval; `withheld` is the reason why it may not be stated as a speed."""

    ratio: float
    ci95: Interval
    withheld: str | None


def reason_to_withhold(
    timings: Sequence[Timing], ci95: Interval, load: float | None = None
) -> str | None:
    """Return the reason why a ratio of latencies must not be stated as a speed, or None.

    Args:
        timings: of the latencies that it compares.
        ci95: 95 % interval of the ratio.
        load: load average per core of their machine before the run; None where unknown.
    """
    for one in timings:
        if not one.settled:
            return f"{one.subject} had not settled when its warm-up ended"
    for one in timings:
        if one.cv > WIDE_CV:
            return f"the latencies of {one.subject} vary too much (coefficient of variation {one.cv:.2f})"
    for one in timings:
        shares = ((one.stolen_cpu, STOLEN, "the hypervisor"), (one.other_cpu, BUSY, "other work"))
        for share, most, who in shares:
            if share is not None and share > most:
                taken = f"{100 * share:.0f} % of the processor's time"
                return f"{who} took {taken} while {one.subject} was timed"
    if load is not None and load > LOADED and any(one.other_cpu is None for one in timings):
        return f"the machine was busy (load average {load:.1f} per core before the run)"
    if ci95[0] <= 1 <= ci95[1]:
        return f"the 95 % interval of the ratio, {ci95[0]:.2f}–{ci95[1]:.2f}, includes 1"
    return None


def in_words(found: Ratio | None, other: str) -> str:
    """Return A's speed beside B's as a predicate, B called `other`: `is 1.85 times as fast as B (95 % CI 1.80–1.90)`.

    If the claim is withheld, the predicate gives the reason.
    """
    if found is None:
        return f"has no interval of its speed against {other}, so none is stated"
    if found.withheld is not None:
        return f"has no measured difference in speed to {other}: {found.withheld}"
    low, high = found.ci95
    if found.ratio < 1:
        return f"is {1 / found.ratio:.2f} times as fast as {other} (95 % CI {1 / high:.2f}–{1 / low:.2f})"
    return f"takes {found.ratio:.2f} times as long as {other} (95 % CI {low:.2f}–{high:.2f})"


def timed_in_turns(
    models: Mapping[str, Callable[[NDArray[np.uint8]], object]], images: NDArray[np.uint8]
) -> dict[str, LatencySamples]:
    """Time models in alternating blocks of this process, for a few seconds.

    Args:
        models: name → a model of uint8 `[1, H, W, 3]`.
        images: uint8 `[N, H, W, 3]`, in rotation.
    """
    return measure_interleaved({name: rotating(one, images) for name, one in models.items()}, NOTE)


def speed_of(a: str, b: str, found: Mapping[str, LatencySamples]) -> Ratio:
    """Return the ratio of model `a` to model `b`, which were timed in turns."""
    timings = [
        Timing(
            name,
            one.settled,
            float(one.samples_ms.std() / one.samples_ms.mean()),
            one.other_cpu,
            one.stolen_cpu,
        )
        for name, one in ((a, found[a]), (b, found[b]))
    ]
    turns, p50 = turns_of([found[a]], [found[b]])
    ci95 = ratio_interval(*turns)
    return Ratio(p50[0] / p50[1], ci95, reason_to_withhold(timings, ci95))


Turns = tuple[list[NDArray[np.float64]], list[NDArray[np.float64]], NDArray[np.int64]]


def turns_of(
    first: Sequence[LatencySamples], second: Sequence[LatencySamples]
) -> tuple[Turns, tuple[float, float]]:
    """Return samples of A and of B in each turn, the process of each turn, and both medians over these turns.

    If one model finishes earlier, the later samples of the other have no partner and are not used.
    """
    a: list[NDArray[np.float64]] = []
    b: list[NDArray[np.float64]] = []
    process_of: list[int] = []
    for process, (one, other) in enumerate(zip(first, second, strict=True)):
        pairs = list(zip(_by_block(one), _by_block(other), strict=False))
        a += [mine for mine, _ in pairs]
        b += [theirs for _, theirs in pairs]
        process_of += [process] * len(pairs)
    p50 = percentile(np.concatenate(a), 50), percentile(np.concatenate(b), 50)
    return (a, b, np.asarray(process_of, dtype=np.int64)), p50


def _by_block(samples: LatencySamples) -> list[NDArray[np.float64]]:
    return np.split(samples.samples_ms, np.flatnonzero(np.diff(samples.blocks)) + 1)
