"""The schema of `report.json`, and rows about several subjects. For rows about one subject, see `rows`.

`python -m edgekd.benchmark.results.schema` prints the JSON Schema.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from edgekd.benchmark.results.metric import metric, metrics_of
from edgekd.benchmark.results.rows import (
    HERE,
    HIGHER,
    AccuracyRow,
    CorruptionRow,
    Count,
    CueConflictRow,
    Difference,
    Family,
    Fraction,
    Frozen,
    Interval,
    LatencyRow,
    OwnMetricsRow,
    PlacementRow,
    Row,
    SummaryRow,
    ThroughputRow,
    Time,
    UnknownRow,
    VocabularyRow,
)
from edgekd.core.manifest import Parity
from edgekd.targets.timing.speed import Ratio

SCHEMA_VERSION = 3
READABLE_VERSIONS = (2, 3)


Cause = Literal["distillation", "unlabelled", "run"]
Where = Literal["id", "ood", "adapted"]


class GainRow(Row):
    """Accuracy of a subject minus that of the subject of the same name in another run, on the same images."""

    base_run: str
    cause: Cause
    """Difference of the two runs: distillation against a baseline without teacher, training with against without
    unlabelled images, or anything else."""
    where: Where
    suites: tuple[str, ...]
    n: Count = metric("images", "count")
    gain: Difference = metric("gain", "points", HIGHER, gate=False)
    """Top-1 minus that of the base run on the same images. Interval: paired bootstrap, 10,000 draws."""


class GateRow(Frozen):
    """One gate on one file. A gate that could not be evaluated has no value and has not passed."""

    expression: str
    run: str | None
    subject: str | None
    """Null if no file was measured."""
    metric: str
    operator: Literal["<=", ">=", "<", ">"]
    limit: float
    value: float | None
    passed: bool
    reason: str | None
    """Reason if it could not be evaluated."""


class SuiteComparison(Frozen):
    """Accuracy of A minus accuracy of B on the same images of one suite."""

    suite: str
    n: Count = metric("images", "count")
    a: Fraction = metric("A", "%")
    b: Fraction = metric("B", "%")
    value: float = metric("A − B", "points", interval="ci95")
    """Top-1 of A minus top-1 of B."""
    ci95: Interval
    mcnemar_p: Fraction = metric("p", "p")
    agreement: Fraction = metric("agreement", "%")


class Comparison(Frozen):
    """Comparison of two files: latency in alternating blocks, accuracy on the same images."""

    a_run: str
    a: str
    b_run: str
    b: str
    p50_a_ms: Time
    p50_b_ms: Time
    p50_ratio: float
    """p50 of A / p50 of B: below 1, A is faster."""
    p50_ratio_ci95: Interval
    turns: Count
    """Pairs of alternating blocks."""
    processes: Count
    accuracy: tuple[SuiteComparison, ...]
    withheld: str | None = None
    """Why no claim about speed is made; null where it holds."""


class SpeedRow(Frozen):
    """Two exported files of one run on one device: p50 of A / p50 of B, and whether a claim about speed is made."""

    a_run: str
    a: str
    b_run: str
    b: str
    device: str = HERE
    ratio: float
    """Below 1, A is faster."""
    ci95: Interval
    withheld: str | None
    """Why no claim about speed is made; null where it holds."""


class RunFacts(BaseModel):
    """Fields of a run in a report's context that are read."""

    model_config = ConfigDict(extra="allow")
    name: str
    split_hash: str = ""


class ArtifactFacts(BaseModel):
    """Fields of an artifact in a report's context that are read."""

    model_config = ConfigDict(extra="allow")
    run: str
    name: str
    format: str
    files: dict[str, str] = Field(default_factory=dict)
    parity: Parity
    quantization: dict[str, Any] | None = None


class Context(BaseModel):
    """Facts about a report's runs and artifacts that are not measurements."""

    model_config = ConfigDict(extra="allow")
    runs: list[RunFacts] = Field(default_factory=list)
    artifacts: list[ArtifactFacts] = Field(default_factory=list)


class SuiteRow(Frozen):
    """One suite of test images."""

    suite: str
    run: str | None
    """Run whose subjects are measured on it; null for all runs."""
    family: Family
    data: str
    n: Count
    classes: Count
    domains: tuple[str, ...]
    remarks: tuple[str, ...]
    excluded: dict[str, int] = Field(default_factory=dict)
    """Role in training (`train`, `val`, `unlabelled`) → number of images left out for it. `tested`: left out because
    they are in another suite of an unseen domain."""


AnyRow = TypeVar("AnyRow", bound=Row)


