"""Latency of one image: single stream, batch 1, real images, every sample kept.

Single stream means that the next query starts when the previous one is finished (as in MLPerf). Inside the clock is one
call of the model on a uint8 image in memory. Reading, decoding and resizing are outside and timed separately
(`prepare_p50_ms` in the report).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.core.machine import other_work, processor_seconds
from edgekd.targets.timing.energy import Meter
from edgekd.targets.timing.intervals import (
    interval_of,
    percentile,
    percentile_draws,
    queries_to_claim,
)

RunOnce = Callable[[int], object]
Clock = Callable[[], int]
MIN_BUFFERS = 64
"""Minimum number of images in rotation, so that an input does not stay in the inner caches between queries."""
REENTRY_RUNS = 2
"""Number of untimed queries after a change of the model, because the caches have the other model's data."""
SETTLED_WITHIN = 0.02
_WINDOW_RUNS = 25


@dataclass(frozen=True)
class Protocol:
    """Limits of warm-up and measurement: minimum runs and minimum time, unless `limit_s` is reached."""

    name: str
    warmup_runs: int
    warmup_s: float
    warmup_limit_s: float
    """Time after which an unsettled warm-up ends and is marked."""
    runs: int
    seconds: float
    limit_s: float
    """Time after which the measurement ends even with fewer than `runs`, and is marked."""
    block_s: float
    """Length of a block. Models alternate by blocks, and intervals are drawn by blocks."""
    processes: int
    """Fresh processes for each artifact."""


FULL = Protocol("full", 50, 3.0, 30.0, 1024, 60.0, 600.0, 1.0, 5)
QUICK = Protocol("quick", 50, 1.0, 5.0, 128, 6.0, 60.0, 0.3, 1)
"""Protocol with the duration of MLPerf Mobile's rapid mode; results are marked as indicative."""
END_TO_END = Protocol("end to end", 50, 3.0, 30.0, 1024, 60.0, 600.0, 1.0, 1)
END_TO_END_QUICK = Protocol("end to end, quick", 50, 0.5, 3.0, 64, 2.0, 20.0, 0.5, 1)
"""For end-to-end latency, from encoded image to logits, on this machine; a device's agent takes its job's protocol."""
CONTEXT = Protocol("context", 5, 0.3, 1.0, 20, 1.0, 2.5, 0.1, 1)
"""For teacher and torch student: measured in the calling process, briefly, to give the artifacts a background."""


@dataclass(frozen=True, eq=False)
class LatencySamples:
    """One model in one process.

    Attributes:
        samples_ms: float64 `[n]`, in the order measured, none left out.
        blocks: int64 `[n]`, rising number of the block that a sample belongs to.
        first_ms: the very first call.
        warmup_runs: untimed calls before the first sample, the first call included.
        warmup_s: time they took.
        settled: the last two windows of the warm-up had medians less than 2 % apart.
        complete: the protocol's runs and seconds were both reached.
        joules: energy of the measured blocks; None without a sensor.
        metered_s: length of these blocks, seen from outside the clock.
        other_cpu: share 0–1 of all cores' time that other processes took while the blocks were measured; None where the
            system does not report it.
        stolen_cpu: the same of time that a hypervisor gave to other machines.
    """

    samples_ms: NDArray[np.float64]
    blocks: NDArray[np.int64]
    first_ms: float
    warmup_runs: int
    warmup_s: float
    settled: bool
    complete: bool
    joules: float | None = None
    metered_s: float = 0.0
    other_cpu: float | None = None
    stolen_cpu: float | None = None


def rotating(
    predict: Callable[[NDArray[np.uint8]], object], buffers: NDArray[np.uint8], batch: int = 1
) -> RunOnce:
    """Return a runner that calls `predict` on one batch of consecutive images after the other, in rotation.

    Args:
        predict: takes uint8 `[batch, H, W, 3]`.
        buffers: uint8 `[N, H, W, 3]`; repeated where a batch is larger.
    """
    if batch > len(buffers):
        buffers = np.resize(buffers, (batch, *buffers.shape[1:]))
    views = [buffers[start : start + batch] for start in range(0, len(buffers) - batch + 1, batch)]
    return lambda query: predict(views[query % len(views)])


def measure(
    run_once: RunOnce,
    protocol: Protocol,
    *,
    clock: Clock = time.perf_counter_ns,
    meter: Meter | None = None,
) -> LatencySamples:
    """Warm up and time one model; `run_once(i)` runs query i."""
    return measure_interleaved({"": run_once}, protocol, clock=clock, meter=meter)[""]


def measure_interleaved(
    runners: Mapping[str, RunOnce],
    protocol: Protocol,
    *,
    clock: Clock = time.perf_counter_ns,
    meter: Meter | None = None,
) -> dict[str, LatencySamples]:
    """Warm up each model, then time them in alternating blocks (A B A B …) until each has enough.

    Drifts of a shared machine (clocks, other work) then affect all of them equally. Garbage collection is off while the
    clock runs. `meter` is read before and after each block.
    """
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        states = {name: _warm_up(run_once, protocol, clock) for name, run_once in runners.items()}
        block = 0
        before, own = processor_seconds(), time.process_time()
        while waiting := [state for state in states.values() if not state.ended(protocol)]:
            for state in waiting:
                if len(waiting) > 1:
                    for _ in range(REENTRY_RUNS):
                        state.query(clock)
                state.timed_block(block, protocol.block_s, clock, meter)
                block += 1
        shares = other_work(before, processor_seconds(), time.process_time() - own)
    finally:
        if collecting:
            gc.enable()
    return {name: state.result(protocol, shares) for name, state in states.items()}


