"""The main table of a report as text cells, and how each kind of number is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from edgekd.benchmark.findings import UnknownRow
from edgekd.benchmark.rows import LatencyRow, Report, SummaryRow

QUICK_MARK = "QUICK – indicative only"
NONE = "–"


@dataclass(frozen=True)
class MainTable:
    """Cells as text. `rows` holds the run's name and the cells after it."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def main_table(report: Report) -> MainTable:
    """A row for each subject, a teacher that runs share once; accuracies and gap in percent and points."""
    domains = list(dict.fromkeys(domain for row in report.summary for domain in row.ood))
    apart = list(dict.fromkeys(suite for row in report.summary for suite in row.apart))
    several = len(domains) > 1
    latency = {(row.run, row.subject): row for row in report.latency}
    header = (
        "subject",
        "ID",
        *apart,
        *(f"OOD:{domain}" for domain in domains),
        *(("OOD avg", "OOD worst") if several else ()),
    )
    header += ("gap", "retention", "ECE ID / OOD", "p50 ms [95 % CI]", "p90 ms", "MB")
    rows = []
    for row in report.summary:
        if row.same_as is not None:
            continue
        time = latency[row.run, row.subject]
        cells = (
            label(row),
            percent(row.id),
            *(percent(row.apart.get(suite)) for suite in apart),
            *(percent(row.ood.get(domain)) for domain in domains),
            *((percent(row.ood_avg), percent(row.ood_worst)) if several else ()),
            percent(row.gap),
            percent(row.retention),
            f"{fraction(row.ece_id)} / {fraction(row.ece_ood)}",
            f"{ms(time.p50_ms)} [{ms(time.p50_ci95_ms[0])}, {ms(time.p50_ci95_ms[1])}]{mark(time)}",
            ms(time.p90_ms) + mark(time),
            NONE if row.size_mb is None else f"{row.size_mb:.2f}",
        )
        rows.append((row.run, cells))
    return MainTable(header, tuple(rows))


def label(row: SummaryRow) -> str:
    return {"teacher": "teacher zero-shot", "torch": "torch student"}.get(row.kind, row.subject)


def mark(row: LatencyRow) -> str:
    """† for a latency that was only measured as background."""
    return "†" if row.protocol == "context" else ""


def percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def fraction(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def ms(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def most_frequent(kinds: Mapping[str, int], at_most: int = 6) -> str:
    """`Conv 52, QuantizeLinear 30 …` and how many kinds more."""
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(ordered) - at_most} more kinds" if len(ordered) > at_most else ""
    return ", ".join(f"{kind} {count}" for kind, count in ordered[:at_most]) + more


def millijoules(value: float | None) -> str:
    """Joules as millijoules."""
    return NONE if value is None else f"{1e3 * value:.3g}" if value < 1 else f"{1e3 * value:.0f}"


SIZE_HEADER = ("run", "subject", "parameters, M", "MACs, M", "MB")


def size_cells(row: SummaryRow) -> tuple[str, ...]:
    """Parameters and multiply-accumulates in millions, size of the files; n/a where the graph cannot be counted."""
    counts = ("n/a" if one is None else f"{one / 1e6:,.2f}" for one in (row.parameters, row.macs))
    return (row.run, label(row), *counts, NONE if row.size_mb is None else f"{row.size_mb:.2f}")


def size_rows(report: Report) -> list[tuple[str, ...]]:
    """A row for each subject, a teacher that runs share once."""
    return [size_cells(row) for row in report.summary if row.same_as is None]


THROUGHPUT_HEADER = ("run", "file", "batch", "threads", "images/s [95 % CI]", "calls")


def throughput_rows(report: Report) -> list[tuple[str, ...]]:
    """A row for each file, batch size and thread count; n/a with its reason where the file refused."""
    rows: list[tuple[str, ...]] = []
    for row in report.throughput:
        if row.images_per_s is None or row.images_per_s_ci95 is None:
            rate = f"n/a: {row.reason}"
        else:
            low, high = row.images_per_s_ci95
            rate = f"{row.images_per_s:,.1f} [{low:,.1f}, {high:,.1f}]" + (
                "" if row.settled else " (unsettled)"
            )
        threads = "default" if row.threads is None else str(row.threads)
        rows.append((row.run, row.subject, str(row.batch), threads, rate, f"{row.calls:,}"))
    return rows


UNKNOWN_HEADER = ("run", "subject", "suite", "score", "AUROC [95 % CI]", "loss, points [95 % CI]", "FPR95", "AUPR-out",
                  "AUPR-in", "confidence unknown / known")  # fmt: skip


def unknown_rows(report: Report) -> list[tuple[str, ...]]:
    """Suite by suite and score by score a line for each subject; a teacher that runs share once."""
    shared = {(row.run, row.subject) for row in report.summary if row.same_as is not None}
    rows = [row for row in report.unknowns if (row.run, row.subject) not in shared]
    return [
        _unknown_cells(row, score)
        for suite in dict.fromkeys(row.suite for row in rows)
        for score in ("softmax", "logit")
        for row in rows
        if row.suite == suite
    ]


def _unknown_cells(row: UnknownRow, score: str) -> tuple[str, ...]:
    found = row.msp if score == "softmax" else row.mls
    low, high = found.auroc_ci95
    cost = found.auroc_cost
    return (
        row.run, row.subject, row.suite, score, f"{percent(found.auroc)} [{percent(low)}, {percent(high)}]",
        NONE if cost is None else f"{_points(cost.value)} [{', '.join(map(_points, cost.ci95))}]",
        percent(found.fpr95), percent(found.aupr_out), percent(found.aupr_in),
        f"{percent(row.confidence)} / {percent(row.confidence_inside)}" if score == "softmax" else NONE,
    )  # fmt: skip


def _points(fraction: float) -> str:
    """With its sign; what rounds to nothing has a plus."""
    return f"{round(100 * fraction, 1) + 0.0:+.1f}"


def p_value(value: float) -> str:
    return "<0.001" if value < 0.0005 else f"{value:.3f}"


def cost_rows(report: Report, p: Callable[[float], str]) -> Iterator[tuple[str, ...]]:
    """What the export cost, a row for each artifact with a torch student; `p` words McNemar's p."""
    for row in report.summary:
        if row.quant_cost_id is None and row.quant_cost_ood is None:
            continue
        cells: list[str] = []
        for cost in (row.quant_cost_id, row.quant_cost_ood):
            if cost is None:
                cells += [NONE, NONE]
            else:
                low, high = (100 * end for end in cost.ci95)
                cells += [f"{100 * cost.value:+.1f} [{low:+.1f}, {high:+.1f}]", p(cost.mcnemar_p)]
        yield (
            row.run,
            row.subject,
            *cells,
            f"{percent(row.agreement_id)} / {percent(row.agreement_ood)}",
        )
