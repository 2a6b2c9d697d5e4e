"""What a reader of a report must not overlook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgekd.benchmark.measure.speed import fastest, in_words, speed_between
from edgekd.benchmark.measure.throttling import throttle_remarks
from edgekd.benchmark.rows import LatencyRow, Report


def remarks(report: Report) -> list[str]:
    """The fastest runtime, INT8 slower than FP32, an unsettled or short measurement, a busy machine."""
    said: list[str] = []
    precision = {
        (row.run, row.subject): row.precision for row in report.summary if row.kind == "artifact"
    }
    exported = [row for row in report.latency if (row.run, row.subject) in precision]
    said += _slower_int8(report, exported, precision)
    said += fastest(report)
    said += _excluded(report)
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


def _slower_int8(
    report: Report, exported: Sequence[LatencyRow], precision: Mapping[tuple[str, str], str]
) -> Iterator[str]:
    for slow in exported:
        for fast in exported:
            same = (slow.run, slow.provider, slow.device) == (fast.run, fast.provider, fast.device)
            kinds = precision[slow.run, slow.subject], precision[fast.run, fast.subject]
            if not same or kinds != ("int8", "fp32"):
                continue
            speed = speed_between(report, slow, fast)
            if speed is None or (speed.withheld is None and speed.ratio < 1):
                continue
            said = f"{slow.run}: {slow.subject} {in_words(speed, fast.subject)}"
            yield f"{said}." if speed.withheld else f"{said}: here INT8 saves space, not time."


def _excluded(report: Report) -> Iterator[str]:
    """Images that no suite has, since training has seen them."""
    count = {suite.suite: sum(suite.excluded.values()) for suite in report.suites if suite.excluded}
    if count:
        each = ", ".join(f"{name} {number:,}" for name, number in count.items())
        yield (
            f"{sum(count.values()):,} images are left out of the suites, since training or another suite has them: "
            f"{each}."
        )


def takes_floats(facts: Mapping[str, Any]) -> bool:
    """Whether an exported file, as the report's context has it, leaves normalisation to who feeds it."""
    return any(given["dtype"] == "float32" for given in facts.get("inputs", ()))
