"""Compare several reports on one page, `comparison.html` and `comparison.md`.

Accuracies are compared only on identical images, and latencies only on the same kind of machine with the same protocol.
Effective robustness (Taori et al. 2020) is the OOD accuracy beyond the prediction from the ID accuracy by a line
`logit(OOD) = a · logit(ID) + b`, fitted by least squares over the students.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.evaluate import metrics
from edgekd.benchmark.evaluate.statistics import difference
from edgekd.benchmark.report.document import latency_items, points_of, scatter, suite_items
from edgekd.benchmark.report.elements import Document, Item, Text, section, table, words
from edgekd.benchmark.report.provenance import QUICK_MARK, definitions, machine_line
from edgekd.benchmark.report.recommend import verdict
from edgekd.benchmark.report.render import html, markdown
from edgekd.benchmark.report.tables import results
from edgekd.benchmark.results.metric import Metric, points
from edgekd.benchmark.results.rows import AccuracyRow, Difference, SummaryRow
from edgekd.benchmark.results.schema import Report, of
from edgekd.benchmark.results.storage import RawResults, read_results, report_folder
from edgekd.core.errors import EdgekdError
from edgekd.core.files import write_text
from edgekd.core.folders import COMPARISON, publishing
from edgekd.core.machine import in_cores

_APART = ("corruption", "cue-conflict", "val", "vocabulary")
"""Families of suites that are not compared across reports."""
_LEAST = 3
"""Minimum number of students for a line."""


@dataclass(frozen=True)
class Source:
    """One report and its letter on the page, which is empty for a single report."""

    letter: str
    raw: RawResults

    @property
    def report(self) -> Report:
        """The report without arrays."""
        return self.raw.report

    @property
    def name(self) -> str:
        """Letter and names of the runs."""
        runs = ", ".join(self.report.runs)
        return f"{self.letter}: {runs}" if self.letter else runs

    @property
    def machine(self) -> str:
        """Processor, cores, governor and latency protocol."""
        env, protocol = self.report.environment, "quick" if self.report.quick else "full"
        cores, governor = in_cores(env["usable_cores"]), env["governor"] or "unknown"
        cpu = env["cpu"] or "unknown processor"
        return f"{cpu}, {cores}, governor {governor}, {protocol} protocol"


@dataclass(frozen=True)
class Entry:
    """One subject of one report; `images` has the name and content hash of every suite of `accuracy`."""

    source: Source
    summary: SummaryRow
    accuracy: dict[str, AccuracyRow]
    """By suite."""
    images: tuple[tuple[str, str], ...]

    @property
    def machine(self) -> str:
        """Machine and protocol of the latency."""
        return self.source.machine

    @property
    def run(self) -> str:
        """The report's letter and the run's name."""
        return f"{self.source.letter} {self.summary.run}".strip()

    @property
    def name(self) -> str:
        """Run and subject."""
        return f"{self.run}: {self.source.report.label(self.summary).rpartition(': ')[2]}"

    @property
    def outside(self) -> list[str]:
        """Names of the suites of unseen domains."""
        return [suite for suite in self.accuracy if suite.startswith("ood:")]


def write_comparison(paths: Sequence[Path], folder: Path, *, overwrite: bool = False) -> Path:
    """Write a comparison of the stored reports of `paths`, without measuring, and return the path of comparison.html.

    Args:
        paths: report folders, or run folders, of which the newest report is used.
        folder: for comparison.html and comparison.md; `overwrite` replaces an earlier comparison.

    Raises:
        EdgekdError: there is no report, a report is damaged, or `folder` is not empty.
    """
    if not paths:
        hint = "Give report folders, or runs that were benchmarked."
        raise EdgekdError("There is no report to show.", hint)
    with publishing(folder, COMPARISON, overwrite=overwrite) as scratch:
        page = comparison(read_sources(paths))
        write_text(scratch / "comparison.html", html(page))
        write_text(scratch / "comparison.md", markdown(page))
    return folder / "comparison.html"


def read_sources(paths: Sequence[Path]) -> list[Source]:
    """Load the reports in these folders; a missing, damaged or repeated one is an `EdgekdError`."""
    folders = [report_folder(path) for path in paths]
    for path, folder in zip(paths, folders, strict=True):
        if [one.resolve() for one in folders].count(folder.resolve()) > 1:
            raise EdgekdError(f"The report in {path} is given twice.", "Give each report once.")
    letters = [""]
    if len(folders) > 1:
        letters = [chr(ord("A") + n) if n < 26 else f"A{n}" for n in range(len(folders))]
    return [Source(one, read_results(path)) for one, path in zip(letters, folders, strict=True)]


def entries(sources: Sequence[Source]) -> list[Entry]:
    """Return every subject of every report; a teacher with identical logits on the same images is listed once."""
    result: list[Entry] = []
    teachers: set[tuple[str, ...]] = set()
    for source in sources:
        raw, report = source.raw, source.report
        apart = report.families(*_APART)
        for row in report.summary:
            own = {one.suite: one for one in of(report.accuracy, row) if one.suite not in apart}
            if row.kind == "teacher":
                logits = tuple(_digest(raw.logits(*row.who, suite).tobytes()) for suite in own)
                if row.same_as is not None or logits in teachers:
                    continue
                teachers.add(logits)
            images = tuple((suite, _fingerprint(raw, row.run, suite)) for suite in own)
            result.append(Entry(source, row, own, images))
    return result


def _fingerprint(raw: RawResults, run: str, suite: str) -> str:
    """Return a hash of a suite's images with their order, labels and classes."""
    names = "\0".join([*raw.ids(run, suite), *raw.classes(run, suite)])
    return _digest(names.encode() + raw.labels(run, suite).astype("<i8").tobytes())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def groups(all_entries: Sequence[Entry], by: str) -> list[list[Entry]]:
    """Return groups of entries with the same `images` or `machine` (`by`), in order of first appearance."""
    grouped: dict[object, list[Entry]] = {}
    for entry in all_entries:
        grouped.setdefault(getattr(entry, by), []).append(entry)
    return list(grouped.values())


