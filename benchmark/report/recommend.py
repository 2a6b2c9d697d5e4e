"""Which of the measured files to ship, and the table that the choice is made from.

`edgekd benchmark` and `edgekd export --target auto` end with the same recommendation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

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
    """The file to ship, or the one nearest to the gates where no file passes all of them."""

    file: SummaryRow
    passes: bool
    because: str


def recommend(report: Report) -> Recommendation | None:
    """Choose among the exported files; None where none was measured.

    Of the files that pass every gate: the most accurate out of domain (on the adapted domains, in domain, where that
    is not measured). A file of the same run whose export loss is not shown takes its place if it is shown to be faster,
    or if it is smaller and its p50 is not higher. Where no file passes, the one whose largest excess over a limit,
    relative to the limit, is the smallest.
    """
    files = report.exported
    if not files:
        return None
    passing = [row for row in files if not _failed(report, row)]
    if not passing:
        nearest = min(files, key=lambda row: max(map(_excess, _failed(report, row))))
        return Recommendation(nearest, False, _missed(report, nearest))
    best = max(passing, key=lambda row: (accuracy(row), -report.time(row).p50_ms))
    name = report.label(best)
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
    most = f"it is the most accurate {_level(best)}"
    return Recommendation(best, True, only if len(passing) == 1 else most)


def choice(report: Report) -> SummaryRow | None:
    """Return the file to ship; None where no file passes every gate, or none was measured."""
    best = recommend(report)
    return best.file if best is not None and best.passes else None


def accuracy(row: SummaryRow) -> float:
    """Return the accuracy that the choice goes by, 0–1; -1 where none was measured."""
    return next((v for key in _LEVELS if (v := getattr(row, key)) is not None), -1.0)


def pareto(report: Report) -> list[SummaryRow]:
    """Return the files that no other beats: none is as accurate, as fast (p50) and as small, and better in one."""

    def point(row: SummaryRow) -> tuple[float, float, float]:
        size_mb = math.inf if row.size_mb is None else row.size_mb
        return -accuracy(row), report.time(row).p50_ms, size_mb

    points = [point(row) for row in report.exported]

    def is_beaten(own: tuple[float, ...]) -> bool:
        rivals = (other for other in points if other != own)
        return any(all(a <= b for a, b in zip(other, own, strict=True)) for other in rivals)

    return [row for row in report.exported if not is_beaten(point(row))]


def recommendation_items(report: Report) -> list[Text | Table]:
    """Return the sentence and the table of all exported files: the one to ship, the Pareto front, the others."""
    best = recommend(report)
    if best is None:
        return [Text("nothing to ship: no exported file was measured.", "Ship", console=True)]
    name = report.label(best.file)
    if best.passes:
        label = "Ship this one" if report.gates else "First candidate, without gates"
        text = Text(f"{name}, because {best.because}.", label, "good", console=True)
    else:
        body = f"no file passes every gate. The nearest is {name}: {best.because}."
        text = Text(body, "Ship", "bad", console=True)
    return [text, _table(report, best)]


def _table(report: Report, best: Recommendation) -> Table:
    front, several = pareto(report), len({row.device for row in report.exported_latency}) > 1

    def outcome(row: SummaryRow) -> Cell:
        failed = ", ".join(gate.metric for gate in _failed(report, row))
        return Cell(f"missed: {failed}", "bad") if failed else Cell("passed", "good")

    def rank(row: SummaryRow) -> tuple[bool, bool, float]:
        return row is not best.file, row not in front, report.time(row).p50_ms

    cells: list[Cells] = [
        {"file": report.label(row), "Pareto": "yes" if row in front else ""}
        | shown(row, "id ood_avg adapted_avg")
        | shown(report.time(row), "p50_ms p90_ms")
        | shown(row, "size_mb")
        | ({"device": report.time(row).device} if several else {})
        | ({"gates": outcome(row)} if report.gates else {})
        for row in sorted(report.exported, key=rank)
    ]
    note = "Pareto: no other file is at least as accurate, as fast and as small, and better in one of them."
    return table("Files to choose from", cells, note=note, console=True)


def print_recommendation(
    report: Report, left_out: Iterable[tuple[str, str]] = (), *, files: bool = True
) -> None:
    """Print the recommendation, the files to choose from, and what was not measured and why, on standard output.

    Args:
        files: False where a table with their numbers has just been printed.
    """
    items = recommendation_items(report)
    notes = [Text(why, f"left out: {what}", console=True) for what, why in left_out]
    section = Section("choice", "", (*(items if files else items[:1]), *notes))
    print_document(Document("recommendation", "Which file to ship", "", (section,)))


def check_recommendation(report: Report) -> None:
    """Check that a file passes every gate.

    Raises:
        GateFailed: none does; the message names the nearest.
    """
    best = recommend(report)
    if best is not None and not best.passes:
        raise GateFailed(
            f"No file meets the budget. The nearest is {report.label(best.file)}: {_missed(report, best.file)}.",
            "Raise a limit, train a smaller student, or allow INT8 fewer layers: --max-drop-ood.",
        )


def _failed(report: Report, row: SummaryRow) -> list[GateRow]:
    return [gate for gate in report.gates if not gate.passed and (gate.run, gate.subject) == row.who]  # fmt: skip


def _excess(gate: GateRow) -> float:
    """Return how far the value is beyond the limit, relative to the limit; infinite where there is no value."""
    if gate.value is None:
        return math.inf
    return abs(gate.value - gate.limit) / (abs(gate.limit) or 1.0)


def _missed(report: Report, row: SummaryRow) -> str:
    def sentence(gate: GateRow) -> str:
        if gate.value is None:
            return f"{gate.metric} has no value ({gate.reason})"
        return f"{gate.metric} is {gate.value:.4g}, not {gate.operator} {gate.limit:g}"

    return "; ".join(map(sentence, _failed(report, row)))


def _level(row: SummaryRow) -> str:
    key = next((key for key in _LEVELS if getattr(row, key) is not None), None)
    return f"{_LEVELS[key]} ({percent(accuracy(row))} %)" if key else "file (no accuracy was measured)"  # fmt: skip
