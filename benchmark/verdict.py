"""What a report comes to, in sentences: gates first, then what each file gained, lost and costs.

Nothing is called a difference whose interval includes none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from edgekd.benchmark.findings import GateRow, UnknownRow
from edgekd.benchmark.measure.speed import WIDE_CV, in_words, speed_between
from edgekd.benchmark.rows import Difference, LatencyRow, Report, SummaryRow
from edgekd.benchmark.table import ms, percent


@dataclass(frozen=True)
class Verdict:
    """`state` is that of the gates; each finding is a subject's name and sentences about it."""

    state: Literal["passed", "failed", "none"]
    headline: str
    findings: tuple[tuple[str, str], ...]


def verdict(report: Report) -> Verdict:
    """Gates, and the findings about every exported file."""
    failed = [gate for gate in report.gates if not gate.passed]
    state: Literal["passed", "failed", "none"] = (
        "failed" if failed else "passed" if report.gates else "none"
    )
    headline = {
        "none": "No gates were set",
        "failed": f"{len(failed)} of {_count(len(report.gates), 'gate')} failed",
        "passed": f"{'All ' if len(report.gates) > 1 else ''}{_count(len(report.gates), 'gate')} passed",
    }[state]
    return Verdict(state, headline, tuple(_findings(report)))


def gate_cells(gate: GateRow) -> tuple[str, str, str, str]:
    """Outcome in a word, expression, artifact, and the value."""
    value = f"not evaluated: {gate.reason}" if gate.value is None else f"{gate.value:.4g}"
    who = gate.subject or "no artifact"
    outcome = "passed" if gate.passed else "failed"
    return outcome, gate.expression, f"{gate.run}/{who}" if gate.run else who, value


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _findings(report: Report) -> Iterator[tuple[str, str]]:
    several = len({row.run for row in report.summary}) > 1
    latency = {(row.run, row.subject): row for row in report.latency}
    exported = [row for row in report.summary if row.kind == "artifact"]
    for row in exported:
        name = f"{row.run}/{row.subject}" if several else row.subject
        time = latency[row.run, row.subject]
        strangers = [
            one for one in report.unknowns if (one.run, one.subject) == (row.run, row.subject)
        ]
        parts = [
            _what(row, time),
            _kept_of_teacher(row),
            _cost(row),
            _told_apart(strangers),
            _scatter(time),
        ]
        yield name, " ".join(part for part in parts if part)
    for row in exported:
        fp32 = _fp32_of(row, exported, latency)
        name = f"{row.run}: {row.precision.upper()}" if several else row.precision.upper()
        if row.precision != "fp32" and fp32 is not None:
            yield f"{name} or {fp32.precision.upper()}?", _beside(report, row, fp32, latency)
    if not exported:
        yield "No exported file", "was measured; export one to see what a device would get."


def _fp32_of(
    row: SummaryRow,
    exported: Sequence[SummaryRow],
    latency: dict[tuple[str, str], LatencyRow],
) -> SummaryRow | None:
    """The FP32 file of the same run on the same device, of the same runtime where there is one."""
    mine = latency[row.run, row.subject]
    found = [
        other
        for other in exported
        if (other.run, other.precision) == (row.run, "fp32")
        and latency[other.run, other.subject].device == mine.device
    ]
    return min(
        found,
        key=lambda other: latency[other.run, other.subject].provider != mine.provider,
        default=None,
    )


def _what(row: SummaryRow, time: LatencyRow) -> str:
    low, high = time.p50_ci95_ms
    places = [f"{percent(row.id)} % top-1 in domain"] if row.id is not None else []
    if row.ood_avg is not None:
        where = next(iter(row.ood)) if len(row.ood) == 1 else f"{len(row.ood)} unseen domains"
        places.append(f"{percent(row.ood_avg)} % on {where}")
        if len(row.ood) > 1:
            places[-1] += f" (worst {row.ood_worst_domain}: {percent(row.ood_worst)} %)"
    gap = "" if row.gap is None else f", a gap of {percent(row.gap)} points"
    speed = f"one image takes {ms(time.p50_ms)} ms (p50, 95 % CI {ms(low)}–{ms(high)})"
    return f"{', '.join(places)}{gap}; {speed}." if places else f"{speed.capitalize()}."


def _kept_of_teacher(row: SummaryRow) -> str:
    return (
        ""
        if row.retention is None
        else f"Keeps {percent(row.retention)} % of its teacher's OOD accuracy."
    )


def _cost(row: SummaryRow) -> str:
    costs = [(row.quant_cost_id, "in domain"), (row.quant_cost_ood, "out of domain")]
    said = [f"{_loss(cost)} {where}" for cost, where in costs if cost is not None]
    if not said:
        return ""
    if all(cost is None or cost.ci95 == (0.0, 0.0) for cost, _ in costs):
        return "Export changed the outcome of no image."
    return f"Export: {', '.join(said)}."


def _told_apart(rows: Sequence[UnknownRow]) -> str:
    """About the suite of unknown images that it tells apart worst."""
    if not rows:
        return ""
    row = min(rows, key=lambda one: one.msp.auroc)
    low, high = row.msp.auroc_ci95
    worst = "" if len(rows) == 1 else f", the worst of {len(rows)} suites,"
    said = f"Its confidence tells known images from {row.suite}{worst} with an AUROC of {percent(row.msp.auroc)} %"
    said += f" ({percent(low)}–{percent(high)}; 50 is chance)"
    if row.msp.auroc_cost is None or row.msp.auroc_cost.ci95[0] <= 0 <= row.msp.auroc_cost.ci95[1]:
        return f"{said}."
    points = 100 * row.msp.auroc_cost.value
    return (
        f"{said}, {abs(points):.1f} points {'less' if points > 0 else 'more'} than before export."
    )


def _scatter(time: LatencyRow) -> str:
    if time.cv <= WIDE_CV:
        return ""
    return f"Its latencies scatter (CV {time.cv:.2f}): look at every sample before trusting one percentile."


def _loss(cost: Difference) -> str:
    low, high = (100 * end for end in cost.ci95)
    points, shown = 100 * cost.value, f"[{100 * cost.ci95[0]:+.1f}, {100 * cost.ci95[1]:+.1f}]"
    if low == high == 0:
        return "no image changed"
    if low <= 0 <= high:
        return f"no loss shown ({points:+.1f} points, {shown})"
    return f"{'a loss' if points > 0 else 'a gain'} of {abs(points):.1f} points ({shown})"


def _beside(
    report: Report, row: SummaryRow, fp32: SummaryRow, latency: dict[tuple[str, str], LatencyRow]
) -> str:
    speed = speed_between(report, latency[row.run, row.subject], latency[fp32.run, fp32.subject])
    size = ""
    if row.size_mb and fp32.size_mb:
        size = (
            f"{row.subject} has {row.size_mb / fp32.size_mb:.2f} times the size of {fp32.subject}; "
        )
    return f"{size}{'it' if size else row.subject} {in_words(speed, fp32.subject)}."