def merged(group: Sequence[Entry]) -> Report:
    """Return one report with only these entries, each under its report's letter and its run's name."""
    first = group[0].source.report
    rows: dict[str, Any] = {name: () for name, value in first if isinstance(value, tuple)}
    rows["suites"] = tuple(row for row in first.suites if row.suite in group[0].accuracy)
    for entry in group:
        own, report = {"run": entry.run}, entry.source.report
        rows["summary"] += (entry.summary.model_copy(update=own | {"same_as": None}),)
        rows["latency"] += (report.time(entry.summary).model_copy(update=own),)
        rows["accuracy"] += tuple(row.model_copy(update=own) for row in entry.accuracy.values())
    return first.model_copy(update=rows)


def reference(group: Sequence[Entry]) -> Entry:
    """Return the reference entry: the first exported file, else the first student, else the first entry."""
    order = ("artifact", "torch", "teacher")
    return min(group, key=lambda entry: order.index(entry.summary.kind))


def against(entry: Entry, other: Entry) -> Difference:
    """Return the paired accuracy difference `entry` minus `other` on the unseen domains (else on all suites)."""

    def correct(one: Entry, suite: str) -> NDArray[np.bool_]:
        raw, who = one.source.raw, one.summary.who
        return metrics.correct(raw.logits(*who, suite), raw.labels(who[0], suite))

    suites = entry.outside or list(entry.accuracy)
    return difference([(correct(entry, suite), correct(other, suite)) for suite in suites])


