"""Gates: sentences such as `ood_avg_drop<=1.5` or `p90_ms<=20` that every measured artifact must make true.

Accuracies are in percent, drops in points against the torch student of the same run on the same images, calibration
errors 0–1, times in ms, sizes in MB. A gate that cannot be evaluated has not passed.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from pydantic import BaseModel

from edgekd.benchmark.report.metric import Metric, metrics_of
from edgekd.benchmark.report.rows import (
    AccuracyRow,
    CorruptionRow,
    DetectionRow,
    SummaryRow,
    UnknownRow,
)
from edgekd.benchmark.report.schema import GateRow, Report, of
from edgekd.benchmark.report.timings import LatencyRow
from edgekd.core.errors import EdgekdError, did_you_mean

Operator = Literal["<=", ">=", "<", ">"]
_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_ROWS: dict[str, type[BaseModel]] = {
    "summary": SummaryRow,
    "latency": LatencyRow,
    "corruptions": CorruptionRow,
}
_ALONE: dict[str, tuple[str, Metric]] = {
    key: (field, metric)
    for field, row in _ROWS.items()
    for key, metric in metrics_of(row).items()
    if metric.gated
}
"""Metric → the report's field whose rows have it, and its definition."""
_DROPS = {f"{key}_drop": key for key in ("id", "ood_avg", "ood_worst", "adapted_avg")}
_WORST_UNKNOWN = "unknown_auroc_worst"
METRICS = (*_ALONE, *_DROPS, _WORST_UNKNOWN)
"""Names that stand alone."""
_OF_SUITE = {key: metric for key, metric in metrics_of(AccuracyRow).items() if metric.gated}
_DETECTION = {key: metric for key, metric in metrics_of(DetectionRow).items() if metric.gated}
_UNKNOWN = {
    **_DETECTION,
    **{f"{key}_mls": metric for key, metric in _DETECTION.items()},
    "confidence": metrics_of(UnknownRow)["confidence"],
}
_UNKNOWN_DROPS = ("auroc_drop", "auroc_drop_mls")
SUITE_METRICS = (*_OF_SUITE, "drop", *_UNKNOWN, *_UNKNOWN_DROPS)
"""Names that take a suite: `top1[ood:sketch]`."""
_ON_A_SCALE_OF_100 = {
    *(key for key, (_, metric) in _ALONE.items() if metric.unit == "%"),
    *(key for key, metric in (_OF_SUITE | _UNKNOWN).items() if metric.unit == "%"),
    _WORST_UNKNOWN,
}
_NO_TORCH = "the torch student was not measured"
_SHORT = {"mb": "size_mb"}
_FORM = re.compile(r"\s*([A-Za-z_0-9]+)\s*(?:\[\s*([^\]]+?)\s*\])?\s*(<=|>=|<|>)\s*([^\s<>=]+)\s*")


@dataclass(frozen=True)
class Gate:
    """One parsed gate; `suite` is None for the metrics that stand alone."""

    expression: str
    metric: str
    suite: str | None
    operator: Operator
    limit: float

    @property
    def name(self) -> str:
        return self.metric if self.suite is None else f"{self.metric}[{self.suite}]"


