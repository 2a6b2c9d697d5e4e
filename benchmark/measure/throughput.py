"""Images per second at batch sizes and thread counts, each combination in a fresh process; apart from the latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgekd.benchmark.measure.intervals import rate_interval
from edgekd.benchmark.measure.latency import LatencySamples, Protocol
from edgekd.benchmark.measure.local import measure_rate
from edgekd.benchmark.report.timings import ThroughputRow
from edgekd.benchmark.subjects import Subject
from edgekd.core.console import say
from edgekd.targets.devices.result import Rate

FULL = Protocol("throughput", 50, 3.0, 30.0, 10, 10.0, 60.0, 1.0, 1)
QUICK = Protocol("throughput, quick", 50, 1.0, 5.0, 5, 2.0, 10.0, 0.2, 1)
"""Warm-up as for latency; the measurement is shorter, since every combination needs one."""


@dataclass(frozen=True)
class Grid:
    """Every batch size with every thread count; a thread count of None is the runtime's choice."""

    batch_sizes: tuple[int, ...]
    thread_counts: tuple[int | None, ...]

    @property
    def pairs(self) -> tuple[tuple[int, int | None], ...]:
        """(batch size, threads), batch by batch."""
        return tuple(
            (batch, threads) for batch in self.batch_sizes for threads in self.thread_counts
        )


def throughput_rows(
    subjects: Sequence[Subject], encoded: Sequence[bytes], grid: Grid | None, *, quick: bool
) -> tuple[ThroughputRow, ...]:
    """A row for each artifact, batch size and thread count.

    Args:
        subjects: those with a folder are measured here, those that a device measured bring their rates.
        grid: what to take here; None takes nothing here.
        encoded: images as they lie in files, in rotation; a batch larger than their number repeats them.

    Raises:
        EdgekdError: an artifact that does not run one image at a time.
    """
    protocol = QUICK if quick else FULL
    rows = []
    for subject in subjects:
        rates: list[Rate] = []
        if subject.measured is not None:
            rates = list(subject.measured.rates)
        elif subject.folder is not None and grid is not None:
            for batch, threads in grid.pairs:
                how = threads or "as the runtime chooses"
                say(f"throughput of {subject.name}: batch {batch}, threads {how}")
                rates.append(measure_rate(subject.folder, encoded, protocol, batch, threads))
        rows += [_row(subject, rate) for rate in rates]
    return tuple(rows)


def _row(subject: Subject, rate: Rate) -> ThroughputRow:
    who: dict[str, Any] = {
        "run": subject.run,
        "subject": subject.name,
        "device": subject.device,
        "batch": rate.batch,
    }
    if rate.clock is None:
        return ThroughputRow(**who, threads=rate.threads, reason=rate.reason)
    return ThroughputRow(**who, **_numbers(rate.clock.samples, rate.clock.threads, rate.batch))


def _numbers(samples: LatencySamples, threads: int, batch: int) -> dict[str, Any]:
    return {
        "threads": threads,
        "images_per_s": batch * len(samples.samples_ms) / (float(samples.samples_ms.sum()) / 1e3),
        "images_per_s_ci95": rate_interval(samples.samples_ms, samples.blocks, batch),
        "calls": len(samples.samples_ms),
        "settled": samples.settled,
    }
