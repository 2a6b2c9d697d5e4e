"""The latency, throughput, energy and placement rows of a report, and the definition of every number in them."""

from __future__ import annotations

from typing import Annotated

from pydantic import AliasChoices, Field

from edgekd.benchmark.report.metric import Metric
from edgekd.benchmark.report.rows import (
    HERE,
    HIGHER,
    LOWER,
    Count,
    Fraction,
    Frozen,
    Interval,
    Row,
    Time,
)


class EnergyRow(Frozen):
    """Energy of the measured latency blocks of one file, from a declared sensor."""

    joules_per_image: Annotated[float, Metric("energy per image", "mJ", LOWER, gate=False)]
    """Energy of all that the sensor covers, idle power included, divided by the images: counters by their
    difference, power by the trapezoidal rule over both ends of each block."""
    joules_per_image_above_idle: Annotated[
        float | None,
        Metric("above idle", "mJ", LOWER, missing="idle power is not known", gate=False),
    ]
    """Less idle power, taken before any model was loaded, times the same time."""
    mean_w: Annotated[float, Metric("mean power", "W", gate=False)]
    idle_w: Annotated[float | None, Metric("idle power", "W", gate=False)]
    seconds: Annotated[Time, Metric("measured", "s")]
    sensor: str
    covers: str
    """What the energy belongs to: the processor, a board, a rail, the whole device."""


class LatencyRow(Row):
    """One subject's time for one image. Single stream, batch 1, real images in rotation."""

    provider: str
    threads: int | None
    protocol: str
    quick: bool
    batch: int
    buffers: Count
    p50_ms: Annotated[Time, Metric("p50", "ms", LOWER, interval="p50_ci95_ms")]
    """Median by nearest rank over all samples of all processes: a real sample, none is left out; interval:
    bootstrap, 1,000 draws of blocks of consecutive samples, of processes first where there are several."""
    p50_ci95_ms: Interval
    p90_ms: Annotated[Time, Metric("p90", "ms", LOWER)]
    """90th percentile, as p50."""
    p90_ci95_ms: Interval
    p99_ms: Annotated[
        Time | None,
        Metric(
            "p99",
            "ms",
            LOWER,
            source="MLPerf inference rules",
            missing="too few samples to state it",
        ),
    ]
    """99th percentile, stated from 270,336 samples on."""
    mean_ms: Annotated[Time, Metric("mean", "ms", LOWER)]
    """Mean of all samples."""
    cv: Annotated[Time, Metric("CV", better=LOWER)]
    """Coefficient of variation: population standard deviation / mean."""
    n: Annotated[Count, Metric("runs", "count")]
    seconds: Annotated[Time, Metric("measured", "s")]
    first_ms: Annotated[Time | None, Metric("first", "ms", LOWER)]
    """First call in a fresh process, median over processes."""
    load_ms: Annotated[Time | None, Metric("load", "ms", LOWER)]
    """Opening the file, median over processes."""
    prepare_p50_ms: Annotated[Time, Metric("read + resize", "ms", LOWER)]
    """Median time to read, decode and resize one image, outside the clock."""
    end_to_end_p50_ms: Annotated[Time | None, Metric("end-to-end p50", "ms", LOWER)] = None
    """One clock around decoding, resizing and the model, from an encoded image in memory, in a process of its
    own."""
    end_to_end_p90_ms: Annotated[Time | None, Metric("end-to-end p90", "ms", LOWER)] = None
    """90th percentile of the same."""
    peak_rss_mb: Annotated[Time | None, Metric("peak memory", "MB", LOWER)] = None
    """Largest resident memory of the process that measured end to end, interpreter and libraries included."""
    processes: Annotated[int, Metric("processes", "count")]
    p50_per_process_ms: tuple[float, ...]
    warmup_runs: tuple[int, ...]
    settled: bool
    """Whether the last two windows of the warm-up agreed within 2 %."""
    complete: bool
    """Whether the protocol's number of runs was reached before its time limit."""
    energy: EnergyRow | None = None
    other_cpu: Annotated[Fraction | None, Metric("other work", "%", LOWER, gate=False)] = None
    """Share of all cores' time that other processes took while the clock ran."""
    stolen_cpu: Annotated[Fraction | None, Metric("stolen", "%", LOWER, gate=False)] = None
    """Share of all cores' time that a hypervisor gave to other machines."""
    device: str = HERE


class ThroughputRow(Row):
    """Images per second of one file at one batch size and thread count; numbers are null where it refused."""

    batch: int
    threads: int | None
    images_per_s: Annotated[
        Time | None, Metric("images/s", "1/s", HIGHER, interval="images_per_s_ci95", gate=False)
    ] = None
    """Images of whole batches, one batch after the other in a fresh process, per second inside the clock; interval:
    bootstrap of blocks; not a latency."""
    images_per_s_ci95: Interval | None = None
    calls: Annotated[Count, Metric("calls", "count")] = 0
    settled: bool | None = None
    reason: str | None = None
    """Why there is no number."""
    device: str = HERE


class PlacementRow(Row):
    """The provider that ran each node of one file. A file of which a part ran elsewhere gets no report."""

    provider: str = Field(validation_alias=AliasChoices("provider", "asked"))
    """Provider or device requested for the whole file."""
    nodes: dict[str, dict[str, int]] | None
    """Provider → kind of operator → nodes; null where the runtime does not report it."""
    source: str = Field(validation_alias=AliasChoices("source", "told_by"))
    """Where the placement comes from, or why there is none."""
    device: str
