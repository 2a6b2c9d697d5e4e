"""Which of the measured files to ship, and the table that the choice is made from.

`edgekd benchmark` and `edgekd export --target auto` end with the same recommendation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from edgekd.benchmark.measure.speed import speed_between
from edgekd.benchmark.report.render import print_document
from edgekd.benchmark.report.sections import (
    Cell,
    Cells,
    Document,
    Section,
    Table,
    Text,
    shown,
    table,
)
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
    failed = {row.who: _failed(report, row) for row in files}
    passing = [row for row in files if not failed[row.who]]
    if not files:
        return None
    if not passing:
        nearest = min(files, key=lambda row: max(map(_excess, failed[row.who])))
        missed = "; ".join(map(_missed, failed[nearest.who]))
        return Recommendation(
            nearest, False, f"no file passes every gate, and it is the nearest: {missed}"
        )
    best = max(passing, key=lambda row: (accuracy(row), -report.time(row).p50_ms))
    best_name = report.label(best)
    for row in sorted(passing, key=lambda row: report.time(row).p50_ms):
        cost = row.quant_cost_ood or row.quant_cost_id
        if row is best or row.run != best.run or cost is None or cost.ci95[0] > 0:
            continue
        speed = speed_between(report, report.time(row), report.time(best))
        if speed is not None and speed.withheld is None and speed.ratio < 1:
            return Recommendation(
                row, True, f"no export loss is shown, and it {in_words(speed.claim, best_name)}"
            )
        if (
            row.size_mb
            and best.size_mb
            and row.size_mb < best.size_mb
            and speed
            and speed.ratio <= 1
        ):
            size = f"{row.size_mb / best.size_mb:.2f} times the size of {best_name}"
            speed_said = in_words(speed.claim, best_name)
            return Recommendation(
                row, True, f"no export loss is shown, it has {size}, and it {speed_said}"
            )
    only = "it is the only file that " + ("passes every gate" if len(files) > 1 else "was measured")
    most = f"it is the most accurate {_level(best)}"
    return Recommendation(best, True, only if len(passing) == 1 else most)


def choice(report: Report) -> SummaryRow | None:
    """Return the file to ship; None where no file passes every gate, or none was measured."""
    found = recommend(report)
    return found.file if found is not None and found.passes else None


def accuracy(row: SummaryRow) -> float:
    """Return the accuracy that the choice goes by, 0–1; -1 where none was measured."""
    return next((v for key in _LEVELS if (v := getattr(row, key)) is not None), -1.0)


def pareto(report: Report) -> list[SummaryRow]:
    """Return the files that no other beats: none is as accurate, as fast (p50) and as small, and better in one."""
    points = [
        (
            row,
            (
                -accuracy(row),
                report.time(row).p50_ms,
                math.inf if row.size_mb is None else row.size_mb,
            ),
        )
        for row in report.exported
    ]

    def is_beaten(point: tuple[float, ...]) -> bool:
        return any(
            other != point and all(a <= b for a, b in zip(other, point, strict=True))
            for _, other in points
        )

    return [row for row, point in points if not is_beaten(point)]


def recommendation_items(report: Report) -> list[Text | Table]:
    """Return the sentence and the table of all exported files: the one to ship, the Pareto front, the others."""
    found = recommend(report)
    if found is None:
        return [Text("nothing to ship: no exported file was measured.", "Ship", console=True)]
    name = report.label(found.file)
    if found.passes:
        text = Text(f"{name}, because {found.because}.", "Ship this one", "good", console=True)
    else:
        text = Text(f"none: {found.because} ({name}).", "Ship", "bad", console=True)
    return [text, _table(report, found)]


def _table(report: Report, found: Recommendation) -> Table:
    front = pareto(report)
    order = sorted(
        report.exported,
        key=lambda row: (row is not found.file, row not in front, report.time(row).p50_ms),
    )
    several = len({row.device for row in report.latency if row.who in {r.who for r in order}}) > 1
    cells: list[Cells] = [
        {"file": report.label(row), "Pareto": "yes" if row in front else ""}
        | shown(row, "id ood_avg adapted_avg")
        | shown(report.time(row), "p50_ms p90_ms")
        | shown(row, "size_mb")
        | ({"device": report.time(row).device} if several else {})
        | ({"gates": _outcome(_failed(report, row))} if report.gates else {})
        for row in order
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
    shown = (*(items if files else items[:1]), *notes)
    print_document(
        Document("recommendation", "Which file to ship", "", (Section("choice", "", shown),))
    )


def check_recommendation(report: Report) -> None:
    """Check that a file passes every gate.

    Raises:
        GateFailed: none does; the message names the nearest.
    """
    found = recommend(report)
    if found is None or found.passes:
        return
    missed = "; ".join(map(_missed, _failed(report, found.file)))
    raise GateFailed(
        f"No file meets the budget. The nearest is {report.label(found.file)}: {missed}.",
        "Raise a limit, train a smaller student, or allow INT8 fewer layers: --max-drop-ood.",
    )


def _failed(report: Report, row: SummaryRow) -> list[GateRow]:
    return [
        gate for gate in report.gates if not gate.passed and (gate.run, gate.subject) == row.who
    ]


def _excess(gate: GateRow) -> float:
    """Return how far the value is beyond the limit, relative to the limit; infinite where there is no value."""
    if gate.value is None:
        return math.inf
    return abs(gate.value - gate.limit) / (abs(gate.limit) or 1.0)


def _missed(gate: GateRow) -> str:
    value = gate.reason if gate.value is None else f"{gate.value:.4g}"
    return f"{gate.metric} is {value}, not {gate.operator} {gate.limit:g}"


def _outcome(failed: list[GateRow]) -> Cell:
    if not failed:
        return Cell("passed", "good")
    return Cell(f"missed: {', '.join(gate.metric for gate in failed)}", "bad")


def _level(row: SummaryRow) -> str:
    key = next((key for key in _LEVELS if getattr(row, key) is not None), None)
    return (
        f"{_LEVELS[key]} ({percent(accuracy(row))} %)" if key else "file (no accuracy was measured)"
    )
