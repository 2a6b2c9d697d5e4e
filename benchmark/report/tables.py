"""The tables of a report, from its rows and the definitions of their metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from edgekd.benchmark.report.metric import NONE, Metric, metrics_of, ms, percent
from edgekd.benchmark.report.rows import (
    AccuracyRow,
    Calibration,
    CorruptionRow,
    CueConflictRow,
    DetectionRow,
    Difference,
    EnergyRow,
    LatencyRow,
    Row,
    SummaryRow,
    ThroughputRow,
    UnknownRow,
    VocabularyRow,
)
from edgekd.benchmark.report.schema import Comparison, GainRow, GateRow, Report, SuiteComparison
from edgekd.benchmark.report.sections import Cell, Column, Table, columns, table
from edgekd.benchmark.speed import ratio_text

CAUSES = {"distillation": "distillation", "unlabelled": "unlabelled images", "run": "another run"}
FEW_SUITES = 3
"""More OOD suites than these are rows of a table of their own, not columns of the main table."""
_P = columns(Difference, "mcnemar_p")[0]


def mark(row: LatencyRow) -> str:
    """Return † for a latency that was measured as background only."""
    return "†" if row.protocol == "context" else ""


def subject_of(report: Report) -> Column:
    """Return the column of the subjects' names."""
    return "subject", lambda row: report.label(row)


def gates(rows: Sequence[GateRow]) -> Table:
    """Every gate with its outcome first."""

    def measured(row: GateRow) -> str | Cell:
        return (
            Cell(f"not evaluated: {row.reason}", "why") if row.value is None else f"{row.value:.4g}"
        )

    layout: list[Column] = [
        (
            "outcome",
            lambda row: Cell("✓ passed", "good") if row.passed else Cell("✗ FAILED", "bad"),
        ),
        ("gate", lambda row: row.metric),
        ("file", lambda row: f"{row.run}/{row.subject}" if row.run else "no file"),
        ("measured", measured),
        ("limit", lambda row: f"{row.operator} {row.limit:g}"),
    ]
    return table("Gates", rows, layout, heads=3, console=True)


def results(report: Report, *, timed: bool = True) -> Table:
    """The main table: a row for each subject, the columns that decide first, with or without latencies."""

    def time(key: str) -> list[Column]:
        metric: Metric = metrics_of(LatencyRow)[key]
        show = lambda row: metric.shown(found := report.time(row), key) + mark(found)  # noqa: E731
        return [(metric.heading, show)] if timed else []

    layout = [
        subject_of(report),
        *columns(SummaryRow, "id ood_avg adapted_avg"),
        *time("p90_ms"),
        *columns(SummaryRow, "size_mb"),
        *(_domains(report) if len(_outside(report)) <= FEW_SUITES else ()),
        *columns(SummaryRow, "ood_worst gap retention ece_id ece_ood"),
        *time("p50_ms"),
        *columns(SummaryRow, "parameters macs"),
    ]
    return table("Accuracy, latency and size", report.listed, layout, lead=6, console=True)


def _outside(report: Report) -> list[str]:
    """Return the suites besides `id` that a summary has top-1 of."""
    names = (
        name for row in report.summary for name in [*(f"ood:{d}" for d in row.ood), *row.apart]
    )
    return list(dict.fromkeys(names))


def _domains(report: Report) -> Iterator[Column]:
    def column(suite: str) -> Column:
        of = suite.removeprefix("ood:")
        return f"{suite} %", lambda row: percent((row.ood if of != suite else row.apart).get(of))

    return map(column, _outside(report))


def by_suite(report: Report) -> Table | None:
    """Top-1 with suites as rows and subjects as columns; None where the main table has them as columns."""
    if len(_outside(report)) <= FEW_SUITES:
        return None
    top1 = {(row.who, row.suite): row for row in plain(report)}
    suites = list(dict.fromkeys((row.suite, row.n) for row in plain(report)))

    def of(who: tuple[str, str]) -> Callable[[Any], str]:
        return lambda suite: percent(row.top1) if (row := top1.get((who, suite[0]))) else NONE

    layout: list[Column] = [
        ("suite", lambda suite: suite[0]),
        ("images", lambda suite: f"{suite[1]:,}"),
    ]
    layout += [(report.label(row), of(row.who)) for row in report.listed]
    return table("Top-1 % by suite", suites, layout, console=True)


def plain(report: Report) -> list[AccuracyRow]:
    """Return the accuracy rows without the cells of the corruptions and without repeated teachers."""
    cells = report.families("corruption")
    return [row for row in report.shown(report.accuracy) if row.suite not in cells]


