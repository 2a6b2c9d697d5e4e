"""Build the document of a report: summary, gates, tables, charts, and provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from edgekd.benchmark.evaluate.metrics import Reliability, reliability
from edgekd.benchmark.report import charts, provenance, tables
from edgekd.benchmark.report.charts import Point
from edgekd.benchmark.report.elements import Document, Figure, Item, Text, section
from edgekd.benchmark.report.failures import failure_items
from edgekd.benchmark.report.recommend import files_table, verdict
from edgekd.benchmark.report.summary import answers
from edgekd.benchmark.results.metric import ms, percent
from edgekd.benchmark.results.rows import SummaryRow
from edgekd.benchmark.results.schema import Report
from edgekd.benchmark.results.storage import RawResults
from edgekd.benchmark.subjects import Suite

_MOST_SUITES = 24
"""Maximum number of suites in the bar chart; it shows those with the lowest accuracy."""
_OWN_TABLES = ("corruption", "cue-conflict", "vocabulary")
_POINTS = (
    "Hollow: in domain. Filled: mean over the unseen domains, else over the adapted ones. Horizontal line: 95 % "
    "interval of p50. Dashed: Pareto front of the files. Square: teacher, diamond: torch student, circle: "
    "exported file. Pale: measured briefly as background. Arrow: value of a point outside the axis."
)
_SAMPLES = (
    "Left: histogram of latencies; the shortest bars are drawn taller to make outliers visible. Right: samples in "
    "measured order; with more than 120 samples, lines from minimum to maximum with a point at the median."
)
_RELIABILITY = (
    "Bars: accuracy of the images with that confidence. Hatched: gap between accuracy and mean confidence; ECE is its "
    "mean over images. Diagonal: confidence equals accuracy."
)


def document(
    report: Report, raw: RawResults | None = None, examples: Sequence[Suite] = ()
) -> Document:
    """Return the document of a report.

    Args:
        raw: the arrays of the report; without them there are no charts of single samples and no errors.
        examples: suites whose images may be shown as examples of errors.
    """
    points = points_of(report) if raw else []
    latency = [*latency_items(report, points, raw.samples if raw else None)]
    if not any(row.energy for row in report.latency):
        latency.append(Text("Energy: n/a, since no sensor was given (--energy).", tone="quiet"))
    sections = (
        section("answers", "Answers", answers(report), tone=verdict(report)[0]),
        section("gates", "Gates", _gates(report)),
        section("choice", "Which file to ship", [files_table(report)]),
        section("results", "Results", _results(report)),
        section("suites", "Suite by suite", suite_items(report)),
        section("failures", "Where it fails", failure_items(raw, examples) if raw else ()),
        section("calibration", "Calibration", _calibration(report, points, raw)),
        section("latency", "Latency", latency),
        section("provenance", "What was measured, and where", provenance.origin(report)),
        section("method", "How each number is measured", provenance.method(report)),
    )
    return Document(
        "benchmark",
        f"Benchmark of {', '.join(report.runs)}",
        f"{report.created[:16].replace('T', ' ')} UTC · {provenance.machine_line(report)}",
        tuple(one for one in sections if one.items),
        badge=provenance.QUICK_MARK if report.quick else "",
    )


def _gates(report: Report) -> Iterator[Item]:
    state, headline = verdict(report)
    yield Text(f"{headline}.", tone={"passed": "good", "failed": "bad"}.get(state, ""))
    yield tables.gates(report.gates)
    if not report.gates:
        yield Text(
            'The command fails if a metric exceeds a limit: --gate "p90_ms<=20" --gate "ood_avg_drop<=1.5".',
            tone="quiet",
        )


def points_of(report: Report) -> list[Point]:
    """Return the subjects of a report as points of a chart. All teachers share one colour."""
    numbers = iter(range(len(report.listed)))
    return [
        Point(
            report.label(row),
            "ct" if row.kind == "teacher" else f"c{next(numbers) % charts.COLOURS}",
            row,
            report.time(row),
        )
        for row in report.listed
    ]


def scatter(points: Sequence[Point]) -> Figure:
    """Return the chart of accuracy against latency and size."""
    described = "; ".join(
        f"{p.name}: {' and '.join(f'{level:.1f} %' for level in p.levels)} at {ms(p.time.p50_ms)} ms"
        for p in points
        if p.levels
    )
    legend = dict.fromkeys((f"{p.name}{tables.mark(p.time)}", p.colour) for p in points)
    draw = partial(charts.accuracy_figure, points)
    title = "Accuracy against latency and size"
    return Figure(title, described, draw, _POINTS, legend=tuple(legend))


def _results(report: Report) -> Iterator[Item]:
    yield tables.results(report)
    about = f"{provenance.images(report)} {provenance.latency_rule(report)}"
    yield Text(f"{about} Brackets: 95 % intervals.", tone="quiet")
    for text in provenance.remarks(report):
        yield Text(text, tone="quiet")
    for text in report.notes:
        yield Text(f"note: {text}", tone="note", console=True)
    if any(tables.mark(row) for row in report.latency):
        yield Text(tables.MARKED, tone="quiet")
    points = points_of(report)
    if any(point.levels for point in points):
        yield scatter(points)
    yield from tables.changes(report)


def suite_items(report: Report) -> Iterator[Item]:
    """Yield bars and tables of all suites."""
    apart = report.families(*_OWN_TABLES)
    rows = [row for row in tables.plain(report) if row.suite not in apart]
    names = list(dict.fromkeys(row.suite for row in rows))
    lowest = sorted(names, key=lambda name: min(row.top1 for row in rows if row.suite == name))
    chosen = {*lowest[:_MOST_SUITES], "id"} if len(names) > _MOST_SUITES else set(names)
    point = {point.summary.who: point for point in points_of(report)}
    drawn = [(point[r.who].name, point[r.who].colour, r) for r in rows if r.suite in chosen]
    if drawn:
        described = "; ".join(f"{name} on {r.suite}: {percent(r.top1)} %" for name, _, r in drawn)
        legend = tuple(dict.fromkeys((name, colour) for name, colour, _ in drawn))
        draw = partial(charts.bars_figure, [name for name in names if name in chosen], drawn)
        caption = "Line: Wilson 95 % interval."
        yield Figure("Top-1 on every suite", described, draw, caption, legend=legend)
    if left := len(set(names) - chosen):
        yield Text(f"The tables show {left} more suites with higher accuracies.", tone="quiet")
    yield tables.by_suite(report)
    yield tables.every_suite(report)
    yield from tables.corruptions(report)
    yield from tables.suite_extras(report)


def _calibration(report: Report, points: Sequence[Point], raw: RawResults | None) -> Iterator[Item]:
    for point in points if raw else ():
        assert raw is not None
        own = [one.suite for one in tables.plain(report) if one.who == point.summary.who]
        for where in ("id", "ood"):
            names = [name for name in own if name.partition(":")[0] == where]
            if names:
                bins = _pooled(raw, point.summary, names)
                pooled = f", {len(names)} suites pooled" if len(names) > 1 else ""
                caption = f"{point.name}: {where.upper()}, ECE {bins.ece:.3f}{pooled}"
                draw = partial(charts.reliability_figure, bins, point.colour)
                yield Figure("", caption, draw, caption, widths=(236,))
    if raw:
        yield Text(_RELIABILITY, tone="quiet")
    yield from tables.calibration(report)


def _pooled(raw: RawResults, row: SummaryRow, suites: Sequence[str]) -> Reliability:
    """Return the reliability diagram over all images of several suites, whose classes may differ."""
    logits = [raw.logits(row.run, row.subject, suite) for suite in suites]
    widest = max(part.shape[1] for part in logits)
    padded = [
        np.pad(part, ((0, 0), (0, widest - part.shape[1])), constant_values=-np.inf)
        for part in logits
    ]
    labels = np.concatenate([raw.labels(row.run, suite) for suite in suites])
    return reliability(np.concatenate(padded), labels)


def latency_items(
    report: Report,
    points: Sequence[Point],
    samples: Callable[[str, str], charts.Samples] | None,
) -> Iterator[Item]:
    """Yield charts of the latency samples of these points, and the tables of all latencies.

    Args:
        samples: (run, subject) → samples in ms in measured order, one array per process.
    """
    for point in points if samples else ():
        assert samples is not None
        parts, row = samples(*point.summary.who), point.time
        middle, tail = ms(row.p50_ms), ms(row.p90_ms)
        histogram = (
            f"{point.name}{tables.mark(row)}: {row.n:,} samples, p50 {middle} ms, p90 {tail} ms"
        )
        quarters = np.array_split(np.concatenate(list(parts)), 4)
        medians = ", ".join(ms(float(np.median(quarter))) for quarter in quarters if len(quarter))
        timeline = f"Medians of the quarters: {medians} ms"
        draw = partial(charts.histogram_figure, parts, row, point.colour)
        yield Figure("", histogram, draw, histogram, widths=(420,))
        draw = partial(charts.timeline_figure, parts, point.colour)
        yield Figure("", timeline, draw, timeline, widths=(420,))
    if points:
        yield Text(_SAMPLES, tone="quiet")
    yield from tables.latencies(report)
