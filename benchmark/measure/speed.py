"""Pairs of exported files of a report: the ratio of their p50 with its interval, or why it is withheld."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from edgekd.benchmark.results.rows import LatencyRow, SummaryRow
from edgekd.benchmark.results.schema import Report, SpeedRow
from edgekd.targets.timing.intervals import interval_of, percentile_draws
from edgekd.targets.timing.speed import reason_to_withhold
from edgekd.targets.timing.stopwatch import LatencySamples, joined


def speed_rows(
    summary: Sequence[SummaryRow],
    latency: Sequence[LatencyRow],
    parts: Mapping[tuple[str, str], Sequence[LatencySamples]],
    environment: Mapping[str, Any],
) -> tuple[SpeedRow, ...]:
    """Compare every pair of exported files of one run on one device.

    Args:
        parts: (run, subject) → the samples of each process.
    """
    exported = {(row.run, row.subject) for row in summary if row.kind == "artifact"}
    rows = [row for row in latency if (row.run, row.subject) in exported]
    draws = {
        (row.run, row.subject): percentile_draws(
            *joined(parts[row.run, row.subject]), (50,), seed=seed
        )[:, 0]
        for seed, row in enumerate(rows)
    }
    found = []
    for a, b in combinations(rows, 2):
        if (a.run, a.device) != (b.run, b.device):
            continue
        ci95 = interval_of(draws[a.run, a.subject] / draws[b.run, b.subject])
        found.append(
            SpeedRow(
                a_run=a.run,
                a=a.subject,
                b_run=b.run,
                b=b.subject,
                device=a.device,
                ratio=a.p50_ms / b.p50_ms,
                ci95=ci95,
                withheld=reason_to_withhold(
                    (a.timing, b.timing), ci95, load_of(environment, a.device)
                ),
            )
        )
    return tuple(found)


def load_of(environment: Mapping[str, Any], device: str) -> float | None:
    """Return the load average per core before the run, of this machine or of a device; None where it is unknown."""
    devices = {one["device"]: one for one in environment.get("devices", ())}
    facts = devices.get(device, environment)
    load, cores = facts["before"].get("load_average"), facts.get("usable_cores")
    return None if load is None or not cores else float(load) / float(cores)


def speed_between(report: Report, first: LatencyRow, second: LatencyRow) -> SpeedRow | None:
    """Return the report's pair of these two files, `first` as A; None where it has none."""
    wanted = (first.run, first.subject), (second.run, second.subject)
    for row in report.speed:
        pair = (row.a_run, row.a), (row.b_run, row.b)
        if pair == wanted:
            return row
        if pair[::-1] == wanted:
            return row.swapped
    return None
