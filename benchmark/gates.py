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

from edgekd.benchmark.findings import GateRow, UnknownRow
from edgekd.benchmark.rows import AccuracyRow, LatencyRow, Report, SummaryRow
from edgekd.errors import EdgekdError, did_you_mean

Operator = Literal["<=", ">=", "<", ">"]
_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_PERCENT = ("id", "ood_avg", "ood_worst", "gap", "retention", "agreement_id", "agreement_ood")
_DROPS = {"id_drop": "id", "ood_avg_drop": "ood_avg", "ood_worst_drop": "ood_worst"}
_PLAIN = ("ece_id", "ece_ood", "ece_id_scaled", "ece_ood_scaled", "temperature", "size_mb")
_LATENCY = ("p50_ms", "p90_ms", "p99_ms", "mean_ms", "first_ms", "load_ms", "prepare_p50_ms")
_CORRUPTION = ("robust_accuracy", "mce")
_PER_SUITE_PERCENT = ("top1", "macro", "worst_class_recall", "worst_domain_top1", "agreement")
_PER_SUITE_PLAIN = ("ece", "adaptive_ece", "nll", "brier")
_UNKNOWN = ("auroc", "aupr_out", "aupr_in", "fpr95")
_UNKNOWN_PERCENT = (*_UNKNOWN, *(f"{name}_mls" for name in _UNKNOWN), "confidence")
_UNKNOWN_DROPS = ("auroc_drop", "auroc_drop_mls")
METRICS = (*_PERCENT, *_DROPS, *_PLAIN, *_LATENCY, *_CORRUPTION, "unknown_auroc_worst")
"""Names that stand alone."""
SUITE_METRICS = (*_PER_SUITE_PERCENT, "drop", *_PER_SUITE_PLAIN, *_UNKNOWN_PERCENT, *_UNKNOWN_DROPS)
"""Names that take a suite: `top1[ood:sketch]`."""
_ON_A_SCALE_OF_100 = {
    *_PERCENT, *_PER_SUITE_PERCENT, "robust_accuracy", "mce", *_UNKNOWN_PERCENT, "unknown_auroc_worst",
}  # fmt: skip
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
    known = METRICS if suite is None else SUITE_METRICS
    if metric not in known:
        if suite is None and metric in SUITE_METRICS:
            suite_of = "unknown:NAME" if metric in (*_UNKNOWN_PERCENT, *_UNKNOWN_DROPS) else "id"
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


def failed_table(rows: Sequence[GateRow]) -> list[str]:
    """The gates that did not pass, as aligned lines under a heading; empty where all passed."""
    cells = [("gate", "artifact", "measured", "limit")]
    for row in rows:
        if not row.passed:
            measured = f"not evaluated: {row.reason}" if row.value is None else f"{row.value:.4g}"
            who = "–" if row.subject is None else f"{row.run}/{row.subject}"
            cells.append((row.metric, who, measured, f"{row.operator} {row.limit:g}"))
    if len(cells) == 1:
        return []
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def _row(
    gate: Gate, run: str | None, subject: str | None, value: float | None, reason: str | None
) -> GateRow:
    passed = value is not None and bool(_COMPARE[gate.operator](value, gate.limit))
    return GateRow(
        expression=gate.expression, run=run, subject=subject, metric=gate.name, operator=gate.operator,
        limit=gate.limit, value=value, passed=passed, reason=reason,
    )  # fmt: skip


def _value(gate: Gate, artifact: SummaryRow, report: Report) -> tuple[float | None, str | None]:
    """The number a gate looks at, else why there is none."""
    if gate.suite is not None:
        return _on_suite(gate, artifact, report)
    metric = gate.metric
    if metric in _LATENCY:
        row = _own(report.latency, artifact)
        return _or(
            getattr(row, metric),
            "too few samples to state it" if metric == "p99_ms" else "it was not measured",
        )
    if metric in _CORRUPTION:
        found = [
            row
            for row in report.corruptions
            if (row.run, row.subject) == (artifact.run, artifact.subject)
        ]
        if not found:
            return None, "the corruptions were not measured (--suites corruptions)"
        return _percent(
            getattr(found[0], metric),
            "no denominators: neither 1,000 classes nor a teacher that errs on each corruption",
        )
    if metric == "unknown_auroc_worst":
        lowest = min((row.msp.auroc for row in _strangers(artifact, report)), default=None)
        return _percent(lowest, "no images of unknown classes were measured (--unknown)")
    if metric in _DROPS:
        torch = next(
            (row for row in report.summary if (row.run, row.kind) == (artifact.run, "torch")), None
        )
        if torch is None:
            return None, "the torch student was not measured"
        before, after = getattr(torch, _DROPS[metric]), getattr(artifact, _DROPS[metric])
        return (
            (None, _missing(metric))
            if before is None or after is None
            else (_points(before - after), None)
        )
    value = getattr(artifact, metric)
    return _percent(value, _missing(metric)) if metric in _PERCENT else _or(value, _missing(metric))