@dataclass
class _State:
    """One model while it is being measured. Times in nanoseconds."""

    run_once: RunOnce
    queries: int = 0
    warmup: list[int] = field(default_factory=list)
    settled: bool = False
    samples: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    timed: int = 0
    joules: float = 0.0
    metered_s: float = 0.0

    def query(self, clock: Clock) -> int:
        before = clock()
        self.run_once(self.queries)
        after = clock()
        self.queries += 1
        return after - before

    def timed_block(self, block: int, block_s: float, clock: Clock, meter: Meter | None) -> None:
        if meter is not None:
            meter.begin()
        spent = 0
        while spent < block_s * 1e9:
            elapsed = self.query(clock)
            self.samples.append(elapsed)
            self.blocks.append(block)
            spent += elapsed
        self.timed += spent
        if meter is not None:
            joules, seconds = meter.end()
            self.joules += joules
            self.metered_s += seconds

    def complete(self, protocol: Protocol) -> bool:
        return len(self.samples) >= protocol.runs and self.timed >= protocol.seconds * 1e9

    def ended(self, protocol: Protocol) -> bool:
        return self.complete(protocol) or self.timed >= protocol.limit_s * 1e9

    def result(self, protocol: Protocol, shares: tuple[float, float] | None) -> LatencySamples:
        return LatencySamples(
            np.asarray(self.samples, dtype=np.float64) / 1e6,
            np.asarray(self.blocks, dtype=np.int64),
            first_ms=self.warmup[0] / 1e6,
            warmup_runs=len(self.warmup),
            warmup_s=sum(self.warmup) / 1e9,
            settled=self.settled,
            complete=self.complete(protocol),
            joules=self.joules if self.metered_s else None,
            metered_s=self.metered_s,
            other_cpu=None if shares is None else shares[0],
            stolen_cpu=None if shares is None else shares[1],
        )


def _warm_up(run_once: RunOnce, protocol: Protocol, clock: Clock) -> _State:
    state = _State(run_once)
    spent, check_at = 0, protocol.warmup_runs
    while spent < protocol.warmup_limit_s * 1e9:
        elapsed = state.query(clock)
        state.warmup.append(elapsed)
        spent += elapsed
        count = len(state.warmup)
        if count >= check_at and spent >= protocol.warmup_s * 1e9:
            state.settled = settled(state.warmup)
            if state.settled:
                break
            check_at = count + max(1, count // 10)
    return state


def settled(times: Sequence[int]) -> bool:
    """Return whether the medians of the last two windows differ by less than 2 %.

    A window is a quarter of the runs so far, at least 25; with too few runs for two windows it is half of them.
    """
    window = min(max(_WINDOW_RUNS, len(times) // 4), len(times) // 2)
    if window == 0:
        return False
    last, previous = (
        float(np.median(part)) for part in (times[-window:], times[-2 * window : -window])
    )
    return abs(last - previous) < SETTLED_WITHIN * previous


def summarise(parts: Sequence[LatencySamples]) -> dict[str, Any]:
    """Return the numbers of one model over all its processes.

    Percentiles are of all samples together; `first_ms` is the median over the processes; `cv` is the population
    standard deviation over the mean; `p99_ms` is None below the number of queries that supports it
    (`intervals.queries_to_claim`).
    """
    samples, blocks, process = joined(parts)
    p50, p90 = map(interval_of, percentile_draws(samples, blocks, process, (50, 90)).T)
    return {
        "p50_ms": percentile(samples, 50),
        "p50_ci95_ms": list(p50),
        "p90_ms": percentile(samples, 90),
        "p90_ci95_ms": list(p90),
        "p99_ms": percentile(samples, 99) if len(samples) >= queries_to_claim(99) else None,
        "mean_ms": float(samples.mean()),
        "cv": float(samples.std() / samples.mean()),
        "n": len(samples),
        "seconds": float(samples.sum() / 1e3),
        "first_ms": float(np.median([part.first_ms for part in parts])),
        "processes": len(parts),
        "p50_per_process_ms": [percentile(part.samples_ms, 50) for part in parts],
        "warmup_runs": [part.warmup_runs for part in parts],
        "settled": all(part.settled for part in parts),
        "complete": all(part.complete for part in parts),
        "other_cpu": _mean([part.other_cpu for part in parts]),
        "stolen_cpu": _mean([part.stolen_cpu for part in parts]),
    }


def joined(
    parts: Sequence[LatencySamples],
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Return samples of all processes `[n]` in ms, their blocks `[n]`, numbered anew, and processes `[n]`."""
    process = np.repeat(np.arange(len(parts)), [len(part.samples_ms) for part in parts])
    offsets = np.cumsum([0] + [int(part.blocks.max()) + 1 for part in parts])
    blocks = [
        part.blocks + offset
        for part, offset in zip(parts, offsets[:-1])  # noqa: B905  Python 3.9
    ]
    return np.concatenate([part.samples_ms for part in parts]), np.concatenate(blocks), process


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
