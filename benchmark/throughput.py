"""Images per second at batch sizes and thread counts, each combination in a fresh process; apart from the latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.accuracy import Subject
from edgekd.benchmark.latency import LatencySamples, Protocol
from edgekd.benchmark.measured import Measured
from edgekd.benchmark.report.timings import ThroughputRow
from edgekd.benchmark.stats import rate_interval
from edgekd.benchmark.worker import run_child
from edgekd.console import say
from edgekd.errors import EdgekdError

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
    subjects: Sequence[Subject],
    buffers: Mapping[str, NDArray[np.uint8]],
    grid: Grid | None,
    *,
    quick: bool,
) -> tuple[ThroughputRow, ...]:
    """A row for each artifact, batch size and thread count.

    Args:
        subjects: those with a folder are measured here, those that a device measured bring their rates.
        grid: what to take here; None takes nothing here.
        buffers: preprocess hash → uint8 `[N, H, W, 3]`, images in rotation; a batch larger than N repeats them.

    Raises:
        EdgekdError: an artifact that does not run one image at a time.
    """
    rows: list[ThroughputRow] = []
    for subject in subjects:
        if subject.measured is not None:
            rows += _measured_rows(subject, subject.measured)
        elif subject.folder is not None and grid is not None:
            images, protocol = buffers[subject.preprocess.hash], QUICK if quick else FULL
            rows += [
                _row(subject, images, batch, threads, protocol) for batch, threads in grid.pairs
            ]
    return tuple(rows)


def _measured_rows(subject: Subject, measured: Measured) -> list[ThroughputRow]:
    rows = []
    for rate in measured.rates:
        who: dict[str, Any] = {
            "run": subject.run,
            "subject": subject.name,
            "device": subject.device,
            "batch": rate.batch,
        }
        if rate.clock is None:
            rows.append(ThroughputRow(**who, threads=rate.threads, reason=rate.reason))
        else:
            rows.append(
                ThroughputRow(**who, **_numbers(rate.clock.samples, rate.clock.threads, rate.batch))
            )
    return rows


def _row(
    subject: Subject,
    buffers: NDArray[np.uint8],
    batch: int,
    threads: int | None,
    protocol: Protocol,
) -> ThroughputRow:
    assert subject.folder is not None
    say(
        f"throughput of {subject.name}: batch {batch}, threads {threads or 'as the runtime chooses'}"
    )
    who: dict[str, Any] = {
        "run": subject.run,
        "subject": subject.name,
        "device": subject.device,
        "batch": batch,
    }
    try:
        found = run_child({"": subject.folder}, {"": buffers}, protocol, threads, batch=batch)[""]
    except EdgekdError as refusal:
        if batch == 1:
            raise
        # A file may be made for fewer images at a time, or the memory too small for so many.
        return ThroughputRow(**who, threads=threads, reason=refusal.message)
    return ThroughputRow(**who, **_numbers(found.samples, found.threads, batch))


def _numbers(samples: LatencySamples, threads: int, batch: int) -> dict[str, Any]:
    return {
        "threads": threads,
        "images_per_s": batch * len(samples.samples_ms) / (float(samples.samples_ms.sum()) / 1e3),
        "images_per_s_ci95": rate_interval(samples.samples_ms, samples.blocks, batch),
        "calls": len(samples.samples_ms),
        "settled": samples.settled,
    }
