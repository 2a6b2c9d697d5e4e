"""The page and the Markdown of several reports beside each other: `comparison.html`, `comparison.md`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekd.benchmark.across import (
    Entry,
    Source,
    against,
    differences,
    entries,
    groups,
    read_sources,
    reference,
)
from edgekd.benchmark.chart_accuracy import Point, pareto, suite_bars
from edgekd.benchmark.chart_latency import histogram, span
from edgekd.benchmark.definitions import ACCURACY, LATENCY
from edgekd.benchmark.evaluate.robustness import effective_robustness
from edgekd.benchmark.markdown import escaped, markdown_table
from edgekd.benchmark.pieces import NARROW, WIDE, Figure, Table, environment
from edgekd.benchmark.svg import COLOURS, swatch
from edgekd.benchmark.table import NONE, QUICK_MARK, fraction, mark, ms, p_value, percent
from edgekd.benchmark.verdict import verdict
from edgekd.errors import EdgekdError
from edgekd.files import write_text
from edgekd.folders import COMPARISON, publishing


def write_comparison(paths: Sequence[Path], folder: Path, *, overwrite: bool = False) -> Path:
    """Set the kept reports of `paths` beside each other, without measuring anything.

    Args:
        paths: report folders, or run folders, whose newest report is taken.
        folder: gets comparison.html and comparison.md.
        overwrite: replace an earlier comparison in `folder`.

    Returns:
        comparison.html.

    Raises:
        EdgekdError: no report, a damaged one, or `folder` holds something.
    """
    if not paths:
        raise EdgekdError(
            "There is no report to show.", "Name report folders, or runs that were benchmarked."
        )
    with publishing(folder, COMPARISON, overwrite=overwrite) as scratch:
        view = _view(read_sources(paths))
        html = environment().get_template("comparison.html").render(**view)
        write_text(scratch / "comparison.html", html)
        write_text(scratch / "comparison.md", _markdown(view))
    return folder / "comparison.html"


def _view(sources: Sequence[Source]) -> dict[str, Any]:
    found = entries(sources)
    colours: dict[int, str] = {}
    for entry in found:
        students = sum(colour != "ct" for colour in colours.values())
        colours[id(entry)] = "ct" if entry.summary.kind == "teacher" else f"c{students % COLOURS}"
    by_images, by_machine = groups(found, "images"), groups(found, "machine")
    return {
        "title": " beside ".join(source.name for source in sources),
        "sources": _sources(sources),
        "differences": differences(sources, found),
        "apart": len(by_images) > 1 or len(by_machine) > 1,
        "accuracy": [_accuracy(group, colours, number) for number, group in enumerate(by_images)],
        "latency": [_latency(group, colours, number) for number, group in enumerate(by_machine)],
        "pareto": _pareto(found, colours),
        "definitions": [("Accuracy and calibration", ACCURACY), ("Latency", LATENCY)],
    }


def _sources(sources: Sequence[Source]) -> Table:
    rows = []
    for source in sources:
        report = source.kept.report
        env = report.environment
        runs = report.context.get("runs", ())
        told = "; ".join(
            f"{one['name']}: {', '.join(str(one[key]) for key in ('student', 'recipe', 'data') if key in one)}"
            + (f", split {one['split_hash'][:8]}" if "split_hash" in one else "")
            for one in runs
        )
        rows.append((source.name, report.created[:16].replace("T", " "), QUICK_MARK if report.quick else "full",
                     f"{env['cpu']}, {env['usable_cores']} cores", told or NONE, verdict(report).headline))  # fmt: skip
    header = ("report", "measured, UTC", "protocol", "machine", "runs", "gates")
    return Table("The reports", header, tuple(rows), words=True)


def _accuracy(group: Sequence[Entry], colours: dict[int, str], number: int) -> dict[str, Any]:
    base = reference(group)
    domains = list(dict.fromkeys(domain for entry in group for domain in entry.summary.ood))
    several = len(domains) > 1
    header = (
        "subject",
        "ID",
        *(f"OOD:{domain}" for domain in domains),
        *(("OOD avg", "OOD worst") if several else ()),
    )
    header += (
        "gap",
        "retention",
        "ECE ID / OOD",
        f"{'OOD' if domains else 'ID'} against {base.name} [95 % CI]",
        "p",
    )
    rows = []
    for entry in group:
        row = entry.summary
        change = ("reference", NONE)
        if entry is not base:
            cost = against(entry, base)
            low, high = (100 * end for end in cost.ci95)
            change = f"{100 * cost.value:+.1f} [{low:+.1f}, {high:+.1f}]", p_value(cost.mcnemar_p)
        rows.append((
            entry.name, percent(row.id), *(percent(row.ood.get(domain)) for domain in domains),
            *((percent(row.ood_avg), percent(row.ood_worst)) if several else ()), percent(row.gap),
            percent(row.retention), f"{fraction(row.ece_id)} / {fraction(row.ece_ood)}", *change,
        ))  # fmt: skip
    suites = list(dict.fromkeys(row.suite for entry in group for row in entry.accuracy))
    drawn = [(entry.name, colours[id(entry)], row) for entry in group for row in entry.accuracy]
    images = ", ".join(f"{row.suite} n = {row.n:,}" for row in group[0].accuracy)
    figure = (suite_bars(suites, drawn, width) for width in (WIDE, NARROW))
    return {
        "images": images,
        "table": Table(f"On the same images: {images}", header, tuple(rows)),
        "bars": Figure(f"bars-{number}", tuple(figure)),
        **_robustness(group),
        "legend": _legend(group, colours),
    }


def _robustness(group: Sequence[Entry]) -> dict[str, Any]:
    """Effective robustness as a table and a sentence; the sentence alone where it cannot be had."""
    found = effective_robustness(group)
    if found.reason:
        return {
            "robustness": None,
            "robustness_said": f"Effective robustness cannot be computed: {found.reason}.",
        }
    several = len(found.lines) > 1
    header = (
        "subject",
        *(line.suite.replace("ood:", "OOD:") for line in found.lines),
        *(("mean",) if several else ()),
    )
    rows = []
    for entry, beyond in zip(group, found.beyond, strict=True):
        values = [100 * value for value in beyond.values()]
        mean = (f"{sum(values) / len(values):+.1f}",) if several else ()
        rows.append((entry.name, *(f"{value:+.1f}" for value in values), *mean))
    lines = "; ".join(
        f"{line.suite}: logit(OOD) = {line.slope:.2f} · logit(ID) {line.intercept:+.2f}, R² {line.r2:.2f}"
        for line in found.lines
    )
    said = (
        f"Accuracy beyond the line through {len(found.models)} students ({', '.join(found.models)}) between the "
        f"log-odds of accuracy in and out of domain (Taori et al. 2020). {lines}. Through so few models a line is "
        "rough: it has no interval, and the students that shape it lie near it."
    )
    return {
        "robustness": Table(
            "Effective robustness, in points: positive is beyond the line", header, tuple(rows)
        ),
        "robustness_said": said,
    }


def _legend(group: Sequence[Entry], colours: dict[int, str]) -> list[tuple[Any, str]]:
    return [(swatch(entry.summary.kind, colours[id(entry)]), entry.name) for entry in group]


def _latency(group: Sequence[Entry], colours: dict[int, str], number: int) -> dict[str, Any]:
    header = (
        "subject",
        "runtime",
        "threads",
        "p50 ms [95 % CI]",
        "p90 ms",
        "CV",
        "runs",
        "processes",
        "MB",
    )
    rows = []
    for entry in group:
        time, size = entry.latency, entry.summary.size_mb
        low, high = time.p50_ci95_ms
        rows.append((
            entry.name + mark(time), time.provider, NONE if time.threads is None else str(time.threads),
            f"{ms(time.p50_ms)} [{ms(low)}, {ms(high)}]", ms(time.p90_ms), f"{time.cv:.2f}", f"{time.n:,}",
            str(time.processes), NONE if size is None else f"{size:.2f}",
        ))  # fmt: skip
    exported = [entry for entry in group if entry.summary.kind == "artifact"]
    samples = {id(e): e.source.kept.samples(e.summary.run, e.summary.subject) for e in exported}
    limits = span([part for parts in samples.values() for part in parts]) if samples else (1.0, 2.0)
    figures = [
        Figure(
            f"hist-{number}-{place}",
            (
                histogram(
                    samples[id(e)],
                    limits,
                    e.latency.p50_ms,
                    e.latency.p90_ms,
                    e.name,
                    colours[id(e)],
                ),
            ),
            e.name,
        )
        for place, e in enumerate(exported)
    ]
    where = ", ".join(group[0].machine)
    return {
        "where": where,
        "table": Table(f"Latency of one image on {where}", header, tuple(rows)),
        "figures": figures,
    }


def _pareto(found: Sequence[Entry], colours: dict[int, str]) -> list[dict[str, Any]]:
    """A picture for each set of entries that share images and machine, where there is more than one to compare."""
    drawn: list[dict[str, Any]] = []
    for images in groups(found, "images"):
        for both in groups(images, "machine"):
            points = [
                Point(entry.name, colours[id(entry)], entry.summary, entry.latency)
                for entry in both
            ]
            if any(point.levels for point in points):
                key = f"pareto-{len(drawn)}"
                figure = Figure(key, (pareto(points, WIDE), pareto(points, NARROW)))
                where = ", ".join(both[0].machine)
                drawn.append({"where": where, "figure": figure, "legend": _legend(both, colours)})
    return drawn


def _markdown(view: dict[str, Any]) -> str:
    def table(one: Table) -> list[str]:
        return [
            f"{escaped(one.caption)}",
            "",
            *markdown_table(one.header, [tuple(map(str, r)) for r in one.rows]),
            "",
        ]

    lines = [
        f"# {escaped(view['title'])}",
        "",
        *table(view["sources"]),
        "## What may be compared",
        "",
    ]
    lines += [f"- {escaped(text)}" for text in view["differences"]] or [
        "- One report: everything below."
    ]
    lines += ["", "## Accuracy", ""]
    for part in view["accuracy"]:
        lines += table(part["table"])
        if part["robustness"] is not None:
            lines += table(part["robustness"])
        lines += [escaped(part["robustness_said"]), ""]
    lines += ["## Latency", ""]
    for part in view["latency"]:
        lines += table(part["table"])
    lines += ["†: measured briefly as background; not comparable with an exported file.", ""]
    lines += ["Differences: accuracy minus the reference's on the same images, in points; positive is better. Paired "
              "bootstrap interval, exact McNemar p.", ""]  # fmt: skip
    return "\n".join(lines)