class Report(Frozen):
    """A benchmark's results."""

    folder: Path = Field(default=Path(), exclude=True)
    """The report's folder; not part of the file."""
    schema_version: int = SCHEMA_VERSION
    created: str
    quick: bool
    notes: tuple[str, ...]
    gates: tuple[GateRow, ...] = ()
    suites: tuple[SuiteRow, ...]
    summary: tuple[SummaryRow, ...]
    gains: tuple[GainRow, ...] = ()
    accuracy: tuple[AccuracyRow, ...]
    latency: tuple[LatencyRow, ...]
    throughput: tuple[ThroughputRow, ...] = ()
    corruptions: tuple[CorruptionRow, ...] = ()
    cue_conflicts: tuple[CueConflictRow, ...] = ()
    vocabularies: tuple[VocabularyRow, ...] = ()
    unknowns: tuple[UnknownRow, ...] = ()
    own_metrics: tuple[OwnMetricsRow, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    speed: tuple[SpeedRow, ...] = ()
    placements: tuple[PlacementRow, ...] = ()
    protocol: dict[str, Any]
    """Limits of the latency protocol, every preprocessing by its hash, seconds spent."""
    context: dict[str, Any]
    """Facts of the runs and of the exported files."""
    environment: dict[str, Any]
    """Machine, versions, state before and after, devices."""

    def _repr_html_(self) -> str:
        """Return the main numbers, and the chart if the report's folder has it."""
        known = metrics_of(SummaryRow)
        keys = [
            key
            for key in ("id", "ood_avg", "adapted_avg", "size_mb")
            if any(getattr(row, key) is not None for row in self.listed)
        ]
        lines = [["", *(known[key].heading for key in keys), "p90 ms"]]
        for row in self.listed:
            numbers = (known[key].shown(row, key) for key in keys)
            lines.append([self.label(row), *numbers, f"{self.time(row).p90_ms:.2f}"])
        cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in lines)
        table = "".join(f"<tr>{row}</tr>" for row in cells)
        chart, picture = "", self.folder / "report.png"
        if picture.is_file():
            data = base64.b64encode(picture.read_bytes()).decode()
            chart = f'<img alt="Accuracy against latency" width="800" src="data:image/png;base64,{data}">'
        title = html.escape(f"Benchmark, {self.folder}")
        return f"<table><caption>{title}</caption>{table}</table>{chart}"

    @property
    def runs(self) -> list[str]:
        """Names of the runs."""
        return list(dict.fromkeys(row.run for row in self.summary))

    @property
    def listed(self) -> list[SummaryRow]:
        """Return one row per model; a shared teacher appears once."""
        return [row for row in self.summary if row.same_as is None]

    @property
    def exported(self) -> list[SummaryRow]:
        """The rows of the exported files."""
        return [row for row in self.summary if row.kind == "artifact"]

    @property
    def exported_latency(self) -> list[LatencyRow]:
        """The latencies of the exported files."""
        exported = {row.who for row in self.exported}
        return [row for row in self.latency if row.who in exported]

    def time(self, row: Row) -> LatencyRow:
        """Return the latency of the same subject."""
        return next(one for one in self.latency if one.who == row.who)

    def speed_of(self, first: Row, second: Row) -> Ratio | None:
        """Return p50 of the first / p50 of the second; None if they were not compared."""
        for row in self.speed:
            pair = (row.a_run, row.a), (row.b_run, row.b)
            if pair == (first.who, second.who):
                return Ratio(row.ratio, row.ci95, row.withheld)
            if pair == (second.who, first.who):
                return Ratio(1 / row.ratio, (1 / row.ci95[1], 1 / row.ci95[0]), row.withheld)
        return None

    def label(self, row: Row) -> str:
        """Return the subject's name for tables, after the run's name if the report has several runs."""
        names = {"teacher": "teacher zero-shot", "torch": "torch student"}
        kind = next(one.kind for one in self.summary if one.who == row.who)
        name = names.get(kind, row.subject)
        shared = kind == "teacher" and sum(one.kind == "teacher" for one in self.listed) == 1
        return name if shared or len(self.runs) == 1 else f"{row.run}: {name}"

    def families(self, *families: str) -> set[str]:
        """Return the names of the suites of these families."""
        return {row.suite for row in self.suites if row.family in families}

    def shown(self, rows: Iterable[AnyRow]) -> list[AnyRow]:
        """Return the rows without models that are listed under another run."""
        listed = {row.who for row in self.listed}
        return [row for row in rows if row.who in listed]


def of(rows: Iterable[AnyRow], who: Row) -> list[AnyRow]:
    """Return the rows about the same subject."""
    return [row for row in rows if row.who == who.who]


def load_of(environment: Mapping[str, Any], device: str) -> float | None:
    """Return the load average per core before the run, of this machine or a device; None if unknown."""
    devices = {one["device"]: one for one in environment.get("devices", ())}
    facts = devices.get(device, environment)
    load, cores = facts["before"].get("load_average"), facts.get("usable_cores")
    return None if load is None or not cores else float(load) / float(cores)


if __name__ == "__main__":
    print(json.dumps(Report.model_json_schema(mode="serialization"), indent=2, ensure_ascii=False))
