"""Several reports beside each other, from what they kept: which subjects may be compared, and how they differ.

Accuracies stand in one table only where they come from the very same images, latencies only where they come from the
same kind of machine by the same protocol. Everything that differs is said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekd.benchmark.evaluate import metrics
from edgekd.benchmark.evaluate.statistics import mcnemar_p, paired_interval
from edgekd.benchmark.kept import Kept
from edgekd.benchmark.report import read_kept, report_folder
from edgekd.benchmark.rows import AccuracyRow, Difference, LatencyRow, SummaryRow
from edgekd.benchmark.table import label
from edgekd.console import shell_word
from edgekd.errors import EdgekdError

APART = ("corruption", "cue-conflict", "val", "vocabulary")
"""Families of suites that are not set beside each other."""


@dataclass(frozen=True)
class Source:
    """One report: its letter on the page, and the folder it came from."""

    letter: str
    kept: Kept

    @property
    def name(self) -> str:
        runs = ", ".join(dict.fromkeys(row.run for row in self.kept.report.summary))
        return f"{self.letter}: {runs}" if self.letter else runs


@dataclass(frozen=True)
class Entry:
    """One subject of one report.

    Attributes:
        images: name and content of every suite it was measured on.
        machine: processor, cores, governor and protocol that its latency was measured with.
    """

    source: Source
    summary: SummaryRow
    latency: LatencyRow
    accuracy: tuple[AccuracyRow, ...]
    images: tuple[tuple[str, str], ...]
    machine: tuple[str, ...]

    @property
    def name(self) -> str:
        own = f"{self.summary.run}: {label(self.summary)}"
        return f"{self.source.letter} {own}" if self.source.letter else own


def read_sources(paths: Sequence[Path]) -> list[Source]:
    """The reports in these folders (a report's own, or a run's, whose newest report is taken).

    Raises:
        EdgekdError: no report there, one named twice, a file missing or damaged.
    """
    folders = [report_folder(path) for path in paths]
    for path, folder in zip(paths, folders, strict=True):
        if not (folder / "report.json").is_file():
            raise EdgekdError(
                f"There is no report in {path}.", f"Make one: edgekd benchmark {shell_word(path)}."
            )
        if [one.resolve() for one in folders].count(folder.resolve()) > 1:
            raise EdgekdError(f"The report in {path} is named twice.", "Name each report once.")
    sources = []
    for number, folder in enumerate(folders):
        letter = _letter(number) if len(folders) > 1 else ""
        sources.append(Source(letter, read_kept(folder, clock=True)))
    return sources


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"A{number}"


def entries(sources: Sequence[Source]) -> list[Entry]:
    """Every subject of every report; a teacher that answers exactly like an earlier one on the same images once."""
    found: list[Entry] = []
    teachers: set[tuple[str, ...]] = set()
    for source in sources:
        report = source.kept.report
        latency = {(row.run, row.subject): row for row in report.latency}
        families = {(row.suite, row.run): row.family for row in report.suites}
        for row in report.summary:
            mine = (
                one for one in report.accuracy if (one.run, one.subject) == (row.run, row.subject)
            )
            own = tuple(
                one
                for one in mine
                if families.get((one.suite, None), families.get((one.suite, one.run))) not in APART
            )
            images = tuple((one.suite, _content(source.kept, one)) for one in own)
            if row.kind == "teacher":
                answers = tuple(
                    _digest(source.kept.logits(one.run, one.subject, one.suite)) for one in own
                )
                if row.same_as is not None or answers in teachers:
                    continue
                teachers.add(answers)
            time = latency[row.run, row.subject]
            found.append(Entry(source, row, time, own, images, _machine(source, time)))
    return found


def _content(kept: Kept, row: AccuracyRow) -> str:
    """A fingerprint of a suite's images, their order, labels and classes."""
    parts = [*kept.ids(row.run, row.suite), *kept.classes(row.run, row.suite)]
    named = hashlib.sha256("\0".join(parts).encode())
    named.update(kept.labels(row.run, row.suite).astype("<i8").tobytes())
    return named.hexdigest()[:16]


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _machine(source: Source, row: LatencyRow) -> tuple[str, ...]:
    env = source.kept.report.environment
    protocol = "quick" if source.kept.report.quick else "full"
    return (
        env["cpu"],
        f"{env['usable_cores']} cores",
        f"governor {env['governor'] or 'unknown'}",
        f"{protocol} protocol",
    )