def differences(sources: Sequence[Source], all_entries: Sequence[Entry]) -> Iterator[str]:
    """Yield one sentence for each difference that limits the comparison of these reports."""
    contents: dict[str, dict[str, dict[str, None]]] = {}
    for entry in all_entries:
        for suite, content in entry.images:
            who = f"{entry.source.letter or entry.summary.run} (n = {entry.accuracy[suite].n:,})"
            contents.setdefault(suite, {}).setdefault(content, {})[who] = None
    for suite, users_of in contents.items():
        if len(users_of) > 1:
            parts = " and ".join(", ".join(users) for users in users_of.values())
            yield f"The images of {suite} differ between {parts}, so their accuracies are in separate tables."
    only = [suite for suite in contents if any(suite not in one.accuracy for one in all_entries)]
    if only:
        yield f"Not all were measured on {', '.join(only)}, so means over different suites are not compared."
    machines: dict[str, list[str]] = {}
    for source in sources:
        machines.setdefault(source.machine, []).append(source.letter or source.name)
    if len(machines) > 1:
        kinds = (f"{', '.join(users)}: {key}" for key, users in machines.items())
        yield f"Machines or protocols differ, so latencies are in separate tables. {'; '.join(kinds)}."
    versions = [source.report.environment["versions"] for source in sources]
    for package in dict.fromkeys(name for one in versions for name in one):
        values = [one.get(package) or "none" for one in versions]
        if len(set(values)) > 1:
            each = (f"{one.letter} {value}" for one, value in zip(sources, values, strict=True))
            yield f"Versions of {package} differ: {', '.join(each)}."
    if len(sources) > 1:
        yield (
            "The reports were measured at different times, so other load on the machine may affect their latencies. "
            "For a ratio with an interval, measure two files together: edgekd benchmark A B --compare."
        )


@dataclass(frozen=True)
class Robustness:
    """Effective robustness of a group of entries.

    Attributes:
        lines: suite → slope, intercept and R² (explained share of the variance of log-odds) of its line.
        models: names of the entries to which the lines are fitted.
        beyond: for each entry of the group, suite → accuracy minus the line's prediction, 0–1.
    """

    lines: dict[str, tuple[float, float, float]]
    models: tuple[str, ...]
    beyond: tuple[dict[str, float], ...]


def log_odds(row: AccuracyRow) -> float:
    """Return the log-odds of top-1, clipped to half an image from 0 and 1."""
    inside = np.clip(row.top1, 0.5 / row.n, 1 - 0.5 / row.n)
    return float(np.log(inside / (1 - inside)))


def effective_robustness(group: Sequence[Entry]) -> Robustness | str:
    """Return the effective robustness of entries measured on the same images, or the reason why there is none.

    The lines are fitted to one entry per student: the torch student or, if it was not measured, an exported file.
    Teachers were trained on other data, so they are compared with the lines but not used to fit them.
    """
    suites = group[0].outside
    students: dict[tuple[str, str], Entry] = {}
    for kind in ("torch", "artifact"):
        for entry in group:
            if entry.summary.kind == kind:
                students.setdefault((entry.source.letter, entry.summary.run), entry)
    fitted = list(students.values())
    if not suites or any("id" not in entry.accuracy for entry in group):
        return "there are no suites both in and out of domain"
    if len(fitted) < _LEAST:
        return f"a line needs {_LEAST} students on the same images, and there are {len(fitted)}"
    if len({entry.accuracy["id"].top1 for entry in fitted}) < 2:
        return "all students have the same accuracy in domain, so no line can be fitted"
    lines, beyond = {}, tuple[dict[str, float], ...]({} for _ in group)
    for suite in suites:
        x, y = (np.array([log_odds(one.accuracy[s]) for one in fitted]) for s in ("id", suite))
        slope, intercept = np.polyfit(x, y, 1)
        left, spread = np.square(y - slope * x - intercept).sum(), np.square(y - y.mean()).sum()
        lines[suite] = slope, intercept, float(1 - left / spread) if spread > 0 else 1.0
        for entry, own in zip(group, beyond, strict=True):
            odds = slope * log_odds(entry.accuracy["id"]) + intercept
            own[suite] = entry.accuracy[suite].top1 - float(1 / (1 + np.exp(-odds)))
    return Robustness(lines, tuple(entry.name for entry in fitted), beyond)


