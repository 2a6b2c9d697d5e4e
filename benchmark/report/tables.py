"""The tables of a report, from its rows and the definitions of their metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from edgekd.benchmark.report.elements import Cell, Cells, Table, shown, table
from edgekd.benchmark.results.metric import metrics_of, ms, percent, points
from edgekd.benchmark.results.rows import AccuracyRow, Calibration, LatencyRow, Row, SummaryRow
from edgekd.benchmark.results.schema import Comparison, GateRow, Report

CAUSES = {"distillation": "distillation", "unlabelled": "unlabelled images", "run": "another run"}
MARKED = "†: measured briefly as background, not comparable with a file."
"""Explanation of `mark` in the report."""
_MOST_COLUMNS = 3
"""Maximum number of OOD suites in the main table; more are shown in a separate table."""


def mark(row: LatencyRow) -> str:
    """Return † for a latency that was only measured as background."""
    return "†" if row.protocol == "context" else ""


def by_subject(report: Report, rows: Iterable[Row], keys: str) -> list[Cells]:
    """Return the names of the subjects and the fields `keys` of rows."""
    return [{"subject": report.label(row)} | shown(row, keys) for row in rows]


def or_reason(text: str, reason: str | None, what: str = "n/a") -> str:
    """Return `text`, or the reason for a missing value."""
    return Cell(f"{what}: {reason}", "why") if reason else text


def gates(rows: Sequence[GateRow]) -> Table:
    """Return the table of gates, with the outcome in the first column."""
    cells: list[Cells] = [
        {
            "outcome": Cell("✓ passed", "good") if row.passed else Cell("✗ FAILED", "bad"),
            "gate": row.metric,
            "measured": or_reason(f"{row.value or 0:.4g}", row.reason, "not evaluated"),
            "limit": f"{row.operator} {row.limit:g}",
            "file": f"{row.run}/{row.subject}" if row.run else "no file",
        }
        for row in rows
    ]
    return table("Gates", cells, heads=2, console=True)


def results(report: Report, *, timed: bool = True) -> Table:
    """Return the main table with a row per subject and the most important columns first; `timed` adds latencies."""

    def time(row: SummaryRow, key: str) -> Cells:
        found = report.time(row)
        return {k: f"{v}{mark(found)}" for k, v in shown(found, key).items()} if timed else {}

    tops = {
        row.who: {f"ood:{d}": v for d, v in row.ood.items()} | row.apart for row in report.listed
    }
    suites = _outside(report) if len(_outside(report)) <= _MOST_COLUMNS else []
    cells = [
        {"subject": report.label(row)}
        | shown(row, "id ood_avg adapted_avg")
        | time(row, "p90_ms")
        | shown(row, "size_mb")
        | {f"{suite} %": percent(tops[row.who].get(suite)) for suite in suites}
        | shown(row, "ood_worst gap retention ece_id ece_ood")
        | time(row, "p50_ms")
        | shown(row, "parameters macs")
        for row in report.listed
    ]
    title = "Accuracy, latency and size" if timed else "Accuracy and size"
    return table(title, cells, lead=6, console=True)


def _outside(report: Report) -> list[str]:
    """Return the suites besides `id` with top-1 in a summary."""
    names = (n for row in report.summary for n in [*(f"ood:{d}" for d in row.ood), *row.apart])
    return list(dict.fromkeys(names))


def by_suite(report: Report) -> Table:
    """Return top-1 with suites as rows and subjects as columns; empty if the main table has a column per suite."""
    rows: dict[tuple[str, int], Cells] = {}
    for row in plain(report) if len(_outside(report)) > _MOST_COLUMNS else ():
        cells = rows.setdefault((row.suite, row.n), {"suite": row.suite, "images": f"{row.n:,}"})
        cells[report.label(row)] = percent(row.top1)
    return table("Top-1 % by suite", rows.values(), console=True)


def plain(report: Report) -> list[AccuracyRow]:
    """Return the accuracy rows without the cells of the corruptions and without repeated teachers."""
    cells = report.families("corruption")
    return [row for row in report.shown(report.accuracy) if row.suite not in cells]


def every_suite(report: Report) -> Table:
    """Return all accuracy and calibration numbers."""
    cells = [
        {"subject": report.label(row)}
        | shown(row, "suite n top1 macro ece")
        | {"worst": row.worst_class}
        | shown(row, "*")
        for row in plain(report)
    ]
    folded = bool(by_suite(report).rows)
    return table("Every subject on every suite", cells, lead=6, heads=2, folded=folded)


def changes(report: Report) -> Iterator[Table]:
    """Yield the gains of runs over their baselines, the costs of the export, and comparisons of two files."""
    gains = [
        {"subject": report.label(row), "against": row.base_run, "difference": CAUSES[row.cause]}
        | {"on": row.where.upper() if row.where != "adapted" else row.where}
        | shown(row, "n gain")
        for row in report.gains
    ]
    note = "Both runs' models of the same kind on the same images. Positive: gain."
    yield table("Gain over the other run", gains, heads=4, note=note)
    costly = [row for row in report.exported if row.quant_cost_id or row.quant_cost_ood]
    keys = "quant_cost_id quant_cost_ood agreement_id agreement_ood"
    note = "Torch student minus file on the same images. Positive: loss."
    yield table("Export cost", by_subject(report, costly, keys), note=note)
    yield from map(comparison, report.comparisons)


def comparison(pair: Comparison) -> Table:
    """Return the comparison of two files that were measured in alternating blocks."""
    low, high = pair.p50_ratio_ci95
    ratio = f"{pair.p50_ratio:.3f} [{low:.3f}, {high:.3f}]"
    if pair.withheld is not None:
        ratio = f"withheld, since {pair.withheld}"
    note = (
        f"Latency A / B: {ratio} (p50 {ms(pair.p50_a_ms)} against {ms(pair.p50_b_ms)} ms, from {pair.turns} "
        f"pairs of alternating blocks in {pair.processes} process{'' if pair.processes == 1 else 'es'})."
    )
    title = f"A {pair.a_run}/{pair.a} against B {pair.b_run}/{pair.b}"
    return table(title, (shown(row, "suite *") for row in pair.accuracy), note=note, console=True)


def corruptions(report: Report) -> Iterator[Table]:
    """Yield robust accuracy, mCE and accuracy by severity, then every corruption at every severity."""

    def mean(values: Sequence[float]) -> str:
        return percent(sum(values) / len(values))

    rows = report.shown(report.corruptions)
    cells = [
        {"subject": report.label(row)}
        | shown(row, "n robust_accuracy mce")
        | {str(n + 1): mean([values[n] for values in row.top1.values()]) for n in range(5)}
        for row in rows
    ]
    whose = dict.fromkeys(row.mce_denominators for row in rows if row.mce_denominators)
    note = "Columns 1–5: mean top-1 % over the 15 corruptions at that severity."
    note += "".join(f" Denominators of mCE: {text}." for text in whose)
    yield table("Corruptions", cells, note=note, console=True)
    every = [
        {"subject": report.label(row), "corruption": name.replace("_", " ")}
        | {str(n + 1): percent(values[n]) for n in range(5)}
        | {"mean": mean(values)}
        for row in rows
        for name, values in row.top1.items()
    ]
    yield table("Every corruption at every severity, top-1 %", every, heads=2, folded=True)


def suite_extras(report: Report) -> Iterator[Table]:
    """Yield tables of prompt variants, unknown images, a data set's own metrics, and shape bias."""
    cells: list[Cells] = []
    for row in report.vocabularies:
        own = shown(row, "suite top1 base_top1")
        [top1] = shown(row, "top1")
        has_loss = row.top1 is not None and row.base_top1 is not None
        loss = row.base_top1 - row.top1 if has_loss else None  # type: ignore[operator]
        own |= {top1: or_reason(own[top1], row.reason), "loss points ↓": points(loss)}
        cells.append({"subject": report.label(row)} | own | shown(row, "to_added added n"))
    note = "The same images with other prompts or added names. Loss: top-1 with the run's own prompts minus this top-1."
    yield table("Other prompts", cells, heads=2, note=note)
    unknown = report.shown(report.unknowns)
    cells = [
        {"subject": report.label(row), "suite": row.suite, "score": score}
        | shown(row.msp if score == "softmax" else row.mls, "*")
        | (shown(row, "confidence confidence_inside") if score == "softmax" else {})
        for suite in dict.fromkeys(row.suite for row in unknown)
        for score in ("softmax", "logit")
        for row in unknown
        if row.suite == suite
    ]
    note = "Images of none of the classes. Scores: largest softmax probability, largest logit."
    yield table("Unknown images", cells, lead=6, heads=3, note=note, console=True)
    cells = [
        {"subject": report.label(row), "suite": row.suite, "metric": name, "value": f"{value:.4g}"}
        | {"computed by": row.source}
        for row in report.own_metrics
        for name, value in row.metrics.items()
    ]
    yield table("The data set's own metrics", cells, heads=3)
    cues = report.shown(report.cue_conflicts)
    cells = by_subject(report, cues, "suite n shape texture shape_bias")
    yield table("Shape against texture", cells, heads=2, console=True)


