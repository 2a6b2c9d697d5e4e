"""Notes on a report: what must not be overlooked about its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from edgekd.benchmark.measure.speed import load_of, speed_between
from edgekd.benchmark.results.metric import ms
from edgekd.benchmark.results.rows import HERE
from edgekd.benchmark.results.schema import Report
from edgekd.targets.feed import resizes
from edgekd.targets.timing.speed import LOADED, in_words

THROTTLE_FLAGS = {
    0: "under-voltage",
    1: "a capped frequency",
    2: "throttling",
    3: "the soft temperature limit",
}
"""Bits of `vcgencmd get_throttled` for now; the same 16 higher: since the system's start (Raspberry Pi's manual)."""
_SINCE_START = 16


def notes(report: Report) -> list[str]:
    """Return the fastest runtime, INT8 slower than FP32, excluded images, unsettled measurements, a busy machine."""
    found = [*_slower_int8(report), *fastest(report), *_excluded(report)]
    for row in report.exported_latency:
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
    found += [
        f"{one['run']}: {one['name']} resizes inside; its latencies are those of pictures of the student's size, and "
        "resizing a larger one comes on top."
        for one in report.context.get("artifacts", ())
        if any(map(resizes, one.get("inputs", ())))
    ]
    found += throttle_notes(report.environment)
    load = load_of(report.environment, HERE)
    if load is not None and load > LOADED:
        before, cores = report.environment["before"], report.environment["usable_cores"]
        found.append(
            f"Load average {before['load_average']:.2f} on {cores} cores before measuring: latencies may include "
            "other work."
        )
    return found


def _slower_int8(report: Report) -> Iterator[str]:
    precision = {row.who: row.precision for row in report.exported}
    for slow, fast in product(report.exported_latency, repeat=2):
        same = (slow.run, slow.provider, slow.device) == (fast.run, fast.provider, fast.device)
        if not same or (precision[slow.who], precision[fast.who]) != ("int8", "fp32"):
            continue
        speed = speed_between(report, slow, fast)
        if speed is not None and (speed.withheld or speed.ratio >= 1):
            claim = f"{slow.run}: {slow.subject} {in_words(speed.claim, fast.subject)}"
            yield f"{claim}." if speed.withheld else f"{claim}: here INT8 saves space, not time."


def fastest(report: Report) -> Iterator[str]:
    """Yield for each run and device with files of several runtimes the fastest, and the best of the next runtime."""
    rows = sorted(report.exported_latency, key=lambda row: row.p50_ms)
    places = dict.fromkeys((row.run, row.device) for row in report.exported_latency)
    for run, device in places:
        first, *others = (row for row in rows if (row.run, row.device) == (run, device))
        other = next((row for row in others if row.provider != first.provider), None)
        if other is None:
            continue
        where = "here" if device == HERE else f"on {device}"
        speed = speed_between(report, other, first)
        if speed is None or speed.withheld is not None:
            reason = "it was not measured" if speed is None else speed.withheld
            yield f"{run}: no runtime is named the fastest {where}: {reason}."
            continue
        pairs = ((row.subject, speed_between(report, row, first)) for row in others)
        level = [name for name, pair in pairs if pair is not None and pair.withheld is not None]
        beside = f", not told apart from {', '.join(level)}" if level else ""
        yield (
            f"{run}: the fastest file {where} is {first.subject} ({first.provider}; p50 {ms(first.p50_ms)} "
            f"ms{beside}); {other.subject}, the best of another runtime, {in_words(speed.claim, 'it')}."
        )


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


def throttle_notes(environment: Mapping[str, Any]) -> Iterator[str]:
    """Yield what slowed this machine or a device, or changed its power mode, between `before` and `after`."""
    yield from _throttled("The processor", environment)
    for facts in environment.get("devices", ()):
        yield from _throttled(f"Device {facts['device']}", facts)


def _throttled(who: str, facts: Mapping[str, Any]) -> Iterator[str]:
    before, after = facts["before"], facts["after"]

    def both(key: str) -> tuple[Any, Any] | None:
        pair = before.get(key), after.get(key)  # results of older agents lack them
        return None if None in pair else pair

    def heat(state: Mapping[str, Any]) -> str:
        return "unknown" if state["temperature_c"] is None else f"{state['temperature_c']:g} °C"

    if (counts := both("throttle_count")) and counts[1] > counts[0]:
        yield (
            f"{who} throttled {counts[1] - counts[0]} times while measuring (temperature {heat(before)} before, "
            f"{heat(after)} after): latencies are those of a hot machine."
        )
    if flags := both("throttle_flags"):
        first, last = (int(value, 16) for value in flags)
        raised = first | last | (last & ~first) >> _SINCE_START
        names = [name for bit, name in THROTTLE_FLAGS.items() if raised >> bit & 1]
        if names:
            yield f"{who} reports {', '.join(names)} while measuring: latencies are not those of its full speed."
    if (modes := both("power_mode")) and modes[0] != modes[1]:
        yield f"{who} went from power mode {modes[0]} to {modes[1]} while measuring."