def groups(found: Sequence[Entry], by: str) -> list[list[Entry]]:
    """Entries that agree in `images` or in `machine`, in the order of their first appearance."""
    sorted_in: dict[tuple[object, ...], list[Entry]] = {}
    for entry in found:
        sorted_in.setdefault(getattr(entry, by), []).append(entry)
    return list(sorted_in.values())


def reference(group: Sequence[Entry]) -> Entry:
    """Whom the others are set against: the first exported file, else the first student, else the first."""
    for kind in ("artifact", "torch"):
        for entry in group:
            if entry.summary.kind == kind:
                return entry
    return group[0]


def against(entry: Entry, other: Entry) -> Difference:
    """Accuracy of `entry` minus that of `other` on the unseen domains (in domain where there are none), paired."""
    rows = [row for row in entry.accuracy if row.suite.startswith("ood:")] or list(entry.accuracy)
    pairs = []
    for row in rows:
        labels = entry.source.kept.labels(row.run, row.suite)
        mine = entry.source.kept.logits(row.run, row.subject, row.suite)
        theirs = other.source.kept.logits(other.summary.run, other.summary.subject, row.suite)
        pairs.append((metrics.correct(mine, labels), metrics.correct(theirs, labels)))
    return Difference(
        value=float(np.mean([first.mean() - second.mean() for first, second in pairs])),
        ci95=paired_interval(pairs),
        mcnemar_p=mcnemar_p(
            np.concatenate([one for one, _ in pairs]), np.concatenate([two for _, two in pairs])
        ),
    )


def differences(sources: Sequence[Source], found: Sequence[Entry]) -> list[str]:
    """What keeps these reports from being compared in full, one sentence each."""
    said = []
    contents: dict[str, dict[str, list[str]]] = {}
    for entry in found:
        for row, (suite, content) in zip(entry.accuracy, entry.images, strict=True):
            who = f"{entry.source.letter or entry.summary.run} (n = {row.n:,})"
            users = contents.setdefault(suite, {}).setdefault(content, [])
            if who not in users:
                users.append(who)
    for suite, users_of in contents.items():
        if len(users_of) > 1:
            parts = " and ".join(", ".join(users) for users in users_of.values())
            said.append(
                f"{suite} is not the same images in {parts}: their accuracies stand in separate tables."
            )
    only = [suite for suite in contents if any(suite not in dict(entry.images) for entry in found)]
    if only:
        said.append(
            f"Not everyone was measured on {', '.join(only)}: means over other suites are not compared."
        )
    machines: dict[tuple[str, ...], list[str]] = {}
    for source in sources:
        key = _machine(source, source.kept.report.latency[0])
        machines.setdefault(key, []).append(source.letter or source.name)
    if len(machines) > 1:
        parts = "; ".join(
            f"{', '.join(users)}: {', '.join(key)}" for key, users in machines.items()
        )
        said.append(
            f"Machines or protocols differ, so latencies stand in separate tables. {parts}."
        )
    said += _versions(sources)
    if len(sources) > 1:
        said.append(
            "The reports were measured at different times: what the machine did then is part of their latencies. "
            "For a ratio with an interval measure two files in turns: edgekd benchmark A B --compare."
        )
    return said


def _versions(sources: Sequence[Source]) -> list[str]:
    said = []
    environments = [source.kept.report.environment for source in sources]
    for package in dict.fromkeys(name for env in environments for name in env["versions"]):
        values = [env["versions"].get(package) for env in environments]
        if len(set(values)) > 1:
            told = ", ".join(
                f"{s.letter} {value or 'none'}" for s, value in zip(sources, values, strict=True)
            )
            said.append(f"Versions of {package} differ: {told}.")
    return said
