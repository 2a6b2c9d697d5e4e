"""`report.html`: the whole report as one file that needs no network and no script, for light, dark, phone and paper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgekd.benchmark import page_tables
from edgekd.benchmark.chart_accuracy import pareto, suite_bars
from edgekd.benchmark.chart_calibration import reliability, reliability_drawing
from edgekd.benchmark.chart_latency import histogram, span, timeline
from edgekd.benchmark.definitions import ACCURACY, LATENCY, latency_rule, shown
from edgekd.benchmark.failures import Failure, Thumbnails
from edgekd.benchmark.kept import Kept
from edgekd.benchmark.measure.speed import ratio_text
from edgekd.benchmark.pieces import NARROW, WIDE, Figure, Look, Table, environment, look, pooled
from edgekd.benchmark.rows import Report
from edgekd.benchmark.table import QUICK_MARK, mark, ms, p_value, percent
from edgekd.benchmark.verdict import verdict

MATRIX_CLASSES = 16
"""Larger matrices are cut to the classes with the most mistakes; the others share a column."""
MAX_SUITES = 24
HEAVY_FAMILIES = ("corruption", "cue-conflict", "vocabulary")
"""Suites that have tables of their own instead of bars."""


def page(kept: Kept, failures: list[Failure], thumbnails: Thumbnails) -> str:
    """The report as HTML.

    Args:
        kept: the report and its arrays.
        failures: from `failures.failures`.
        thumbnails: pictures of the mistakes; those that are missing are described in words.
    """
    report, seen = kept.report, look(kept.report)
    suites, left_out = _suites(report)
    barred = seen.of_suites([row for row in report.accuracy if row.suite in suites])
    return environment().get_template("report.html").render(
        report=report,
        title=", ".join(dict.fromkeys(row.run for row in report.summary)),
        quick_mark=QUICK_MARK,
        verdict=verdict(report),
        gates=page_tables.gates(report),
        results=page_tables.results(report),
        dagger=any(mark(row) for row in report.latency),
        images=_images(report),
        rule=latency_rule(report),
        machine=_machine_line(report),
        pareto=_figure("pareto", pareto, seen.points()) if any(point.levels for point in seen.points()) else None,
        legend=[(seen.swatch(*who), name) for who, name in seen.names.items()],
        bars=_figure("suites", lambda rows, width: suite_bars(suites, rows, width), barred) if barred else None,
        left_out=left_out,
        sizes=page_tables.sizes(report),
        suite_table=page_tables.suites(report),
        costs=page_tables.costs(report),
        comparisons=[_comparison(pair) for pair in report.comparisons],
        corruptions=[page_tables.corruption(row) for row in report.corruptions],
        cue_conflicts=page_tables.cue_conflicts(report),
        vocabularies=page_tables.vocabularies(report),
        unknowns=page_tables.unknowns(report),
        own_metrics=page_tables.own_metrics(report),
        calibration=list(_calibration(kept, seen)),
        scaled=page_tables.scaled(report),
        latencies=list(_latencies(kept, seen)),
        latency_table=page_tables.latency(report),
        throughput=page_tables.throughput(report),
        energy=page_tables.energy(report),
        failures=[_failure(found, thumbnails, number) for number, found in enumerate(failures)],
        parity=page_tables.parity(report),
        placement=page_tables.placement(report),
        quantization=_quantization(report),
        environment=page_tables.machine(report),
        runs=[page_tables.run(facts) for facts in report.context.get("runs", ())],
        preprocess=page_tables.preprocess(report),
        protocol=page_tables.protocol(report),
        definitions=[("Accuracy and calibration", ACCURACY), ("Latency", LATENCY)],
    )  # fmt: skip


def _figure(key: str, draw: Any, data: Any) -> Figure:
    return Figure(key, (draw(data, WIDE), draw(data, NARROW)))


def _suites(report: Report) -> tuple[list[str], int]:
    """Suites for the bars, and how many of the best were left out."""
    heavy = {row.suite for row in report.suites if row.family in HEAVY_FAMILIES}
    names = [
        name for name in dict.fromkeys(row.suite for row in report.accuracy) if name not in heavy
    ]
    if len(names) <= MAX_SUITES:
        return names, 0
    lowest = {name: min(row.top1 for row in report.accuracy if row.suite == name) for name in names}
    chosen = set(sorted(names, key=lambda name: lowest[name])[:MAX_SUITES]) | {"id"}
    return [name for name in names if name in chosen], len(names) - len(chosen & set(names))


def _images(report: Report) -> str:
    heavy = {row.suite for row in report.suites if row.family in ("corruption", "val")}
    told = dict.fromkeys(
        f"{row.suite} n = {row.n:,}{f' ({row.run})' if row.run else ''}"
        for row in report.suites
        if row.suite not in heavy
    )
    return ", ".join(told)


def _machine_line(report: Report) -> str:
    env = report.environment
    providers = ", ".join(dict.fromkeys(row.provider for row in report.latency if not mark(row)))
    return f"{env['cpu']}, {env['usable_cores']} cores{f', {providers}' if providers else ''}"


def _comparison(pair: Any) -> dict[str, Any]:
    rows = []
    for one in pair.accuracy:
        low, high = (100 * end for end in one.ci95)
        difference = f"{100 * one.value:+.1f} [{low:+.1f}, {high:+.1f}]"
        rows.append((one.suite, f"{one.n:,}", percent(one.a), percent(one.b), difference, p_value(one.mcnemar_p),
                     percent(one.agreement)))  # fmt: skip
    header = ("suite", "n", "A", "B", "A − B, points [95 % CI]", "p", "agreement")
    return {
        "a": f"{pair.a_run}/{pair.a}",
        "b": f"{pair.b_run}/{pair.b}",
        "ratio": ratio_text(pair),
        "how": f"p50 {ms(pair.p50_a_ms)} against {ms(pair.p50_b_ms)} ms, from {pair.turns} pairs of blocks that took "
        f"turns in {pair.processes} process{'' if pair.processes == 1 else 'es'}",
        "table": Table("A and B on the same images", header, tuple(rows)),
    }


def _calibration(kept: Kept, seen: Look) -> Iterator[dict[str, Any]]:
    report = kept.report
    families = {row.suite: row.family for row in report.suites}
    for number, ((run, subject), name) in enumerate(seen.names.items()):
        own = [row.suite for row in report.accuracy if (row.run, row.subject) == (run, subject)]
        outside = [
            suite
            for suite in own
            if suite.startswith("ood:") and families.get(suite) not in HEAVY_FAMILIES
        ]
        figures, colour = [], seen.colours[run, subject]
        if "id" in own:
            found = reliability(kept.logits(run, subject, "id"), kept.labels(run, "id"))
            drawing = reliability_drawing(found, f"Reliability of {name} in domain", colour)
            figures.append(Figure(f"rel-{number}-id", (drawing,), f"ID, ECE {found.ece:.3f}"))
        if outside:
            found = pooled(kept, run, subject, outside)
            where = outside[0] if len(outside) == 1 else f"{len(outside)} OOD suites pooled"
            drawing = reliability_drawing(found, f"Reliability of {name} out of domain", colour)
            figures.append(Figure(f"rel-{number}-ood", (drawing,), f"{where}, ECE {found.ece:.3f}"))
        yield {"name": name, "swatch": seen.swatch(run, subject), "figures": figures}


def _latencies(kept: Kept, seen: Look) -> Iterator[dict[str, Any]]:
    rows = {(row.run, row.subject): row for row in kept.report.latency}
    for number, (who, name) in enumerate(seen.names.items()):
        row, parts = rows[who], kept.samples(*who)
        limits, colour = span(parts), seen.colours[who]
        yield {
            "name": name,
            "swatch": seen.swatch(*who),
            "background": row.protocol == "context",
            "said": f"{row.n:,} samples, p50 {ms(row.p50_ms)} ms, p90 {ms(row.p90_ms)} ms",
            "figures": [
                Figure(
                    f"hist-{number}",
                    (histogram(parts, limits, row.p50_ms, row.p90_ms, name, colour),),
                ),
                Figure(f"time-{number}", (timeline(parts, limits, name, colour),)),
            ],
        }


def _failure(found: Failure, thumbnails: Thumbnails, number: int) -> dict[str, Any]:
    row, matrix = found.row, found.confusion
    wrong = matrix.sum(axis=1) - matrix.diagonal()
    chosen = list(range(len(matrix)))
    if len(chosen) > MATRIX_CLASSES:
        chosen = sorted(sorted(chosen, key=lambda c: -int(wrong[c]))[:MATRIX_CLASSES])
    lines = []
    for c in chosen:
        total = max(int(matrix[c].sum()), 1)
        cells = [(int(matrix[c, d]), round(10 * matrix[c, d] / total), c == d) for d in chosen]
        others = int(matrix[c].sum() - matrix[c, chosen].sum())
        lines.append((found.classes[c], int(matrix[c].sum()), cells, others))
    pairs = sorted(
        (
            (int(matrix[a, b]), a, b)
            for a in range(len(matrix))
            for b in range(len(matrix))
            if a != b and matrix[a, b]
        ),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )
    header = ("label", "answered", "images", "share of the label")
    often = tuple(
        (found.classes[a], found.classes[b], str(n), f"{percent(n / int(matrix[a].sum()))} %")
        for n, a, b in pairs[:8]
    )
    return {
        "number": number,
        "row": row,
        "top1": percent(row.top1),
        "names": [found.classes[c] for c in chosen],
        "lines": lines,
        "cut": len(matrix) - len(chosen),
        "often": Table("Most frequent confusions", header, often, heads=2) if often else None,
        "mistakes": [
            (mistake, thumbnails.get((row.run, row.suite, mistake.image)))
            for mistake in found.mistakes
        ],
    }


def _quantization(report: Report) -> list[tuple[str, str]]:
    said = []
    for facts in report.context.get("artifacts", ()):
        if quantization := facts.get("quantization"):
            told = ", ".join(
                f"{key.replace('_', ' ')} {shown(value)}" for key, value in quantization.items()
            )
            said.append((f"{facts['run']}/{facts['name']}", told))
    return said
