"""A report as a document: the answers, the gates, the tables and charts, and where the numbers come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from edgekd.benchmark.report import charts, provenance, tables
from edgekd.benchmark.report.answers import answers, findings, verdict
from edgekd.benchmark.report.charts import NARROW, WIDE, Point
from edgekd.benchmark.report.failures import Failure, failure_items
from edgekd.benchmark.report.metric import ms, percent
from edgekd.benchmark.report.recommend import recommendation_items
from edgekd.benchmark.report.rows import AccuracyRow, SummaryRow
from edgekd.benchmark.report.schema import Report
from edgekd.benchmark.report.sections import Document, Figure, Item, Section, Text
from edgekd.benchmark.report.storage import RawResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

MAX_SUITES = 24
"""Bars show at most so many suites, those with the lowest accuracy."""
_OWN_TABLES = ("corruption", "cue-conflict", "vocabulary")
_POINTS = (
    "Hollow: in domain. Filled: mean over the unseen domains. Horizontal line: 95 % interval of p50. Dashed: files "
    "that no "
    "other beats in both. Square: teacher, diamond: torch student, circle: exported file; pale points were measured as "
    "background only."
)


def document(
    report: Report,
    raw: RawResults | None = None,
    failures: Sequence[Failure] = (),
    thumbnails: Mapping[tuple[str, str, str], str] | None = None,
) -> Document:
    """Return the document of a report.

    Args:
        raw: the arrays of the report; without them there are no charts of single samples.
        failures: from `failures.failures`.
        thumbnails: pictures of the errors; those that are missing are described in words.
    """
    state, _ = verdict(report)
    errors = (item for one in failures for item in failure_items(one, dict(thumbnails or {})))
    sections = [
        Section("answers", "Answers", tuple(answers(report)), tone=state),
        Section("gates", "Gates", tuple(_gates(report))),
        Section("choice", "Which file to ship", _choice(report)),
        Section("results", "Results", tuple(_results(report))),
        Section("files", "Each file", tuple(findings(report))),
        Section("suites", "Suite by suite", tuple(suite_items(report))),
        Section("failures", "Where it fails", tuple(errors)),
        Section("calibration", "Calibration", tuple(_calibration(report, raw))),
        Section("latency", "Latency", tuple(_latency(report, raw))),
        Section("provenance", "What was measured, and where", tuple(provenance.origin(report))),
        Section("method", "How each number is measured", tuple(provenance.method(report))),
    ]
    return Document(
        "benchmark",
        f"Benchmark of {', '.join(report.runs)}",
        f"{report.created[:16].replace('T', ' ')} UTC · {provenance.machine_line(report)}",
        tuple(section for section in sections if section.items),
        badge=provenance.QUICK_MARK if report.quick else "",
    )


def colours(rows: Sequence[SummaryRow], first: int = 0) -> list[str]:
    """Return a palette key for each subject: one for all teachers, the others in turn."""
    numbers = iter(range(first, first + len(rows)))
    return ["ct" if row.kind == "teacher" else f"c{next(numbers) % charts.COLOURS}" for row in rows]


def chart(
    title: str,
    description: str,
    make: Callable[[int], MatplotlibFigure],
    *,
    caption: str = "",
    widths: tuple[int, ...] = (WIDE, NARROW),
    heading: str = "",
    legend: Iterable[tuple[str, str]] = (),
) -> Figure:
    """Return a figure that `make` draws for each width when a page is rendered; one width stands beside others."""

    def draw(key: str) -> list[str]:
        return [charts.svg(make(width), f"{key}-{width}", title, description) for width in widths]

    names = tuple(dict.fromkeys(legend))
    return Figure(heading, description, draw, caption, len(widths) == 1, names)


def _gates(report: Report) -> Iterator[Item]:
    state, headline = verdict(report)
    yield Text(f"{headline}.", tone={"passed": "good", "failed": "bad"}.get(state, ""))
    if report.gates:
        yield tables.gates(report.gates)
    else:
        yield Text(
            'The numbers are not judged. A gate such as --gate "p90_ms<=20" or --gate "ood_avg_drop<=1.5" would '
            "judge them.",
            tone="quiet",
        )


def _choice(report: Report) -> tuple[Item, ...]:
    # The console has it at the very end.
    return tuple(replace(item, console=False) for item in recommendation_items(report))


def points_of(report: Report) -> list[Point]:
    """Return the subjects of a report as points of a chart."""
    rows = report.listed
    return [
        Point(report.label(row), colour, row, report.time(row))
        for row, colour in zip(rows, colours(rows), strict=True)
    ]


def scatter(points: Sequence[Point]) -> Figure:
    """Return the chart of accuracy against latency and size."""
    told = "; ".join(
        f"{p.name}: {' and '.join(f'{level:.1f} %' for level in p.levels)} at {ms(p.time.p50_ms)} ms"
        for p in points
        if p.levels
    )
    title = "Accuracy against latency and size"
    return chart(
        title,
        told,
        lambda width: charts.accuracy_figure(points, width),
        caption=_POINTS,
        heading=title,
        legend=((point.name, point.colour) for point in points),
    )


def _results(report: Report) -> Iterator[Item]:
    yield tables.results(report)
    about = f"{provenance.images(report)} {provenance.latency_rule(report)}"
    yield Text(f"{about} Brackets: 95 % intervals.", tone="quiet")
    for text in provenance.remarks(report):
        yield Text(text, tone="quiet")
    for text in report.notes:
        yield Text(f"note: {text}", tone="note", console=True)
    if any(tables.mark(row) for row in report.latency):
        yield Text("†: measured briefly as background, not comparable with a file.", tone="quiet")
    points = points_of(report)
    if any(point.levels for point in points):
        yield scatter(points)
    yield from tables.changes(report)


def bars(rows: Sequence[tuple[str, str, AccuracyRow]], suites: Sequence[str]) -> Figure:
    """Return the bars of every subject on every suite."""
    title = "Top-1 on every suite"
    told = "; ".join(f"{name} on {row.suite}: {percent(row.top1)} %" for name, _, row in rows)

    caption = "Line: Wilson 95 % interval."
    return chart(
        title,
        told,
        lambda width: charts.bars_figure(suites, rows, width),
        caption=caption,
        heading=title,
        legend=((name, colour) for name, colour, _ in rows),
    )


def suite_items(report: Report) -> Iterator[Item]:
    """Yield bars and tables of all suites."""
    apart = report.families(*_OWN_TABLES)
    rows = [row for row in tables.plain(report) if row.suite not in apart]
    names = list(dict.fromkeys(row.suite for row in rows))
    lowest = sorted(names, key=lambda name: min(row.top1 for row in rows if row.suite == name))
    chosen = {*lowest[:MAX_SUITES], "id"} if len(names) > MAX_SUITES else set(names)
    of = {point.summary.who: point for point in points_of(report)}
    drawn = [(of[row.who].name, of[row.who].colour, row) for row in rows if row.suite in chosen]
    if drawn:
        yield bars(drawn, [name for name in names if name in chosen])
    if left := len(set(names) - chosen):
        yield Text(f"{left} suites with higher accuracies are in the tables only.", tone="quiet")
    if (matrix := tables.by_suite(report)) is not None:
        yield matrix
    yield tables.every_suite(report)
    yield from tables.corruptions(report)
    yield from tables.suite_extras(report)


def _calibration(report: Report, raw: RawResults | None) -> Iterator[Item]:
    for point in points_of(report) if raw else ():
        assert raw is not None
        row = point.summary
        own = [one.suite for one in tables.plain(report) if one.who == row.who]
        outside = [name for name in own if name.startswith("ood:")]
        for names, where in ((["id"] if "id" in own else [], "ID"), (outside, "OOD")):
            if names:
                found = _pooled(raw, row, names)
                pooled = f", {len(names)} suites pooled" if len(names) > 1 else ""
                caption = f"{point.name}: {where}, ECE {found.ece:.3f}{pooled}"
                draw = partial(_reliability, found, point.colour)
                yield chart(caption, caption, draw, caption=caption, widths=(236,))
    if raw:
        yield Text(
            "Bars: accuracy of the images with that confidence. Hatched: the gap between accuracy and mean "
            "confidence, which ECE "
            "weighs by images. On the diagonal, confidence equals accuracy.",
            tone="quiet",
        )
    yield from tables.calibration(report)


def _reliability(found: charts.Reliability, colour: str, width: int) -> MatplotlibFigure:
    return charts.reliability_figure(found, colour)


def _pooled(raw: RawResults, row: SummaryRow, suites: Sequence[str]) -> charts.Reliability:
    """Return the reliability over all images of several suites, whose classes may differ."""
    logits = [raw.logits(row.run, row.subject, suite) for suite in suites]
    widest = max(part.shape[1] for part in logits)
    padded = [
        np.pad(part, ((0, 0), (0, widest - part.shape[1])), constant_values=-np.inf)
        for part in logits
    ]
    labels = np.concatenate([raw.labels(row.run, suite) for suite in suites])
    return charts.reliability(np.concatenate(padded), labels)


def latency_charts(point: Point, parts: charts.Samples) -> Iterator[Figure]:
    """Yield the histogram and the order of all latency samples of a subject."""
    row, name = point.time, f"{point.name}{tables.mark(point.time)}"
    told = f"{name}: {row.n:,} samples, p50 {ms(row.p50_ms)} ms, p90 {ms(row.p90_ms)} ms"
    quarters = np.array_split(np.concatenate(list(parts)), 4)
    medians = ", ".join(ms(float(np.median(quarter))) for quarter in quarters if len(quarter))
    figures = {
        told: lambda _: charts.histogram_figure(parts, row, point.colour),
        f"Medians of the quarters: {medians} ms": lambda _: charts.timeline_figure(
            parts, point.colour
        ),
    }
    for caption, make in figures.items():
        yield chart(f"Latency of {name}", caption, make, caption=caption, widths=(420,))


def latency_items(
    report: Report, points: Sequence[Point], samples: Callable[[tuple[str, str]], charts.Samples]
) -> Iterator[Item]:
    """Yield charts of every sample of these points, and the tables of all latencies.

    Args:
        samples: (run, subject) → samples in ms in the order measured, one array a process.
    """
    for point in points:
        yield from latency_charts(point, samples(point.summary.who))
    if points:
        yield Text(
            "Left: how often which latency occurred; the shortest bars are drawn taller so that outliers can be seen. "
            "Right: samples in the order measured; of more than 120, lines from minimum to maximum with a point at the "
            "median.",
            tone="quiet",
        )
    yield from tables.latencies(report)


def _latency(report: Report, raw: RawResults | None) -> Iterator[Item]:
    samples = raw.samples if raw else None
    points = points_of(report) if samples else []
    yield from latency_items(report, points, lambda who: samples(*who) if samples else ())
    if not any(row.energy for row in report.latency):
        yield Text("Energy: n/a, no sensor was declared (--energy).", tone="quiet")