def comparison(sources: Sequence[Source]) -> Document:
    """Return the document of several reports."""
    all_entries = entries(sources)
    notes = [Text(text, tone="note") for text in differences(sources, all_entries)]
    accuracy = chain.from_iterable(_accuracy(group) for group in groups(all_entries, "images"))
    latency = chain.from_iterable(_latency(group) for group in groups(all_entries, "machine"))
    sections = (
        section("reports", "What is compared", (_reports(sources), *notes)),
        section("accuracy", "Accuracy", accuracy),
        section("latency", "Latency", latency),
        section("method", "How each number is measured", definitions()),
    )
    title = " against ".join(source.name for source in sources)
    byline = "From the stored results of the reports, without new measurements."
    return Document("comparison", title, byline, sections)


def _reports(sources: Sequence[Source]) -> Item:
    def runs(report: Report) -> str:
        keys = ("name", "student", "recipe", "data", "split_hash")
        facts = ([run[key] for key in keys if key in run] for run in report.context.get("runs", ()))
        return "; ".join(map(words, facts)) or "–"

    cells = [
        {
            "report": source.name,
            "measured, UTC": source.report.created[:16].replace("T", " "),
            "protocol": QUICK_MARK if source.report.quick else "full",
            "machine": machine_line(source.report),
            "runs": runs(source.report),
            "gates": verdict(source.report)[1],
        }
        for source in sources
    ]
    return table("The reports", cells, words=True)


def _accuracy(group: Sequence[Entry]) -> Iterator[Item]:
    """Yield table, differences, bars and effective robustness of entries with the same images."""
    report = merged(group)
    images = ", ".join(f"{suite} n = {row.n:,}" for suite, row in group[0].accuracy.items())
    yield Text(f"On the same images: {images}.")
    yield results(report, timed=False)
    yield _changes(group, reference(group))
    for part in groups(group, "machine"):
        yield scatter(points_of(merged(part)))
    yield from suite_items(report)
    yield _robustness(group)


def _changes(group: Sequence[Entry], base: Entry) -> Item:
    """Return the difference of every other entry to the base entry."""
    where, show = "OOD" if base.outside else "ID", Metric("", "points").show
    cells = [
        {"subject": entry.name, f"{where} difference, points": show(against(entry, base))}
        for entry in group
        if entry is not base
    ]
    note = "Accuracy minus the reference's on the same images. Positive: better. Paired bootstrap, McNemar p."
    return table(f"Against {base.name}", cells, note=note)


def _robustness(group: Sequence[Entry]) -> Item:
    """Return the table of effective robustness with its lines, or the reason why it cannot be computed."""
    result = effective_robustness(group)
    if isinstance(result, str):
        return Text(f"Effective robustness cannot be computed: {result}.", tone="quiet")
    lines = "; ".join(
        f"{suite}: logit(OOD) = {slope:.2f} · logit(ID) {intercept:+.2f}, R² {r2:.2f}"
        for suite, (slope, intercept, r2) in result.lines.items()
    )
    note = (
        f"Accuracy minus the prediction of a line fitted to {len(result.models)} students ({', '.join(result.models)}) "
        f"in log-odds of accuracy in and out of domain (Taori et al. 2020). {lines}. A line through few models is "
        "imprecise: it has no interval, and the fitted students lie near it."
    )
    cells = []
    for entry, beyond in zip(group, result.beyond, strict=True):
        mean = {"mean": points(sum(beyond.values()) / len(beyond))} if len(beyond) > 1 else {}
        cells.append({"subject": entry.name} | {k: points(v) for k, v in beyond.items()} | mean)
    return table("Effective robustness, points", cells, note=note)


def _latency(group: Sequence[Entry]) -> Iterator[Item]:
    yield Text(f"On {group[0].machine}.")
    of_subject = {(entry.run, entry.summary.subject): entry for entry in group}
    report = merged(group)
    files = [point for point in points_of(report) if point.summary.kind == "artifact"]

    def samples(run: str, subject: str) -> list[NDArray[np.float64]]:
        entry = of_subject[run, subject]
        return entry.source.raw.samples(*entry.summary.who)

    yield from latency_items(report, files, samples)