def calibration(report: Report) -> Iterator[Table]:
    """Yield tables of temperatures, and of calibration before and after temperature scaling."""
    fitted = [row for row in report.listed if row.temperature is not None]
    keys = "temperature ece_id ece_id_scaled ece_ood ece_ood_scaled"
    note = "One temperature per subject, fitted only on ID validation images."
    title = "Calibration before and after temperature scaling"
    yield table(title, by_subject(report, fitted, keys), note=note)
    every = [
        {"subject": report.label(row), "suite": row.suite}
        | {
            one.name: f"{one.shown(row, key)} → {one.shown(row.scaled, key)}"
            for key, one in metrics_of(Calibration).items()
        }
        for row in plain(report)
        if row.scaled
    ]
    yield table("Calibration before → after on every suite", every, heads=2, folded=True)


def latencies(report: Report) -> Iterator[Table]:
    """Yield tables of latency, throughput and energy."""
    keys = (
        "p50_ms p90_ms end_to_end_p50_ms peak_rss_mb p99_ms mean_ms cv first_ms load_ms prepare_p50_ms "
        "end_to_end_p90_ms * threads provider device"
    )
    rows = report.shown(report.latency)
    cells = [{"subject": f"{report.label(row)}{mark(row)}"} | shown(row, keys) for row in rows]
    yield table("Latency of one image", cells, lead=5)
    cells = []
    for rate in report.throughput:
        [(name, value)] = shown(rate, "images_per_s").items()
        own = {"subject": report.label(rate)} | shown(rate, "batch threads")
        own[name] = or_reason(value, rate.reason)
        cells.append(own | shown(rate, "calls device"))
    note = "Consecutive full batches, in a separate process for each row. These are not latencies."
    yield table("Throughput", cells, note=note)
    metered = [row for row in report.latency if row.energy]
    cells = [
        {"subject": report.label(row)} | shown(row.energy, "* sensor covers") for row in metered
    ]
    yield table("Energy per image, over the latency blocks", cells)
