"""Recommend a file to ship, with a table of the measured files.

`edgekd benchmark` and `edgekd export --target auto` end with the same recommendation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import compress
from typing import Literal

from edgekd.benchmark.report.charts import undominated
from edgekd.benchmark.report.elements import (
    Cell,
    Cells,
    Document,
    Section,
    Table,
    Text,
    shown,
    table,
)
from edgekd.benchmark.report.render import print_document
from edgekd.benchmark.results.metric import percent
from edgekd.benchmark.results.rows import SummaryRow
from edgekd.benchmark.results.schema import GateRow, Report
from edgekd.core.errors import GateFailed
from edgekd.targets.timing.speed import in_words

_LEVELS = {"ood_avg": "out of domain", "adapted_avg": "on the adapted domains", "id": "in domain"}


@dataclass(frozen=True)
class Recommendation:
    """The file to ship, or the one nearest to the limits if no file passes every gate."""

    file: SummaryRow
    passes: bool
    because: str


def recommend(report: Report) -> Recommendation | None:
    """Choose an exported file; return None if none was measured.

    Among the files that pass every gate, the one with the highest accuracy out of domain (else on the adapted domains,
    else in domain) is chosen. Another file of the same run without a significant export loss replaces it if it is
    significantly faster, or smaller at no higher p50. If no file passes, the one with the smallest relative excess over
    a limit is chosen.
    """
    files = report.exported
    if not files:
        return None
    passing = [row for row in files if not _failed(report, row)]
    if not passing:
        nearest = min(files, key=lambda row: max(map(_excess, _failed(report, row))))
        return Recommendation(nearest, False, _missed(report, nearest))
    best = max(passing, key=lambda row: (accuracy(row), -report.time(row).p50_ms))
    name = file_name(report, best)
    for row in sorted(passing, key=lambda row: report.time(row).p50_ms):
        cost, speed = row.quant_cost_ood or row.quant_cost_id, report.speed_of(row, best)
        if row.run != best.run or cost is None or cost.ci95[0] > 0 or speed is None:
            continue
        if speed.withheld is None and speed.ratio < 1:
            claim = f"no export loss is shown, and it {in_words(speed, name)}"
            return Recommendation(row, True, claim)
        if (row.size_mb or math.inf) < (best.size_mb or 0) and speed.ratio <= 1:
            size = f"{(row.size_mb or 0) / (best.size_mb or 1):.2f} times the size of {name}"
            return Recommendation(
                row, True, f"no export loss is shown, it has {size}, and its p50 is not higher"
            )
    only = "it is the only file that " + ("passes every gate" if len(files) > 1 else "was measured")
    where = next((where for key, where in _LEVELS.items() if getattr(best, key) is not None), "")
    most = f"it is the most accurate {where} ({percent(accuracy(best))} %)"
    if not where:
        most = "it is the fastest file, and no accuracy was measured"
    return Recommendation(best, True, only if len(passing) == 1 else most)


def file_name(report: Report, row: SummaryRow) -> str:
    """Return an exported file's name for sentences, after its run's name if the report has several runs."""
    return f"{row.run}/{row.subject}" if len(report.runs) > 1 else row.subject


def accuracy(row: SummaryRow) -> float:
    """Return the accuracy used for the choice, 0–1, or -1 if none was measured."""
    return next((v for key in _LEVELS if (v := getattr(row, key)) is not None), -1.0)


def pareto(report: Report) -> list[SummaryRow]:
    """Return the Pareto front of the files by accuracy, p50 and size."""

    def point(row: SummaryRow) -> tuple[float, float, float]:
        size_mb = math.inf if row.size_mb is None else row.size_mb
        return -accuracy(row), report.time(row).p50_ms, size_mb

    return list(compress(report.exported, undominated(list(map(point, report.exported)))))


def verdict(report: Report) -> tuple[Literal["passed", "failed", "none"], str]:
    """Return the state of the gates and a headline."""
    total, failed = len(report.gates), sum(not gate.passed for gate in report.gates)
    noun = "gate" if total == 1 else "gates"
    if not total:
        return "none", "No gates were set"
    if failed:
        return "failed", f"{failed} of {total} {noun} failed"
    return "passed", f"{'All ' if total > 1 else ''}{total} {noun} passed"


def ship(report: Report) -> Text:
    """Return whether to ship a file, which one, and why."""
    state, headline = verdict(report)
    best, quick = recommend(report), " (quick protocol, indicative only)" if report.quick else ""
    if best is None:
        return Text("nothing to ship: no exported file was measured.", "Ship", console=True)
    name, tone = file_name(report, best.file), ""
    if not best.passes:
        body, tone = f"no. {headline}. The nearest is {name}: {best.because}.", "bad"
    elif state == "none":
        why = f"{name}{quick}, because {best.because}"
        body = f"undecided: no gates were set. First candidate: {why}."
    else:
        body, tone = f"yes, {name}: it passes every gate{quick}, and {best.because}.", "good"
    return Text(body, "Ship", tone, console=True)


def files_table(report: Report) -> Table:
    """Return the exported files: the one to ship, the Pareto front, the others."""
    front, several = pareto(report), len({row.device for row in report.exported_latency}) > 1
    best = recommend(report)

    def outcome(row: SummaryRow) -> Cell:
        failed = ", ".join(gate.metric for gate in _failed(report, row))
        return Cell(f"missed: {failed}", "bad") if failed else Cell("passed", "good")

    def rank(row: SummaryRow) -> tuple[bool, bool, float]:
        return best is None or row is not best.file, row not in front, report.time(row).p50_ms

    cells: list[Cells] = [
        {"file": file_name(report, row), "Pareto": "yes" if row in front else ""}
        | shown(row, "id ood_avg adapted_avg")
        | shown(report.time(row), "p50_ms p90_ms")
        | shown(row, "size_mb")
        | ({"device": report.time(row).device} if several else {})
        | ({"gates": outcome(row)} if report.gates else {})
        for row in sorted(report.exported, key=rank)
    ]
    note = "Pareto: no other file is at least as accurate, as fast and as small, and better in one of them."
    return table("Files to choose from", cells, note=note)


def print_choice(report: Report, left_out: Iterable[tuple[str, str]]) -> None:
    """Print the recommended file, all files, and the reasons for files that were left out, on standard output."""
    files = replace(files_table(report), console=True)
    notes = (Text(why, f"left out: {what}", console=True) for what, why in left_out)
    section = Section("choice", "", (ship(report), files, *notes))
    print_document(Document("recommendation", "Which file to ship", "", (section,)))


def check_recommendation(report: Report) -> None:
    """Raise `GateFailed` with the nearest file if no file passes every gate."""
    best = recommend(report)
    if best is not None and not best.passes:
        raise GateFailed(
            f"No file meets the budget. The nearest is {file_name(report, best.file)}: {_missed(report, best.file)}.",
            "Raise a limit, train a smaller student, or allow INT8 fewer layers: --max-drop-ood.",
        )


def _failed(report: Report, row: SummaryRow) -> list[GateRow]:
    return [
        gate for gate in report.gates if not gate.passed and (gate.run, gate.subject) == row.who
    ]


def _excess(gate: GateRow) -> float:
    """Return the excess over the limit relative to the limit; infinite if there is no value."""
    if gate.value is None:
        return math.inf
    return abs(gate.value - gate.limit) / (abs(gate.limit) or 1.0)


def _missed(report: Report, row: SummaryRow) -> str:
    def sentence(gate: GateRow) -> str:
        if gate.value is None:
            return f"{gate.metric} has no value ({gate.reason})"
        return f"{gate.metric} is {gate.value:.4g}, not {gate.operator} {gate.limit:g}"

    return "; ".join(map(sentence, _failed(report, row)))