def every_suite(report: Report) -> Table:
    """All accuracy and calibration numbers."""
    first = columns(AccuracyRow, "suite n top1 macro ece")
    worst: Column = (
        "worst class %",
        lambda row: f"{row.worst_class} {percent(row.worst_class_recall)}",
    )
    named = ("n", "top1", "macro", "ece", "worst_class_recall")
    others = [key for key in metrics_of(AccuracyRow) if key not in named]
    layout = [subject_of(report), *first, worst, *columns(AccuracyRow, " ".join(others))]
    folded = by_suite(report) is not None
    return table(
        "Every subject on every suite", plain(report), layout, lead=6, heads=2, folded=folded
    )


def costs(report: Report) -> Table | None:
    """What the export cost; None without exported files and their torch student."""

    def p(key: str) -> Column:
        return "p", lambda row: NONE if getattr(row, key) is None else _P[1](getattr(row, key))

    rows = [row for row in report.exported if row.quant_cost_id or row.quant_cost_ood]
    layout = [
        subject_of(report),
        *columns(SummaryRow, "quant_cost_id"),
        p("quant_cost_id"),
        *columns(SummaryRow, "quant_cost_ood"),
        p("quant_cost_ood"),
        *columns(SummaryRow, "agreement_id agreement_ood"),
    ]
    note = "Torch student minus file on the same images; positive is a loss."
    return table("Export cost", rows, layout, note=note) if rows else None


def gains(report: Report) -> Table | None:
    """Accuracy of each run minus that of its baseline; None for one run."""
    layout = [
        subject_of(report),
        ("against", lambda row: row.base_run),
        ("difference", lambda row: CAUSES[row.cause]),
        ("on", lambda row: row.where.upper() if row.where != "adapted" else row.where),
        *columns(GainRow, "n gain"),
        ("p", lambda row: _P[1](row.gain)),
    ]
    note = "The same kind of model of both runs on the same images; positive is a gain."
    return (
        table("Gain over the other run", report.gains, layout, heads=4, note=note)
        if report.gains
        else None
    )


def comparison(pair: Comparison) -> Table:
    """Two files measured in turns."""
    note = (
        f"Latency A / B: {ratio_text(pair)} (p50 {ms(pair.p50_a_ms)} against {ms(pair.p50_b_ms)} ms, from {pair.turns} "
        f"pairs of alternating blocks in {pair.processes} process{'' if pair.processes == 1 else 'es'})."
    )
    layout = columns(SuiteComparison, "suite n a b value mcnemar_p agreement")
    title = f"A {pair.a_run}/{pair.a} against B {pair.b_run}/{pair.b}"
    return table(title, pair.accuracy, layout, note=note, console=True)


def corruptions(report: Report) -> Iterator[Table]:
    """Robust accuracy, mCE and severities; then every cell."""
    if not report.corruptions:
        return

    def mean(values: Sequence[float]) -> str:
        return percent(sum(values) / len(values))

    def severity(level: int) -> Column:
        return str(level + 1), lambda row: mean([cells[level] for cells in row.top1.values()])

    layout = [
        subject_of(report),
        *columns(CorruptionRow, "n robust_accuracy mce"),
        *(severity(level) for level in range(5)),
    ]
    whose = dict.fromkeys(
        row.mce_denominators for row in report.corruptions if row.mce_denominators
    )
    note = "Columns 1–5: mean top-1 % over the 15 corruptions at that severity."
    note += "".join(f" Denominators of mCE: {text}." for text in whose)
    rows = report.shown(report.corruptions)
    yield table("Corruptions", rows, layout, note=note, console=True)
    cells = [(row, name, values) for row in rows for name, values in row.top1.items()]

    def cell(level: int) -> Column:
        return str(level + 1), lambda cell: percent(cell[2][level])

    layout = [
        ("subject", lambda cell: report.label(cell[0])),
        ("corruption", lambda cell: cell[1].replace("_", " ")),
        *map(cell, range(5)),
        ("mean", lambda cell: mean(cell[2])),
    ]
    yield table("Every corruption at every severity, top-1 %", cells, layout, heads=2, folded=True)


def _or_reason(layout: list[Column], key: str) -> list[Column]:
    """Return the columns with the row's `reason` in place of a missing number in column `key`."""

    def cell(heading: str, show: Callable[[Any], str | Cell]) -> Column:
        if heading != key:
            return heading, show
        return heading, lambda row: Cell(f"n/a: {row.reason}", "why") if row.reason else show(row)

    return [cell(*column) for column in layout]


