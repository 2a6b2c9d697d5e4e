"""What a reader of a report must not overlook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgekd.benchmark.findings import HERE
from edgekd.benchmark.rows import LatencyRow, Report
from edgekd.benchmark.throttling import throttle_remarks


def remarks(report: Report) -> list[str]:
    """The fastest runtime, INT8 slower than FP32, an unsettled or short measurement, a busy machine."""
    said = []
    precision = {
        (row.run, row.subject): row.precision for row in report.summary if row.kind == "artifact"
    }
    exported = [row for row in report.latency if (row.run, row.subject) in precision]
    for slow in exported:
        for fast in exported:
            same = (slow.run, slow.provider, slow.device) == (fast.run, fast.provider, fast.device)
            kinds = precision[slow.run, slow.subject], precision[fast.run, fast.subject]
            if same and kinds == ("int8", "fp32") and slow.p50_ms > fast.p50_ms:
                overlap = slow.p50_ci95_ms[0] <= fast.p50_ci95_ms[1]
                word = "no faster" if overlap else "slower"
                said.append(
                    f"{slow.run}: {slow.subject} is {word} than {fast.subject} here (p50 "
                    f"{slow.p50_ms:.2f} against {fast.p50_ms:.2f} ms{', intervals overlap' if overlap else ''}): on "
                    "this processor INT8 saves space, not time."
                )
    said += _fastest(exported)
    for row in exported:
        if not row.settled:
            said.append(
                f"{row.run}: {row.subject} had not settled when its warm-up ended; its latency may drift."
            )
        if not row.complete:
            said.append(
                f"{row.run}: {row.subject} was stopped at its time limit with {row.n} runs, fewer than the rule."
            )
    for one in report.context.get("artifacts", ()):
        if takes_floats(one):
            said.append(
                f"{one['run']}: {one['name']} takes floats; its latencies include making them from the image, in numpy."
            )
    said += throttle_remarks(report.environment)
    load, cores = report.environment["before"]["load_average"], report.environment["usable_cores"]
    if load is not None and load > 0.5 * cores:
        said.append(
            f"Load average {load:.2f} on {cores} cores before measuring: latencies may include other work."
        )
    return said


def _fastest(rows: Sequence[LatencyRow]) -> list[str]:
    """For each run and device with files of several runtimes: which is the fastest there, and which may be."""
    said = []
    for run, device in dict.fromkeys((row.run, row.device) for row in rows):
        own = sorted(
            (row for row in rows if (row.run, row.device) == (run, device)),
            key=lambda row: row.p50_ms,
        )
        if len({row.provider for row in own}) < 2:
            continue
        first = own[0]
        level = [row.subject for row in own[1:] if row.p50_ci95_ms[0] <= first.p50_ci95_ms[1]]
        other = next(row for row in own if row.provider != first.provider)
        where = "here" if device == HERE else f"on {device}"
        beside = f", intervals overlap with {', '.join(level)}" if level else ""
        times, p50 = other.p50_ms / first.p50_ms, f"{first.p50_ms:.2f} ms"
        said.append(
            f"{run}: the fastest file {where} is {first.subject} ({first.provider}; p50 {p50}{beside}); "
            f"the best of another runtime is {other.subject}, {times:.2f} times as long."
        )
    return said


def takes_floats(facts: Mapping[str, Any]) -> bool:
    """Whether an exported file, as the report's context has it, leaves normalisation to who feeds it."""
    return any(given["dtype"] == "float32" for given in facts.get("inputs", ()))
