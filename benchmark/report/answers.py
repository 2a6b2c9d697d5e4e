"""The first lines of a report: what was gained, what it cost, how fast it is, and which file to ship.

Nothing is called a difference whose 95 % interval includes zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from edgekd.benchmark.measure.speed import load_of, speed_between
from edgekd.benchmark.report.recommend import accuracy, choice, recommend
from edgekd.benchmark.report.sections import Text
from edgekd.benchmark.results.metric import ms, percent, points
from edgekd.benchmark.results.rows import HERE, Difference, LatencyRow, SummaryRow, UnknownRow
from edgekd.benchmark.results.schema import Report, of
from edgekd.targets.timing.speed import WIDE_CV, in_words, reason_to_withhold

_PLACES = {"adapted": "on the adapted domains", "ood": "out of domain", "id": "in domain"}
"""Where a gain was measured → in words, in the order in which gains are listed."""


def verdict(report: Report) -> tuple[Literal["passed", "failed", "none"], str]:
    """Return the state of the gates, and a headline."""
    total, failed = len(report.gates), sum(not gate.passed for gate in report.gates)
    noun = "gate" if total == 1 else "gates"
    if not total:
        return "none", "No gates were set"
    if failed:
        return "failed", f"{failed} of {total} {noun} failed"
    return "passed", f"{'All ' if total > 1 else ''}{total} {noun} passed"


def answers(report: Report) -> list[Text]:
    """Return one answer to each question of a reader, the most important first."""
    file = choice(report) or max(report.exported, key=accuracy, default=None)
    found = {
        "Distillation": _gain(report, "distillation", file),
        "Unlabelled images": _gain(report, "unlabelled", file),
        "Other run": _gain(report, "run", file),
        "Export": "no file was exported. Export one: edgekd export RUN.",
        "Speed": "",
    }
    if file is not None:
        found["Export"] = f"{_name(report, file)}: {_cost(file)}." if _cost(file) else ""
        found["Speed"] = _speed(report, file)
    texts = [Text(body, label, console=True) for label, body in found.items() if body]
    return [*texts, _ship(report)]


def _gain(report: Report, cause: str, file: SummaryRow | None) -> str:
    rows = [row for row in report.gains if row.cause == cause]
    if not rows and cause == "distillation" and not report.gains:
        return "not measured: no run was trained without a teacher. Try edgekd benchmark RUN BASELINE_RUN."
    if not rows and cause == "unlabelled" and any(row.adapted_avg for row in report.summary):
        return "not measured: no run was trained without them. Try edgekd benchmark RUN OTHER_RUN."
    parts = []
    for run, base in dict.fromkeys((row.run, row.base_run) for row in rows):
        pair = [row for row in rows if (row.run, row.base_run) == (run, base)]
        names = [row.subject for row in pair]
        name = file.subject if file and file.subject in names else names[-1]
        gains = {row.where: row.gain for row in pair if row.subject == name}
        parts_of_run = [
            f"{_change(gains[where], 'points')} {place}"
            for where, place in _PLACES.items()
            if where in gains
        ]
        parts.append(f"{run} against {base} ({name}): {', '.join(parts_of_run)}.")
    return " ".join(parts)


def _change(change: Difference, kind: Literal["points", "loss"]) -> str:
    """Return a gain in signed points, or a loss as such, with its interval; no claim where that includes zero."""
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
    costs = [(row.quant_cost_ood, "out of domain"), (row.quant_cost_id, "in domain")]
    known = [(cost, where) for cost, where in costs if cost is not None]
    if known and all(cost.ci95 == (0.0, 0.0) for cost, _ in known):
        return "changed the outcome of no image"
    return ", ".join(f"{_change(cost, 'loss')} {where}" for cost, where in known)


def _speed(report: Report, file: SummaryRow) -> str:
    time, env = report.time(file), report.environment
    low, high = (ms(end) for end in time.p50_ci95_ms)
    where = f"{env['cpu']}, {env['usable_cores']} cores" if time.device == HERE else time.device
    text = f"{_name(report, file)}: p50 {ms(time.p50_ms)} ms [{low}, {high}], p90 {ms(time.p90_ms)} ms on {where}"
    # The ratio (0, 0) leaves the reasons against the latency itself.
    doubt = reason_to_withhold([time.timing], (0.0, 0.0), load_of(env, time.device))
    text += f"; indicative only, since {doubt}" if doubt else ""
    return f"{text}. {_against_fp32(report, file)}".rstrip()


def _ship(report: Report) -> Text:
    state, headline = verdict(report)
    found, quick = recommend(report), " (quick protocol, indicative only)" if report.quick else ""
    if found is None:
        return Text("nothing to ship: no exported file was measured.", "Ship", console=True)
    name, tone = _name(report, found.file), ""
    if not found.passes:
        body, tone = f"no. {headline}; {found.because} ({name}).", "bad"
    elif state == "none":
        body = f"undecided: no gates were set. First candidate: {name}{quick}, because {found.because}."
    else:
        body, tone = f"yes, {name}: it passes every gate{quick}, and {found.because}.", "good"
    return Text(body, "Ship", tone, console=True)


def _name(report: Report, row: SummaryRow) -> str:
    return f"{row.run}/{row.subject}" if len(report.runs) > 1 else row.subject


def _against_fp32(report: Report, row: SummaryRow) -> str:
    """Compare with the FP32 file of the same run on the same device, of the same runtime where there is one."""
    mine = report.time(row)
    found = [
        other
        for other in report.exported
        if (other.run, other.precision) == (row.run, "fp32")
        and report.time(other).device == mine.device
        and row.precision != "fp32"
    ]
    fp32 = min(found, key=lambda o: report.time(o).provider != mine.provider, default=None)
    if fp32 is None:
        return ""
    speed = speed_between(report, mine, report.time(fp32))
    size = ""
    if row.size_mb and fp32.size_mb:
        size = f", with {row.size_mb / fp32.size_mb:.2f} times its size"
    return f"It {in_words(speed.claim if speed else None, fp32.subject)}{size}."


def findings(report: Report) -> Iterator[Text]:
    """Yield the accuracy, retention, loss and speed of each exported file in words."""
    for row in report.exported:
        time = report.time(row)
        parts = [_reaches(row, time)]
        if row.retention is not None:
            parts.append(f"Keeps {percent(row.retention)} % of its teacher's OOD accuracy.")
        if cost := _cost(row):
            parts.append(f"Export: {cost}.")
        parts.append(_detects(of(report.unknowns, row)))
        if time.cv > WIDE_CV:
            parts.append(
                f"Its latencies scatter (CV {time.cv:.2f}): look at every sample before trusting one percentile."
            )
        parts.append(_against_fp32(report, row))
        yield Text(" ".join(filter(None, parts)), _name(report, row))


def _reaches(row: SummaryRow, time: LatencyRow) -> str:
    places = [f"{percent(row.id)} % top-1 in domain"] if row.id is not None else []
    adapted = {k.partition(":")[2]: v for k, v in row.apart.items() if k.startswith("adapted:")}
    unseen = (row.ood, row.ood_avg, "unseen")
    for values, average, what in (unseen, (adapted, row.adapted_avg, "adapted")):
        if values:
            worst = min(values, key=lambda domain: values[domain])
            where = worst if len(values) == 1 else f"{len(values)} {what} domains"
            lowest = f" (worst {worst}: {percent(values[worst])} %)" if len(values) > 1 else ""
            places.append(f"{percent(average)} % on {where}{lowest}")
    gap = "" if row.gap is None else f", a gap of {percent(row.gap)} points"
    low, high = (ms(end) for end in time.p50_ci95_ms)
    speed = f"one image takes {ms(time.p50_ms)} ms (p50, 95 % CI {low}–{high})"
    return f"{', '.join(places)}{gap}; {speed}." if places else f"{speed.capitalize()}."


def _detects(rows: Sequence[UnknownRow]) -> str:
    """Describe detection on the suite of unknown images with the lowest AUROC."""
    if not rows:
        return ""
    row = min(rows, key=lambda one: one.msp.auroc)
    low, high = row.msp.auroc_ci95
    worst = "" if len(rows) == 1 else f", the worst of {len(rows)} suites,"
    text = (
        f"Its confidence detects {row.suite}{worst} with an AUROC of {percent(row.msp.auroc)} % "
        f"({percent(low)}–{percent(high)}; 50 is chance)"
    )
    cost = row.msp.auroc_cost
    if cost is None or cost.ci95[0] <= 0 <= cost.ci95[1]:
        return f"{text}."
    change = "less" if cost.value > 0 else "more"
    return f"{text}, {abs(100 * cost.value):.1f} points {change} than before export."