def suite_extras(report: Report) -> Iterator[Table]:
    """Changed prompts, unknown images, a data set's own metrics, shape against texture."""
    subject = subject_of(report)
    if report.vocabularies:
        metrics = columns(VocabularyRow, "suite top1 base_top1 to_added added n")
        loss: Column = (
            "loss, points",
            lambda row: (
                NONE if row.top1 is None else f"{100 * (row.base_top1 - row.top1) + 0.0:+.1f}"
            ),
        )
        layout = [subject, *metrics[:3], loss, *metrics[3:]]
        note = "The same images with other prompts or added names. Loss: top-1 with the run's own prompts minus this."
        yield table(
            "Other prompts",
            report.vocabularies,
            _or_reason(layout, metrics[1][0]),
            heads=2,
            note=note,
        )
    if report.unknowns:
        yield _unknowns(report)
    if report.own_metrics:
        values = [(row, *pair) for row in report.own_metrics for pair in row.metrics.items()]
        layout = [
            ("subject", lambda one: report.label(one[0])),
            ("suite", lambda one: one[0].suite),
            ("metric", lambda one: one[1]),
            ("value", lambda one: f"{one[2]:.4g}"),
            ("computed by", lambda one: one[0].source),
        ]
        yield table("The data set's own metrics", values, layout, heads=3)
    if report.cue_conflicts:
        layout = [subject, *columns(CueConflictRow, "suite n shape texture shape_bias")]
        yield table(
            "Shape against texture",
            report.shown(report.cue_conflicts),
            layout,
            heads=2,
            console=True,
        )


def _unknowns(report: Report) -> Table:
    rows = report.shown(report.unknowns)
    items = [
        (row, score, found)
        for suite in dict.fromkeys(row.suite for row in rows)
        for score in ("softmax", "logit")
        for row in rows
        if row.suite == suite
        for found in (row.msp if score == "softmax" else row.mls,)
    ]
    layout: list[Column] = [
        ("subject", lambda item: report.label(item[0])),
        ("suite", lambda item: item[0].suite),
        ("score", lambda item: item[1]),
        *columns(DetectionRow, "*", lambda item: item[2]),
        *columns(UnknownRow, "confidence confidence_inside", lambda item: item[0]),
    ]
    note = "No class is right on these images. Scores: largest softmax probability, largest logit."
    return table("Unknown images", items, layout, lead=6, heads=3, note=note, console=True)


def calibration(report: Report) -> Iterator[Table]:
    """Temperatures, and calibration before and after them; nothing without ID validation images."""
    if all(row.temperature is None for row in report.listed):
        return
    rows = [row for row in report.listed if row.temperature is not None]
    layout = columns(SummaryRow, "temperature ece_id ece_id_scaled ece_ood ece_ood_scaled")
    note = "One temperature for each subject, fitted on ID validation images only."
    yield table(
        "Calibration before and after one temperature",
        rows,
        [subject_of(report), *layout],
        note=note,
    )
    metrics = metrics_of(Calibration)

    def pair(key: str) -> Column:
        show = metrics[key].show
        return metrics[
            key
        ].name, lambda row: f"{show(getattr(row, key))} → {show(getattr(row.scaled, key))}"

    suites = [row for row in plain(report) if row.scaled]
    layout = [subject_of(report), *columns(AccuracyRow, "suite"), *map(pair, metrics)]
    yield table("Calibration before → after on every suite", suites, layout, heads=2, folded=True)


def latencies(report: Report) -> Iterator[Table]:
    """Every latency, throughput, energy."""

    def name(row: Row) -> str:
        return report.label(row) + mark(row) if isinstance(row, LatencyRow) else report.label(row)

    layout: list[Column] = [("subject", name), *columns(
        LatencyRow, "p50_ms p90_ms end_to_end_p50_ms peak_rss_mb p99_ms mean_ms cv first_ms load_ms prepare_p50_ms "
        "end_to_end_p90_ms * threads provider device")]  # fmt: skip
    yield table("Latency of one image", report.shown(report.latency), layout, lead=5)
    if report.throughput:
        metrics = columns(ThroughputRow, "batch threads images_per_s calls device")
        layout = _or_reason([subject_of(report), *metrics], metrics[2][0])
        note = (
            "Whole batches one after the other, each line in a process of its own: not a latency."
        )
        yield table("Throughput", report.throughput, layout, note=note)
    metered = [row for row in report.latency if row.energy]
    if metered:
        layout = [
            subject_of(report),
            *columns(EnergyRow, "* sensor covers", lambda row: row.energy),
        ]
        yield table("Energy of one image, over the latency blocks", metered, layout)
