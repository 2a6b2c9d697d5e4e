"""Notes on a report: what must not be overlooked about its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgekd.benchmark.measure.speed import fastest, in_words, speed_between
from edgekd.benchmark.measure.throttling import throttle_remarks
from edgekd.benchmark.report.schema import Report
from edgekd.benchmark.report.timings import LatencyRow


def notes(report: Report) -> list[str]:
    """Return the fastest runtime, INT8 slower than FP32, excluded images, unsettled measurements, a busy machine."""
    precision = {row.who: row.precision for row in report.exported}
    exported = [row for row in report.latency if row.who in precision]
    found = [*_slower_int8(report, exported, precision), *fastest(report), *_excluded(report)]
    for row in exported:
        if not row.settled:
            found.append(
                f"{row.run}: {row.subject} had not settled when its warm-up ended; its latency may drift."
            )
        if not row.complete:
            found.append(
                f"{row.run}: {row.subject} was stopped at its time limit with {row.n} runs, fewer than the rule."
            )
    found += [
        f"{one['run']}: {one['name']} takes floats; its latencies include making them from the image, in numpy."
        for one in report.context.get("artifacts", ())
        if takes_floats(one)
    ]
    found += throttle_remarks(report.environment)
    load, cores = report.environment["before"]["load_average"], report.environment["usable_cores"]
    if load is not None and load > 0.5 * cores:
        found.append(
            f"Load average {load:.2f} on {cores} cores before measuring: latencies may include other work."
        )
    return found


def _slower_int8(
    report: Report, exported: Sequence[LatencyRow], precision: Mapping[tuple[str, str], str]
) -> Iterator[str]:
    for slow in exported:
        for fast in exported:
            same = (slow.run, slow.provider, slow.device) == (fast.run, fast.provider, fast.device)
            kinds = precision[slow.who], precision[fast.who]
            if not same or kinds != ("int8", "fp32"):
                continue
            speed = speed_between(report, slow, fast)
            if speed is None or (speed.withheld is None and speed.ratio < 1):
                continue
            claim = f"{slow.run}: {slow.subject} {in_words(speed, fast.subject)}"
            yield f"{claim}." if speed.withheld else f"{claim}: here INT8 saves space, not time."


def _excluded(report: Report) -> Iterator[str]:
    """Yield how many images the suites leave out because training has seen them."""
    count = {suite.suite: sum(suite.excluded.values()) for suite in report.suites if suite.excluded}
    if count:
        each = ", ".join(f"{name} {number:,}" for name, number in count.items())
        yield (
            f"{sum(count.values()):,} images are left out of the suites, since training or another suite has them: "
            f"{each}."
        )


def takes_floats(facts: Mapping[str, Any]) -> bool:
    """Return whether an exported file, as the report's context describes it, leaves normalisation to the caller."""
    return any(given["dtype"] == "float32" for given in facts.get("inputs", ()))
