"""The page and the Markdown of several reports side by side: `comparison.html`, `comparison.md`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from edgekd.benchmark.report.across import (
    Entry,
    Source,
    against,
    differences,
    effective_robustness,
    entries,
    groups,
    merged,
    read_sources,
    reference,
)
from edgekd.benchmark.report.answers import verdict
from edgekd.benchmark.report.document import latency_items, points_of, scatter, suite_items
from edgekd.benchmark.report.provenance import QUICK_MARK, definitions, machine_line
from edgekd.benchmark.report.render import html, markdown
from edgekd.benchmark.report.sections import (
    Cells,
    Document,
    Item,
    Table,
    Text,
    section,
    table,
    words,
)
from edgekd.benchmark.report.tables import results
from edgekd.benchmark.results.metric import Metric, points
from edgekd.core.errors import EdgekdError
from edgekd.core.files import write_text
from edgekd.core.folders import COMPARISON, publishing


def write_comparison(paths: Sequence[Path], folder: Path, *, overwrite: bool = False) -> Path:
    """Compare the stored reports of `paths`, without measuring anything.

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
        page = comparison(read_sources(paths))
        write_text(scratch / "comparison.html", html(page))
        write_text(scratch / "comparison.md", markdown(page))
    return folder / "comparison.html"


def comparison(sources: Sequence[Source]) -> Document:
    """Return the document of several reports."""
    found = entries(sources)
    notes = [Text(text, tone="note") for text in differences(sources, found)]
    accuracy = chain.from_iterable(_accuracy(group) for group in groups(found, "images"))
    latency = chain.from_iterable(_latency(group) for group in groups(found, "machine"))
    sections = (
        section("reports", "What is compared", (_reports(sources), *notes)),
        section("accuracy", "Accuracy", accuracy),
        section("latency", "Latency", latency),
        section("method", "How each number is measured", definitions()),
    )
    title = " against ".join(source.name for source in sources)
    byline = "From the stored results of each report; nothing was measured again."
    return Document("comparison", title, byline, sections)


def _reports(sources: Sequence[Source]) -> Table:
    def runs(source: Source) -> str:
        facts = source.report.context.get("runs", ())
        keys = ("name", "student", "recipe", "data", "split_hash")
        return "; ".join(words([one[key] for key in keys if key in one]) for one in facts) or "–"

    cells: list[Cells] = [
        {
            "report": source.name,
            "measured, UTC": source.report.created[:16].replace("T", " "),
            "protocol": QUICK_MARK if source.report.quick else "full",
            "machine": machine_line(source.report),
            "runs": runs(source),
            "gates": verdict(source.report)[1],
        }
        for source in sources
    ]
    return table("The reports", cells, words=True)


def _accuracy(group: Sequence[Entry]) -> Iterator[Item]:
    """Yield what entries with the same images have in common: table, differences, bars, effective robustness."""
    report = merged(group)
    images = ", ".join(f"{row.suite} n = {row.n:,}" for row in group[0].accuracy)
    yield Text(f"On the same images: {images}.")
    yield results(report, timed=False)
    yield _changes(group, reference(group))
    for part in groups(group, "machine"):
        yield scatter(points_of(merged(part)))
    yield from suite_items(report)
    yield _robustness(group)


def _changes(group: Sequence[Entry], base: Entry) -> Table:
    """Return the difference of every other entry to the base entry."""
    where = "OOD" if any(row.suite.startswith("ood:") for row in base.accuracy) else "ID"
    show = Metric("", "points").show
    cells: list[Cells] = [
        {"subject": entry.name, f"{where} difference, points": show(against(entry, base))}
        for entry in group
        if entry is not base
    ]
    note = "Accuracy minus the reference's on the same images; positive is better. Paired bootstrap, McNemar p."
    return table(f"Against {base.name}", cells, note=note)


def _robustness(group: Sequence[Entry]) -> Item:
    """Return effective robustness as a table with its lines, or why it cannot be computed."""
    found = effective_robustness(group)
    if isinstance(found, str):
        return Text(f"Effective robustness cannot be computed: {found}.", tone="quiet")
    lines = "; ".join(
        f"{line.suite}: logit(OOD) = {line.slope:.2f} · logit(ID) {line.intercept:+.2f}, R² {line.r2:.2f}"
        for line in found.lines
    )
    note = (
        f"Accuracy beyond the line through {len(found.models)} students ({', '.join(found.models)}) between the "
        f"log-odds of accuracy in and out of domain (Taori et al. 2020). {lines}. Through so few models a line is "
        "rough: it has no interval, and the students that shape it lie near it."
    )
    cells: list[Cells] = []
    for entry, beyond in zip(group, found.beyond, strict=True):
        mean = {"mean": points(sum(beyond.values()) / len(beyond))} if len(beyond) > 1 else {}
        cells.append({"subject": entry.name} | {k: points(v) for k, v in beyond.items()} | mean)
    return table("Effective robustness, points", cells, note=note)


def _latency(group: Sequence[Entry]) -> Iterator[Item]:
    yield Text(f"On {', '.join(group[0].machine)}.")
    of = {(entry.run, entry.summary.subject): entry for entry in group}
    report = merged(group)
    files = [point for point in points_of(report) if point.summary.kind == "artifact"]

    def samples(run: str, subject: str):  # type: ignore[no-untyped-def]
        return of[run, subject].source.raw.samples(*of[run, subject].summary.who)

    yield from latency_items(report, files, samples)
