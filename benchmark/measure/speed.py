"""How fast one exported file is beside another: the ratio of their medians, its interval, and whether it may be stated.

Every statement of the form "N times as fast" comes from here, whoever prints it. It is withheld, with the reason, where
the samples had not settled, scatter widely, were taken on a busy machine, or where the interval includes 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any
from typing import Protocol as Structure

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.measure.intervals import (
    Interval,
    interval_of,
    percentile,
    percentile_draws,
    ratio_interval,
)
from edgekd.benchmark.measure.latency import (
    LatencySamples,
    Protocol,
    joined,
    measure_interleaved,
    rotating,
)
from edgekd.benchmark.report.rows import HERE
from edgekd.benchmark.report.schema import Comparison, SpeedRow

if TYPE_CHECKING:
    from edgekd.benchmark.report.rows import SummaryRow
    from edgekd.benchmark.report.schema import Report
    from edgekd.benchmark.report.timings import LatencyRow

WIDE_CV = 0.3
"""Above this share of the mean a single percentile says little: the machine was busy, or has several states."""
BUSY = 0.2
"""Share of all cores' time that other processes may take while the clock runs."""
STOLEN = 0.05
"""Share of all cores' time that the hypervisor may give to other machines."""
LOADED = 0.5
"""Load average per core before the run from which on a machine counts as busy, where it tells nothing finer."""


class Timed(Structure):
    """What decides whether a latency is good enough for a claim; a `LatencyRow`, or a short measurement."""

    @property
    def subject(self) -> str: ...
    @property
    def settled(self) -> bool: ...
    @property
    def cv(self) -> float: ...
    @property
    def other_cpu(self) -> float | None: ...
    @property
    def stolen_cpu(self) -> float | None: ...


def speed_rows(
    summary: Sequence[SummaryRow],
    latency: Sequence[LatencyRow],
    parts: Mapping[tuple[str, str], Sequence[LatencySamples]],
    environment: Mapping[str, Any],
) -> tuple[SpeedRow, ...]:
    """Every pair of exported files of one run on one device.

    Args:
        parts: (run, subject) → the samples of each process.
    """
    exported = {(row.run, row.subject) for row in summary if row.kind == "artifact"}
    rows = [row for row in latency if (row.run, row.subject) in exported]
    draws = {
        (row.run, row.subject): median_draws(parts[row.run, row.subject], seed)
        for seed, row in enumerate(rows)
    }
    return tuple(
        speed_row(
            first,
            second,
            interval_of(draws[first.run, first.subject] / draws[second.run, second.subject]),
            load_of(environment, first.device),
        )
        for first, second in combinations(rows, 2)
        if (first.run, first.device) == (second.run, second.device)
    )


def median_draws(parts: Sequence[LatencySamples], seed: int) -> NDArray[np.float64]:
    """Bootstrap draws `[R]` of the p50 over all processes, in ms; see `stats.percentile_draws`."""
    return percentile_draws(*joined(parts), (50,), seed=seed)[:, 0]


def speed_row(
    first: LatencyRow, second: LatencyRow, ci95: Interval, load: float | None = None
) -> SpeedRow:
    """The ratio of the p50 of `first` to that of `second`, and why it may not be stated, if it may not.

    Args:
        ci95: 95 % interval of the ratio.
        load: load average per core of their machine before the run; None where unknown.
    """
    return SpeedRow(
        a_run=first.run,
        a=first.subject,
        b_run=second.run,
        b=second.subject,
        device=first.device,
        ratio=first.p50_ms / second.p50_ms,
        ci95=ci95,
        withheld=reason_to_withhold((first, second), ci95, load),
    )


def reason_to_withhold(
    rows: Sequence[Timed], ci95: Interval, load: float | None = None
) -> str | None:
    """Why a ratio of latencies must not be stated as a speed; None where it may.

    Args:
        rows: the latencies that it compares.
        ci95: 95 % interval of the ratio.
        load: load average per core of their machine before the run; None where unknown.
    """
    for row in rows:
        if not row.settled:
            return f"{row.subject} had not settled when its warm-up ended"
    for row in rows:
        if row.cv > WIDE_CV:
            return f"the latencies of {row.subject} scatter (CV {row.cv:.2f})"
    for row in rows:
        shares = ((row.stolen_cpu, STOLEN, "the hypervisor"), (row.other_cpu, BUSY, "other work"))
        for share, most, who in shares:
            if share is not None and share > most:
                taken = f"{100 * share:.0f} % of the processor's time"
                return f"{who} took {taken} while {row.subject} was timed"
    if load is not None and load > LOADED and any(row.other_cpu is None for row in rows):
        return f"the machine was busy (load average {load:.1f} per core before the run)"
    if ci95[0] <= 1 <= ci95[1]:
        return f"the 95 % interval of the ratio, {ci95[0]:.2f}–{ci95[1]:.2f}, includes 1"
    return None


def load_of(environment: Mapping[str, Any], device: str) -> float | None:
    """Load average per core before the run, of this machine or of a device; None where it is unknown."""
    devices = {one["device"]: one for one in environment.get("devices", ())}
    facts = devices.get(device, environment)
    load, cores = facts["before"].get("load_average"), facts.get("usable_cores")
    return None if load is None or not cores else float(load) / float(cores)


def speed_between(report: Report, first: LatencyRow, second: LatencyRow) -> SpeedRow | None:
    """The report's pair of these two files, `first` as A; None where it has none."""
    wanted = (first.run, first.subject), (second.run, second.subject)
    for row in report.speed:
        if ((row.a_run, row.a), (row.b_run, row.b)) == wanted:
            return row
        if ((row.b_run, row.b), (row.a_run, row.a)) == wanted:
            return turned(row)
    return None


