"""Notes on a report: what must not be overlooked about its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgekd.benchmark.report.rows import HERE, LatencyRow
from edgekd.benchmark.report.schema import Report
from edgekd.benchmark.throttling import throttle_remarks


def notes(report: Report) -> list[str]:
    """Return the fastest runtime, INT8 slower than FP32, unsettled or short measurements, a busy machine."""
    precision = {row.who: row.precision for row in report.exported}
    exported = [row for row in report.latency if row.who in precision]
    found = [*_slower_int8(exported, precision), *fastest(exported)]
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
    rows: Sequence[LatencyRow], precision: Mapping[tuple[str, str], str]
) -> Iterator[str]:
    for slow in rows:
        for fast in rows:
            same = (slow.run, slow.provider, slow.device) == (fast.run, fast.provider, fast.device)
            kinds = precision[slow.who], precision[fast.who]
            if same and kinds == ("int8", "fp32") and slow.p50_ms > fast.p50_ms:
                overlap = slow.p50_ci95_ms[0] <= fast.p50_ci95_ms[1]
                yield (
                    f"{slow.run}: {slow.subject} is {'no faster' if overlap else 'slower'} than {fast.subject} here "
                    "(p50 "
                    f"{slow.p50_ms:.2f} against {fast.p50_ms:.2f} ms{', intervals overlap' if overlap else ''}): on "
                    "this processor INT8 saves space, not time."
                )


def fastest(rows: Sequence[LatencyRow]) -> Iterator[str]:
    """Yield the fastest file of each run and device that has files of several runtimes."""
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
        overlap = f", intervals overlap with {', '.join(level)}" if level else ""
        yield (
            f"{run}: the fastest file {where} is {first.subject} ({first.provider}; p50 {first.p50_ms:.2f} "
            f"ms{overlap}); "
            f"the best of another runtime is {other.subject}, {other.p50_ms / first.p50_ms:.2f} times as long."
        )


def takes_floats(facts: Mapping[str, Any]) -> bool:
    """Return whether an exported file, as the report's context describes it, leaves normalisation to the caller."""
    return any(given["dtype"] == "float32" for given in facts.get("inputs", ()))