def _strangers(artifact: SummaryRow, report: Report) -> list[UnknownRow]:
    return [
        row for row in report.unknowns if (row.run, row.subject) == (artifact.run, artifact.subject)
    ]


def _on_unknown(
    gate: Gate, artifact: SummaryRow, report: Report
) -> tuple[float | None, str | None]:
    of = {row.suite: row for row in _strangers(artifact, report)}
    row = of.get(gate.suite or "")
    if row is None:
        measured = f"measured: {', '.join(of)}" if of else "none was measured (--unknown)"
        return None, f"no suite {gate.suite} of unknown classes; {measured}"
    if gate.metric == "confidence":
        return _points(row.confidence), None
    found = row.mls if gate.metric.endswith("_mls") else row.msp
    if gate.metric in _UNKNOWN_DROPS:
        cost = found.auroc_cost
        return (
            (None, "the torch student was not measured")
            if cost is None
            else (_points(cost.value), None)
        )
    return _points(getattr(found, gate.metric.removesuffix("_mls"))), None


def _on_suite(gate: Gate, artifact: SummaryRow, report: Report) -> tuple[float | None, str | None]:
    if gate.metric in (*_UNKNOWN_PERCENT, *_UNKNOWN_DROPS):
        return _on_unknown(gate, artifact, report)
    of = {
        row.suite: row
        for row in report.accuracy
        if (row.run, row.subject) == (artifact.run, artifact.subject)
    }
    row = of.get(gate.suite or "")
    if row is None and any(one.suite == gate.suite for one in _strangers(artifact, report)):
        return None, f"no class is the right answer on {gate.suite}"
    if row is None:
        return (
            None,
            f"no suite {gate.suite}; measured: {', '.join(name for name in of if not _is_cell(name))}",
        )
    if gate.metric != "drop":
        value = getattr(row, gate.metric)
        missing = (
            "the suite has one domain"
            if gate.metric == "worst_domain_top1"
            else "there is no torch student"
        )
        return _percent(value, missing) if gate.metric in _PER_SUITE_PERCENT else (value, None)
    torch = next(
        (one.subject for one in report.summary if (one.run, one.kind) == (artifact.run, "torch")),
        None,
    )
    before: AccuracyRow | None = next(
        (
            one
            for one in report.accuracy
            if (one.run, one.subject, one.suite) == (artifact.run, torch, gate.suite)
        ),
        None,
    )
    return (
        (None, "the torch student was not measured")
        if before is None
        else (_points(before.top1 - row.top1), None)
    )


def _own(rows: Sequence[LatencyRow], artifact: SummaryRow) -> LatencyRow:
    return next(row for row in rows if (row.run, row.subject) == (artifact.run, artifact.subject))


def _is_cell(suite: str) -> bool:
    return suite.startswith("corruption:")


def _missing(metric: str) -> str:
    if metric == "temperature" or metric.endswith("_scaled"):
        return "there were no ID validation images to fit a temperature on"
    if metric == "size_mb":
        return "its files are not here"
    if metric.startswith("agreement"):
        return "the torch student was not measured on such images"
    if "ood" in metric or metric in ("gap", "retention"):
        return (
            "no unseen domain or no teacher was measured"
            if metric == "retention"
            else "no unseen domain was measured"
        )
    return "no in-domain images were measured"


def _points(fraction: float) -> float:
    """Percent or points, without the digits that binary fractions add (a drop of 3 in 200 images is 1.5, not more)."""
    return round(100 * fraction, 9)


def _percent(value: float | None, missing: str) -> tuple[float | None, str | None]:
    return (None, missing) if value is None else (_points(value), None)


def _or(value: float | None, missing: str) -> tuple[float | None, str | None]:
    return (None, missing) if value is None else (value, None)