def turned(row: SpeedRow) -> SpeedRow:
    """The same pair with A and B exchanged."""
    low, high = row.ci95
    return row.model_copy(
        update={
            "a_run": row.b_run, "a": row.b, "b_run": row.a_run, "b": row.a, "ratio": 1 / row.ratio,
            "ci95": (1 / high, 1 / low),
        }
    )  # fmt: skip


def in_words(row: SpeedRow | None, other: str) -> str:
    """Return A's speed beside B's as a predicate, B called `other`: `is 1.85 times as fast as B (95 % CI 1.80–1.90)`.

    Where the claim is withheld the predicate says why.
    """
    if row is None:
        return f"has no interval of its speed against {other}, so none is stated"
    if row.withheld is not None:
        return f"is called neither faster nor slower than {other}: {row.withheld}"
    low, high = row.ci95
    if row.ratio < 1:
        return f"is {1 / row.ratio:.2f} times as fast as {other} (95 % CI {1 / high:.2f}–{1 / low:.2f})"
    return f"takes {row.ratio:.2f} times as long as {other} (95 % CI {low:.2f}–{high:.2f})"


def ratio_text(pair: Comparison) -> str:
    """The latency ratio of a comparison with its interval, or why it is withheld."""
    if pair.withheld is not None:
        return f"withheld, since {pair.withheld}"
    low, high = pair.p50_ratio_ci95
    return f"{pair.p50_ratio:.3f} [{low:.3f}, {high:.3f}]"


def fastest(report: Report) -> Iterator[str]:
    """For each run and device with files of several runtimes: which is the fastest, and what the next runtime takes."""
    exported = {(row.run, row.subject) for row in report.summary if row.kind == "artifact"}
    rows = [row for row in report.latency if (row.run, row.subject) in exported]
    for run, device in dict.fromkeys((row.run, row.device) for row in rows):
        own = sorted(
            (row for row in rows if (row.run, row.device) == (run, device)),
            key=lambda row: row.p50_ms,
        )
        if len({row.provider for row in own}) < 2:
            continue
        first = own[0]
        other = next(row for row in own if row.provider != first.provider)
        where = "here" if device == HERE else f"on {device}"
        speed = speed_between(report, other, first)
        if speed is None or speed.withheld is not None:
            reason = "it was not measured" if speed is None else speed.withheld
            yield f"{run}: no runtime is named the fastest {where}: {reason}."
            continue
        level = [
            row.subject
            for row in own[1:]
            if (pair := speed_between(report, row, first)) is not None and pair.withheld is not None
        ]
        beside = f", not told apart from {', '.join(level)}" if level else ""
        yield (
            f"{run}: the fastest file {where} is {first.subject} ({first.provider}; p50 "
            f"{first.p50_ms:.2f} ms{beside}); {other.subject}, the best of another runtime, {in_words(speed, 'it')}."
        )


NOTE = Protocol("note", 20, 0.3, 2.0, 40, 1.0, 4.0, 0.05, 1)
"""A few seconds for one sentence."""


@dataclass(frozen=True)
class _Timed:
    subject: str
    settled: bool
    cv: float
    other_cpu: float | None
    stolen_cpu: float | None


def timed_in_turns(
    models: Mapping[str, Callable[[NDArray[np.uint8]], object]], images: NDArray[np.uint8]
) -> dict[str, LatencySamples]:
    """Time models in alternating blocks of this process, for a few seconds.

    Args:
        models: name → a model of uint8 `[1, H, W, 3]`.
        images: uint8 `[N, H, W, 3]`, in rotation.
    """
    return measure_interleaved(
        {name: rotating(model, images) for name, model in models.items()}, NOTE
    )


def speed_of(a: str, b: str, found: Mapping[str, LatencySamples]) -> SpeedRow:
    """The ratio of model `a` to model `b`, which were timed in turns."""
    turns, p50 = turns_of([found[a]], [found[b]])
    ci95 = ratio_interval(*turns)
    timed = [
        _Timed(
            name,
            one.settled,
            float(one.samples_ms.std() / one.samples_ms.mean()),
            one.other_cpu,
            one.stolen_cpu,
        )
        for name in (a, b)
        for one in [found[name]]
    ]
    return SpeedRow(
        a_run="",
        a=a,
        b_run="",
        b=b,
        ratio=p50[0] / p50[1],
        ci95=ci95,
        withheld=reason_to_withhold(timed, ci95),
    )


Turns = tuple[list[NDArray[np.float64]], list[NDArray[np.float64]], NDArray[np.int64]]


def turns_of(
    first: Sequence[LatencySamples], second: Sequence[LatencySamples]
) -> tuple[Turns, tuple[float, float]]:
    """Samples of A and of B in each turn, the process of each turn, and both medians over these turns.

    A model that is done earlier leaves the other to go on alone; what it measures then has no partner and is not used.
    """
    a: list[NDArray[np.float64]] = []
    b: list[NDArray[np.float64]] = []
    process_of: list[int] = []
    for process, (one, other) in enumerate(zip(first, second, strict=True)):
        mine, theirs = _by_block(one), _by_block(other)
        count = min(len(mine), len(theirs))
        a += mine[:count]
        b += theirs[:count]
        process_of += [process] * count
    p50 = percentile(np.concatenate(a), 50), percentile(np.concatenate(b), 50)
    return (a, b, np.asarray(process_of, dtype=np.int64)), p50


def _by_block(samples: LatencySamples) -> list[NDArray[np.float64]]:
    starts = np.flatnonzero(np.diff(samples.blocks)) + 1
    return np.split(samples.samples_ms, starts)
