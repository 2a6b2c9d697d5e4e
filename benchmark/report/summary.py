"""The text of a report: the summary at the top, and the notes on limitations of the measurements.

A difference is only claimed if its 95 % interval excludes zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, Literal

from edgekd.benchmark.report.elements import Text
from edgekd.benchmark.report.recommend import accuracy, file_name, recommend, ship
from edgekd.benchmark.results.metric import ms, points
from edgekd.benchmark.results.rows import HERE, Difference, SummaryRow
from edgekd.benchmark.results.schema import Report, load_of
from edgekd.core.machine import in_cores
from edgekd.targets.feed import resizes
from edgekd.targets.timing.speed import LOADED, in_words, reason_to_withhold

_PLACES = {"adapted": "on the adapted domains", "ood": "out of domain", "id": "in domain"}
"""Kind of images on which a gain was measured → text, in the order of the list of gains."""
_THROTTLE_FLAGS = (
    "under-voltage",
    "a capped frequency",
    "throttling",
    "the soft temperature limit",
)
"""Bits 0–3 of `vcgencmd get_throttled`: the present state. Bits 16–19: since boot (Raspberry Pi's manual)."""


def answers(report: Report) -> list[Text]:
    """Return one summary text per topic, the most important first."""
    best = recommend(report)
    file = best.file if best and best.passes else max(report.exported, key=accuracy, default=None)
    bodies = {
        "Distillation": _gain(report, "distillation", file),
        "Unlabelled images": _gain(report, "unlabelled", file),
        "Other run": _gain(report, "run", file),
        "Export": "no file was exported. Export one: edgekd export RUN.",
    }
    if file is not None:
        bodies["Export"] = f"{file_name(report, file)}: {_cost(file)}." if _cost(file) else ""
        bodies["Speed"] = _speed(report, file)
    texts = [Text(body, label, console=True) for label, body in bodies.items() if body]
    return [*texts, ship(report)]


def _gain(report: Report, cause: str, file: SummaryRow | None) -> str:
    rows = [row for row in report.gains if row.cause == cause]
    if not rows and cause == "distillation" and not report.gains:
        return "not measured: it needs a baseline (edgekd train --recipe erm): edgekd benchmark RUN BASELINE_RUN."
    if not rows and cause == "unlabelled" and any(row.adapted_avg for row in report.summary):
        return "not measured: no run was trained without them. Try edgekd benchmark RUN OTHER_RUN."
    sentences = []
    for run, base in dict.fromkeys((row.run, row.base_run) for row in rows):
        pair = [row for row in rows if (row.run, row.base_run) == (run, base)]
        names = [row.subject for row in pair]
        name = file.subject if file and file.subject in names else names[-1]
        gains = {row.where: row.gain for row in pair if row.subject == name}
        each = (f"{_change(gains[k], 'points')} {v}" for k, v in _PLACES.items() if k in gains)
        sentences.append(f"{run} against {base} ({name}): {', '.join(each)}.")
    return " ".join(sentences)


def _change(change: Difference, kind: Literal["points", "loss"]) -> str:
    """Return a gain in signed points, or a loss, with its interval; make no claim if the interval includes zero."""
    low, high = change.ci95
    interval = f"[{points(low)}, {points(high)}]"
    if low == high == 0:
        return "no image changed"
    if low <= 0 <= high:
        what = "difference" if kind == "points" else "loss"
        return f"no {what} shown ({points(change.value)} points, {interval})"
    if kind == "points":
        return f"{points(change.value)} points ({interval})"
    name = "a loss" if change.value > 0 else "a gain"
    return f"{name} of {abs(100 * change.value):.1f} points ({interval})"


def _cost(row: SummaryRow) -> str:
    costs = ((row.quant_cost_ood, "out of domain"), (row.quant_cost_id, "in domain"))
    known = [(cost, where) for cost, where in costs if cost is not None]
    if known and all(cost.ci95 == (0.0, 0.0) for cost, _ in known):
        return "changed the outcome of no image"
    return ", ".join(f"{_change(cost, 'loss')} {where}" for cost, where in known)


def _speed(report: Report, file: SummaryRow) -> str:
    time, env = report.time(file), report.environment
    low, high = (ms(end) for end in time.p50_ci95_ms)
    where = f"{env['cpu']}, {in_cores(env['usable_cores'])}" if time.device == HERE else time.device
    text = f"{file_name(report, file)}: p50 {ms(time.p50_ms)} ms [{low}, {high}], p90 {ms(time.p90_ms)} ms on {where}"
    # With the ratio (0, 0), only doubts about the latency itself remain.
    doubt = reason_to_withhold([time.timing], (0.0, 0.0), load_of(env, time.device))
    text += f"; indicative only, since {doubt}" if doubt else ""
    return f"{text}. {_against_fp32(report, file)}".rstrip()


def _against_fp32(report: Report, row: SummaryRow) -> str:
    """Compare with the FP32 file of the same run on the same device, preferably of the same runtime."""
    mine = report.time(row)
    others = [
        other
        for other in report.exported
        if (other.run, other.precision) == (row.run, "fp32")
        and report.time(other).device == mine.device
    ]
    fp32 = min(others, key=lambda o: report.time(o).provider != mine.provider, default=None)
    if fp32 is None or row.precision == "fp32":
        return ""
    size = ""
    if row.size_mb and fp32.size_mb:
        size = f"has {row.size_mb / fp32.size_mb:.2f} times the size of {fp32.subject}, and "
    return f"It {size}{in_words(report.speed_of(row, fp32), fp32.subject)}."


def notes(report: Report) -> list[str]:
    """Return notes on slow INT8, unsettled or incomplete measurements, steps not timed, throttling and other load."""
    texts = list(_slower_int8(report))
    for row in report.exported_latency:
        who = f"{row.run}: {row.subject}"
        if not row.settled:
            texts.append(
                f"{who} had not settled at the end of its warm-up, so its latency may drift."
            )
        if not row.complete:
            texts.append(
                f"{who} reached its time limit after {row.n} runs, fewer than the protocol requires."
            )
    texts += [
        f"{one['run']}: {one['name']} has float input, and its latencies include normalisation in numpy."
        for one in report.context.get("artifacts", ())
        if takes_floats(one)
    ]
    texts += [
        f"{one['run']}: {one['name']} resizes in the graph. Its latencies are for images of the student's size and do "
        "not include resizing larger images."
        for one in report.context.get("artifacts", ())
        if resizes_inside(one)
    ]
    texts += throttle_notes(report.environment)
    load = load_of(report.environment, HERE)
    if load is not None and load > LOADED:
        before, cores = report.environment["before"], report.environment["usable_cores"]
        texts.append(
            f"Load average {before['load_average']:.2f} on {in_cores(cores)} before measuring: latencies may include "
            "other work."
        )
    return texts


def _slower_int8(report: Report) -> Iterator[str]:
    precision = {row.who: row.precision for row in report.exported}
    for slow, fast in product(report.exported_latency, repeat=2):
        same = (slow.run, slow.provider, slow.device) == (fast.run, fast.provider, fast.device)
        if not same or (precision[slow.who], precision[fast.who]) != ("int8", "fp32"):
            continue
        speed = report.speed_of(slow, fast)
        if speed is not None and (speed.withheld or speed.ratio >= 1):
            claim = f"{slow.run}: {slow.subject} {in_words(speed, fast.subject)}"
            yield (
                f"{claim}."
                if speed.withheld
                else f"{claim}: INT8 reduces size but not latency here."
            )


def takes_floats(facts: Mapping[str, Any]) -> bool:
    """Return whether an exported file, described by `facts` of the report's context, needs normalised floats."""
    return any(given["dtype"] == "float32" for given in facts.get("inputs", ()))


def resizes_inside(facts: Mapping[str, Any]) -> bool:
    """Return whether an exported file, described by `facts` of the report's context, accepts images of any size."""
    return any(map(resizes, facts.get("inputs", ())))


def throttle_notes(environment: Mapping[str, Any]) -> Iterator[str]:
    """Yield notes on throttling and changed power modes of this machine and of devices during the measurement."""
    yield from _throttled("The processor", environment)
    for facts in environment.get("devices", ()):
        yield from _throttled(f"Device {facts['device']}", facts)


def _throttled(who: str, facts: Mapping[str, Any]) -> Iterator[str]:
    before, after = facts["before"], facts["after"]

    def both(key: str) -> tuple[Any, Any] | None:
        pair = before.get(key), after.get(key)  # missing in results of older agents
        return None if None in pair else pair

    if (counts := both("throttle_count")) and counts[1] > counts[0]:
        heat = (state["temperature_c"] for state in (before, after))
        first, last = ("unknown" if one is None else f"{one:g} °C" for one in heat)
        yield (
            f"{who} throttled {counts[1] - counts[0]} times while measuring (temperature {first} before, "
            f"{last} after), so its latencies include throttling."
        )
    if flags := both("throttle_flags"):
        start, end = (int(value, 16) for value in flags)
        raised = start | end | (end & ~start) >> 16
        if names := [name for bit, name in enumerate(_THROTTLE_FLAGS) if raised >> bit & 1]:
            yield f"{who} reported {', '.join(names)} while measuring, so its latencies are not at full speed."
    if (modes := both("power_mode")) and modes[0] != modes[1]:
        yield f"{who} changed from power mode {modes[0]} to {modes[1]} while measuring."