def parse_gate(expression: str) -> Gate:
    """`METRIC<=LIMIT` or `METRIC[SUITE]<=LIMIT`, with any of `<= >= < >`.

    Raises:
        EdgekdError: another form, an unknown metric, a limit that is no number or on the wrong scale.
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
            suite_of = "unknown:NAME" if metric in (*_UNKNOWN, *_UNKNOWN_DROPS) else "id"
            hint = f"Say on which suite: {metric}[{suite_of}]{sign}{text}."
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
    if metric in _ON_A_SCALE_OF_100 and sign in (">=", ">") and 0 < limit <= 1:
        raise EdgekdError(
            f'The gate "{expression}" would let everything pass: {metric} is in percent.',
            f"Write {metric}{'' if suite is None else f'[{suite}]'}{sign}{100 * limit:g}.",
        )
    return Gate(expression.strip(), metric, suite, cast(Operator, sign), limit)


def parse_gates(expressions: Iterable[str]) -> list[Gate]:
    """Parse several; one given twice counts once."""
    return list({gate.expression: gate for gate in map(parse_gate, expressions)}.values())


def gates_of_table(table: Mapping[str, object]) -> list[str]:
    """The `[gates]` table of a TOML file as expressions: `ood_avg_drop = "<=1.5"`, or a list of such limits.

    Raises:
        EdgekdError: a limit that does not begin with an operator.
    """
    expressions = []
    for metric, limits in table.items():
        for limit in limits if isinstance(limits, list) else [limits]:
            if not isinstance(limit, str) or not limit.strip().startswith(("<", ">")):
                raise EdgekdError(
                    f"The gate {metric} = {limit!r} has no operator.",
                    f'Write {metric} = "<={limit}" or ">={limit}".',
                )
            expressions.append(f"{metric}{limit}")
    return expressions


def evaluate(gates: Sequence[Gate], report: Report) -> tuple[GateRow, ...]:
    """Every gate on every artifact of the report, in the order of the gates."""
    artifacts = [row for row in report.summary if row.kind == "artifact"]
    found = []
    for gate in gates:
        for artifact in artifacts:
            value, reason = _value(gate, artifact, report)
            found.append(_row(gate, artifact.run, artifact.subject, value, reason))
        if not artifacts:
            found.append(_row(gate, None, None, None, "no artifact was measured"))
    return tuple(found)


def _row(
    gate: Gate, run: str | None, subject: str | None, value: float | None, reason: str | None
) -> GateRow:
    passed = value is not None and bool(_COMPARE[gate.operator](value, gate.limit))
    return GateRow(
        expression=gate.expression, run=run, subject=subject, metric=gate.name, operator=gate.operator,
        limit=gate.limit, value=value, passed=passed, reason=reason,
    )  # fmt: skip


def _value(gate: Gate, artifact: SummaryRow, report: Report) -> tuple[float | None, str | None]:
    """Return the number a gate compares, else the reason why there is none."""
    if gate.suite is not None:
        return _on_suite(gate, artifact, report)
    if gate.metric == _WORST_UNKNOWN:
        lowest = min((row.msp.auroc for row in of(report.unknowns, artifact)), default=None)
        missing = "no images of unknown classes were measured (--unknown)"
        return _number(lowest, _DETECTION["auroc"], missing)
    if gate.metric in _DROPS:
        metric = _ALONE[_DROPS[gate.metric]][1]
        torch = _torch(artifact, report)
        if torch is None:
            return None, _NO_TORCH
        before, after = (getattr(row, _DROPS[gate.metric]) for row in (torch, artifact))
        return _number(None if None in (before, after) else before - after, metric)
    field, metric = _ALONE[gate.metric]
    found = of(getattr(report, field), artifact)
    if not found:
        return None, metrics_of(CorruptionRow)["robust_accuracy"].missing
    return _number(getattr(found[0], gate.metric), metric)


def _torch(artifact: SummaryRow, report: Report) -> SummaryRow | None:
    return next(
        (row for row in report.summary if (row.run, row.kind) == (artifact.run, "torch")), None
    )


def _on_unknown(
    gate: Gate, artifact: SummaryRow, report: Report
) -> tuple[float | None, str | None]:
    by_suite = {row.suite: row for row in of(report.unknowns, artifact)}
    row = by_suite.get(gate.suite or "")
    if row is None:
        measured = (
            f"measured: {', '.join(by_suite)}" if by_suite else "none was measured (--unknown)"
        )
        return None, f"no suite {gate.suite} of unknown classes; {measured}"
    if gate.metric == "confidence":
        return _number(row.confidence, _UNKNOWN["confidence"])
    found = row.mls if gate.metric.endswith("_mls") else row.msp
    if gate.metric in _UNKNOWN_DROPS:
        cost = found.auroc_cost
        return _number(cost.value if cost else None, _DETECTION["auroc"], _NO_TORCH)
    return _number(getattr(found, gate.metric.removesuffix("_mls")), _UNKNOWN[gate.metric])


def _on_suite(gate: Gate, artifact: SummaryRow, report: Report) -> tuple[float | None, str | None]:
    if gate.metric in (*_UNKNOWN, *_UNKNOWN_DROPS):
        return _on_unknown(gate, artifact, report)
    by_suite = {row.suite: row for row in of(report.accuracy, artifact)}
    row = by_suite.get(gate.suite or "")
    if row is None and any(one.suite == gate.suite for one in of(report.unknowns, artifact)):
        return None, f"no class is the right answer on {gate.suite}"
    if row is None:
        measured = (name for name in by_suite if not name.startswith("corruption:"))
        return None, f"no suite {gate.suite}; measured: {', '.join(measured)}"
    if gate.metric != "drop":
        return _number(getattr(row, gate.metric), _OF_SUITE[gate.metric])
    torch = _torch(artifact, report)
    before = [one for one in of(report.accuracy, torch) if one.suite == gate.suite] if torch else []
    return _number(before[0].top1 - row.top1 if before else None, _OF_SUITE["top1"], _NO_TORCH)


def _number(
    value: float | None, metric: Metric, missing: str = ""
) -> tuple[float | None, str | None]:
    """Return a value in the unit of gates, or the reason why it is missing."""
    if value is None:
        return None, missing or metric.missing
    return metric.in_unit(value), None
