"""The first lines of a report: what was gained, what it cost, how fast it is, and which file to ship.

Nothing is called a difference whose 95 % interval includes zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from edgekd.benchmark.measure.speed import (
    WIDE_CV,
    in_words,
    load_of,
    reason_to_withhold,
    speed_between,
)
from edgekd.benchmark.report.metric import ms, percent, points
from edgekd.benchmark.report.recommend import accuracy, choice, recommend
from edgekd.benchmark.report.rows import Difference, SummaryRow, UnknownRow
from edgekd.benchmark.report.schema import GainRow, Report, of
from edgekd.benchmark.report.sections import Text
from edgekd.benchmark.report.timings import LatencyRow

_PLACES = {"id": "in domain", "ood": "out of domain", "adapted": "on the adapted domains"}


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
    """Return one answer to each question, in the order in which a reader asks them."""
    file = choice(report) or max(report.exported, key=accuracy, default=None)
    found = [
        ("Distillation", _gain(report, "distillation", file)),
        ("Unlabelled images", _gain(report, "unlabelled", file)),
        ("Other run", _gain(report, "run", file)),
        ("Export", _export(report, file)),
        ("Speed", _speed(report, file)),
    ]
    texts = [Text(body, label, console=True) for label, body in found if body]
    return [*texts, _ship(report)]


def _gain(report: Report, cause: str, file: SummaryRow | None) -> str:
    rows = [row for row in report.gains if row.cause == cause]
    if not rows:
        return _no_gain(report, cause)
    parts = []
    for run, base in dict.fromkeys((row.run, row.base_run) for row in rows):
        pair = [row for row in rows if (row.run, row.base_run) == (run, base)]
        names = [row.subject for row in pair]
        name = file.subject if file and file.subject in names else names[-1]
        told = [
            f"{_gained(row.gain)} {_PLACES[row.where]}"
            for row in sorted(pair, key=lambda row: _order(row))
            if row.subject == name
        ]
        parts.append(f"{run} against {base} ({name}): {', '.join(told)}.")
    return " ".join(parts)


def _order(row: GainRow) -> int:
    return ("adapted", "ood", "id").index(row.where)


def _no_gain(report: Report, cause: str) -> str:
    if cause == "distillation" and not report.gains:
        return "not measured: no run was trained without a teacher. Try edgekd benchmark RUN BASELINE_RUN."
    if cause == "unlabelled" and any(row.adapted_avg is not None for row in report.summary):
        return "not measured: no run was trained without them. Try edgekd benchmark RUN OTHER_RUN."
    return ""


def _gained(gain: Difference) -> str:
    low, high = gain.ci95
    interval = f"[{points(low)}, {points(high)}]"
    if low == high == 0:
        return "no image changed"
    if low <= 0 <= high:
        return f"no difference shown ({points(gain.value)} points, {interval})"
    return f"{points(gain.value)} points ({interval})"


def _export(report: Report, file: SummaryRow | None) -> str:
    if file is None:
        return "no file was exported. Export one: edgekd export RUN."
    return f"{_name(report, file)}: {_cost(file)}." if _cost(file) else ""


def _cost(row: SummaryRow) -> str:
    costs = [(row.quant_cost_ood, "out of domain"), (row.quant_cost_id, "in domain")]
    known = [(cost, where) for cost, where in costs if cost is not None]
    if known and all(cost.ci95 == (0.0, 0.0) for cost, _ in known):
        return "changed the outcome of no image"
    return ", ".join(f"{_loss(cost)} {where}" for cost, where in known)


def _loss(cost: Difference) -> str:
    low, high = cost.ci95
    interval = f"[{points(low)}, {points(high)}]"
    if low == high == 0:
        return "no image changed"
    if low <= 0 <= high:
        return f"no loss shown ({points(cost.value)} points, {interval})"
    kind = "a loss" if cost.value > 0 else "a gain"
    return f"{kind} of {abs(100 * cost.value):.1f} points ({interval})"


def _speed(report: Report, file: SummaryRow | None) -> str:
    if file is None:
        return ""
    time = report.time(file)
    low, high = (ms(end) for end in time.p50_ci95_ms)
    env = report.environment
    where = f"{env['cpu']}, {env['usable_cores']} cores" if time.device == "local" else time.device
    text = f"{_name(report, file)}: p50 {ms(time.p50_ms)} ms [{low}, {high}], p90 {ms(time.p90_ms)} ms on {where}"
    # The ratio (0, 0) leaves what speaks against the latency itself.
    doubt = reason_to_withhold((time,), (0.0, 0.0), load_of(report.environment, time.device))
    text += f"; indicative only, since {doubt}" if doubt else ""
    other = _fp32(report, file)
    return f"{text}. {_beside(report, file, other) if other else ''}".rstrip()


def _ship(report: Report) -> Text:
    state, headline = verdict(report)
    found, quick = (
        recommend(report),
        " by the quick protocol, indicative only" if report.quick else "",
    )
    if found is None:
        return Text("nothing to ship: no exported file was measured.", "Ship", console=True)
    name = _name(report, found.file)
    if not found.passes:
        return Text(f"no. {headline}; {found.because} ({name}).", "Ship", "bad", console=True)
    if state == "none":
        body = f"undecided: no gates were set{quick}. First candidate: {name}, because {found.because}."
        return Text(body, "Ship", console=True)
    body = f"yes, {name}: it passes every gate{quick}, and {found.because}."
    return Text(body, "Ship", "good", console=True)


def _name(report: Report, row: SummaryRow) -> str:
    return f"{row.run}/{row.subject}" if len(report.runs) > 1 else row.subject


def _fp32(report: Report, row: SummaryRow) -> SummaryRow | None:
    """Return the FP32 file of the same run on the same device, of the same runtime where there is one."""
    mine = report.time(row)
    found = [
        other
        for other in report.exported
        if (other.run, other.precision) == (row.run, "fp32")
        and report.time(other).device == mine.device
        and row.precision != "fp32"
    ]
    return min(found, key=lambda o: report.time(o).provider != mine.provider, default=None)


def _beside(report: Report, row: SummaryRow, fp32: SummaryRow) -> str:
    speed = in_words(speed_between(report, report.time(row), report.time(fp32)), fp32.subject)
    size = ""
    if row.size_mb and fp32.size_mb:
        size = f", with {row.size_mb / fp32.size_mb:.2f} times its size"
    return f"It {speed}{size}."


def findings(report: Report) -> Iterator[Text]:
    """Yield what each exported file reaches, keeps, loses and takes."""
    for row in report.exported:
        time, fp32 = report.time(row), _fp32(report, row)
        parts = [
            _reaches(row, time),
            f"Keeps {percent(row.retention)} % of its teacher's OOD accuracy."
            if row.retention is not None
            else "",
            f"Export: {_cost(row)}." if _cost(row) else "",
            _detects(of(report.unknowns, row)),
            f"Its latencies scatter (CV {time.cv:.2f}): look at every sample before trusting one percentile."
            if time.cv > WIDE_CV
            else "",
            _beside(report, row, fp32) if fp32 else "",
        ]
        yield Text(" ".join(part for part in parts if part), _name(report, row))


def _reaches(row: SummaryRow, time: LatencyRow) -> str:
    places = [f"{percent(row.id)} % top-1 in domain"] if row.id is not None else []
    adapted = {k.partition(":")[2]: v for k, v in row.apart.items() if k.startswith("adapted:")}
    for values, average, what in (
        (row.ood, row.ood_avg, "unseen"),
        (adapted, row.adapted_avg, "adapted"),
    ):
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
