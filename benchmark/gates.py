"""Gates: conditions such as `ood_avg_drop<=1.5` or `p90_ms<=20` on every measured artifact.

Accuracies are in percent, drops in points against the torch student of the same run on the same images, calibration
errors 0–1, times in ms, sizes in MB. A gate that cannot be evaluated has not passed.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from pydantic import BaseModel

from edgekd.benchmark.results.metric import Metric, metrics_of
from edgekd.benchmark.results.rows import (
    AccuracyRow,
    CorruptionRow,
    DetectionRow,
    LatencyRow,
    SummaryRow,
    UnknownRow,
)
from edgekd.benchmark.results.schema import GateRow, Report, of
from edgekd.core.errors import EdgekdError, did_you_mean

Operator = Literal["<=", ">=", "<", ">"]
_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_FORM = re.compile(r"\s*([A-Za-z_0-9]+)\s*(?:\[\s*([^\]]+?)\s*\])?\s*(<=|>=|<|>)\s*([^\s<>=]+)\s*")
_SHORT = {"mb": "size_mb"}
_NO_TORCH = "the torch student was not measured"
_NO_UNKNOWN = "no images of unknown classes were measured (--unknown)"


def _gated(row: type[BaseModel]) -> dict[str, Metric]:
    return {key: metric for key, metric in metrics_of(row).items() if metric.gated}


_ROWS: dict[str, type[BaseModel]] = {
    "summary": SummaryRow,
    "latency": LatencyRow,
    "corruptions": CorruptionRow,
}
"""Field of the report with one row per artifact → class of its rows."""
_AUROC = metrics_of(DetectionRow)["auroc"]
_ALONE = {key: metric for row in _ROWS.values() for key, metric in _gated(row).items()}
_ALONE["unknown_auroc_worst"] = _AUROC
_DROPS = {f"{key}_drop": key for key in ("id", "ood_avg", "ood_worst", "adapted_avg")}
METRICS = (*_ALONE, *_DROPS)
"""Metrics without a suite."""
_UNKNOWN = {
    f"{key}{score}": metric
    for score in ("", "_mls")
    for key, metric in _gated(DetectionRow).items()
} | {
    "confidence": metrics_of(UnknownRow)["confidence"],
    "auroc_drop": _AUROC,
    "auroc_drop_mls": _AUROC,
}
_OF_SUITE = _gated(AccuracyRow) | {"drop": metrics_of(AccuracyRow)["top1"]}
SUITE_METRICS = (*_OF_SUITE, *_UNKNOWN)
"""Metrics with a suite: `top1[ood:sketch]`."""


@dataclass(frozen=True)
class Gate:
    """A parsed gate; `suite` is None for metrics without a suite."""

    expression: str
    metric: str
    suite: str | None
    operator: Operator
    limit: float

    @property
    def name(self) -> str:
        """`METRIC` or `METRIC[SUITE]`."""
        return self.metric if self.suite is None else f"{self.metric}[{self.suite}]"


def parse_gate(expression: str) -> Gate:
    """Parse `METRIC<=LIMIT` or `METRIC[SUITE]<=LIMIT`, with any of `<= >= < >`.

    Raises:
        EdgekdError: the form or metric is unknown, or the limit is not a number or on the wrong scale.
    """
    found = _FORM.fullmatch(expression)
    if found is None:
        raise EdgekdError(
            f'"{expression}" is not a gate.',
            'Write a metric, one of <= >= < >, and a number: "ood_avg_drop<=1.5".',
        )
    metric, suite, sign, text = found.groups()
    metric = _SHORT.get(metric, metric)
    known = METRICS if suite is None else SUITE_METRICS
    if metric not in known:
        if suite is None and metric in SUITE_METRICS:
            suite_of = "unknown:NAME" if metric in _UNKNOWN else "id"
            hint = f"Name the suite: {metric}[{suite_of}]{sign}{text}."
        elif suite is not None and metric in METRICS:
            hint = f"It takes no suite: {metric}{sign}{text}."
        else:
            hint = did_you_mean(metric, known)
        raise EdgekdError(
            f'The gate "{expression}" names no metric of {"a suite" if suite else "a report"}.',
            hint,
        )
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise EdgekdError(
            f'The limit of the gate "{expression}" is not a number.',
            "Write a plain number, no unit.",
        )
    gate = Gate(expression.strip(), metric, suite, cast(Operator, sign), limit)
    known_metric = (_ALONE | _OF_SUITE | _UNKNOWN).get(metric)
    is_share = known_metric is not None and known_metric.unit == "%" and "drop" not in metric
    if is_share and sign in (">=", ">") and 0 < limit <= 1:
        raise EdgekdError(
            f'The gate "{expression}" would let everything pass: {metric} is in percent.',
            f"Write {gate.name}{sign}{100 * limit:g}.",
        )
    return gate


def parse_gates(expressions: Iterable[str]) -> list[Gate]:
    """Parse several gates without duplicates."""
    return list({gate.expression: gate for gate in map(parse_gate, expressions)}.values())


Value = tuple[float | None, str | None]
"""A number in the unit of gates, or None and the reason."""


def evaluate(gates: Sequence[Gate], report: Report) -> tuple[GateRow, ...]:
    """Return every gate on every artifact of the report, in the order of the gates."""
    artifacts = [(row, _values(row, report)) for row in report.exported]
    rows = []
    for gate in gates:
        judged: list[tuple[str | None, str | None, Value]] = [
            (row.run, row.subject, values.get(gate.name) or (None, _unmeasured(gate, row, report)))
            for row, values in artifacts
        ]
        for run, subject, (value, reason) in judged or [
            (None, None, (None, "no artifact was measured"))
        ]:
            passed = value is not None and bool(_COMPARE[gate.operator](value, gate.limit))
            rows.append(
                GateRow(
                    expression=gate.expression,
                    run=run,
                    subject=subject,
                    metric=gate.name,
                    operator=gate.operator,
                    limit=gate.limit,
                    value=value,
                    passed=passed,
                    reason=reason,
                )
            )
    return tuple(rows)


def _value(metric: Metric, value: float | None, missing: str = "") -> Value:
    return (None, missing or metric.missing) if value is None else (metric.in_unit(value), None)


def _values(artifact: SummaryRow, report: Report) -> dict[str, Value]:
    """Return the values of an artifact for gates, by `Gate.name`."""
    values: dict[str, Value] = {}
    absent = metrics_of(CorruptionRow)["robust_accuracy"].missing
    for field, kind in _ROWS.items():
        rows = of(getattr(report, field), artifact)
        for key, metric in _gated(kind).items():
            values[key] = _value(metric, getattr(rows[0], key)) if rows else (None, absent)
    torch = next((r for r in report.summary if (r.run, r.kind) == (artifact.run, "torch")), None)
    for name, key in _DROPS.items():
        before, after = getattr(torch, key, None), getattr(artifact, key)
        lost = None if before is None or after is None else before - after
        values[name] = _value(_ALONE[key], lost, "" if torch else _NO_TORCH)
    torch_top1 = {row.suite: row.top1 for row in of(report.accuracy, torch)} if torch else {}
    for row in of(report.accuracy, artifact):
        for key, metric in _gated(AccuracyRow).items():
            values[f"{key}[{row.suite}]"] = _value(metric, getattr(row, key))
        lost = torch_top1[row.suite] - row.top1 if row.suite in torch_top1 else None
        values[f"drop[{row.suite}]"] = _value(_OF_SUITE["drop"], lost, _NO_TORCH)
    unknown = of(report.unknowns, artifact)
    for one in unknown:
        values[f"confidence[{one.suite}]"] = _value(_UNKNOWN["confidence"], one.confidence)
        for score, detection in (("", one.msp), ("_mls", one.mls)):
            for key, metric in _gated(DetectionRow).items():
                values[f"{key}{score}[{one.suite}]"] = _value(metric, getattr(detection, key))
            cost = detection.auroc_cost.value if detection.auroc_cost else None
            values[f"auroc_drop{score}[{one.suite}]"] = _value(_AUROC, cost, _NO_TORCH)
    lowest = min((one.msp.auroc for one in unknown), default=None)
    return values | {"unknown_auroc_worst": _value(_AUROC, lowest, _NO_UNKNOWN)}


def _unmeasured(gate: Gate, artifact: SummaryRow, report: Report) -> str:
    """Return why an artifact has no value for a gate on a suite."""
    unknown = [row.suite for row in of(report.unknowns, artifact)]
    if gate.metric in _UNKNOWN:
        measured = f"measured: {', '.join(unknown)}" if unknown else "none was measured (--unknown)"
        return f"no suite {gate.suite} of unknown classes; {measured}"
    if gate.suite in unknown:
        return f"no class is the right answer on {gate.suite}"
    suites = (row.suite for row in of(report.accuracy, artifact))
    measured = ", ".join(name for name in suites if not name.startswith("corruption:"))
    return f"no suite {gate.suite}; measured: {measured}"
