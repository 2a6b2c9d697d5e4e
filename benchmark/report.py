"""The report's folder, and its table on the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edgekd.benchmark.failures import failures, thumbnails
from edgekd.benchmark.findings import Comparison, Machine
from edgekd.benchmark.gates import failed_table
from edgekd.benchmark.kept import Kept, check_arrays, read_arrays
from edgekd.benchmark.markdown import markdown
from edgekd.benchmark.measure.latency import Protocol
from edgekd.benchmark.measure.speed import ratio_text
from edgekd.benchmark.modelcard import model_card
from edgekd.benchmark.page import page
from edgekd.benchmark.picture import draw_picture
from edgekd.benchmark.rows import SCHEMA_VERSION, Report
from edgekd.benchmark.subjects import Suite
from edgekd.benchmark.table import (
    QUICK_MARK,
    UNKNOWN_HEADER,
    MainTable,
    main_table,
    ms,
    percent,
    unknown_rows,
)
from edgekd.console import is_main_process, out, result
from edgekd.errors import EdgekdError, GateFailed
from edgekd.files import csv_text, write_json, write_text
from edgekd.manifest import first_problem
from edgekd.preprocess import Preprocess
from edgekd.readers import printable_values, read_object

_DISPENSABLE = ("ECE ID / OOD", "retention", "p90 ms", "MB")
_DISPENSABLE_OF_UNKNOWN = ("AUPR-in", "AUPR-out", "confidence unknown / known", "FPR95")
"""Columns that a terminal too narrow for all goes without, in this order; report.md has them."""


def write_report(
    report: Report,
    folder: Path,
    *,
    predictions: Mapping[str, NDArray[Any]],
    latency: Mapping[str, NDArray[Any]],
    shown: Sequence[Suite] = (),
) -> None:
    """Write report.html, .json, .md and .png, the model card and the arrays into an existing folder.

    Args:
        shown: suites whose images the page may show as examples of mistakes.
    """
    kept = Kept(report, predictions, latency)
    found = failures(kept)
    html = page(kept, found, thumbnails(found, shown))
    write_json(folder / "report.json", report.model_dump(mode="json"))
    write_text(folder / "report.html", html)
    write_text(folder / "report.md", markdown(report))
    write_text(folder / "MODEL_CARD.md", model_card(report))
    draw_picture(report, folder / "report.png")
    if report.corruptions:
        write_text(folder / "corruptions.csv", corruptions_csv(report))
    np.savez_compressed(folder / "predictions.npz", **dict[str, Any](predictions))
    np.savez_compressed(folder / "latency.npz", **dict[str, Any](latency))


def report_folder(path: Path) -> Path:
    """Return `path` if it is a report's folder, else the newest report in it: of `benchmark`, `benchmark-2`, ….

    Raises:
        EdgekdError: there is none.
    """
    if (path / "report.json").is_file():
        return path
    found = [one for one in path.glob("benchmark*") if (one / "report.json").is_file()]
    if not found:
        raise EdgekdError(f"There is no report in {path}.", f"Make one: edgekd benchmark {path}.")
    return max(found, key=lambda one: (read_report(one).created, len(one.name), one.name))


def corruptions_csv(report: Report) -> str:
    """Every cell: run, subject, corruption, severity, n, top1."""
    rows: list[Sequence[object]] = [("run", "subject", "corruption", "severity", "n", "top1")]
    for row in report.corruptions:
        for name, cells in row.top1.items():
            for severity, value in enumerate(cells, start=1):
                rows.append((row.run, row.subject, name, severity, row.n, round(value, 6)))
    return csv_text(rows)


def read_report(folder: Path) -> Report:
    """Load `report.json` of a report folder.

    Raises:
        EdgekdError: no report there, a damaged one, or one of another schema version.
    """
    data = printable_values(read_object(folder / "report.json", "report"))
    if data.get("schema_version") != SCHEMA_VERSION:
        raise EdgekdError(
            f"The report at {folder} is not of schema version {SCHEMA_VERSION}.",
            "Run edgekd benchmark again.",
        )
    try:
        report = Report.model_validate(data | {"folder": folder})
        Machine.model_validate(report.environment)
        for settings in report.protocol["preprocess"].values():
            Preprocess.model_validate(settings)
        for rule in ("latency", "latency_context"):
            Protocol(**report.protocol[rule])
    except ValidationError as error:
        raise EdgekdError(
            f"The report at {folder} is damaged: {first_problem(error)}.",
            "Run edgekd benchmark again.",
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise EdgekdError(
            f"The report at {folder} is damaged: its protocol is incomplete.",
            "Run edgekd benchmark again.",
        ) from error
    clocked = {(row.run, row.subject) for row in report.latency}
    known = {(row.run, row.subject) for row in report.summary}
    suites = {row.suite for row in report.suites}
    if (
        not report.summary
        or known - clocked
        or any(
            (row.run, row.subject) not in known or row.suite not in suites
            for row in report.accuracy
        )
        or any(row.preprocess not in report.protocol["preprocess"] for row in report.summary)
    ):
        raise EdgekdError(
            f"The report at {folder} is damaged: its rows do not fit together.",
            "Run edgekd benchmark again.",
        )
    return report


def read_kept(folder: Path, *, clock: bool = False) -> Kept:
    """Load a report with its predictions, and with `clock` its latency samples too.

    Raises:
        EdgekdError: as `read_report`, or arrays that are missing, damaged or of another report.
    """
    latency = read_arrays(folder / "latency.npz") if clock else {}
    kept = Kept(read_report(folder), read_arrays(folder / "predictions.npz"), latency)
    check_arrays(kept)
    return kept


def print_table(report: Report) -> None:
    """The main table and the notes on standard output."""
    if not is_main_process():
        return
    _print(
        main_table(report),
        f"Benchmark, {QUICK_MARK}" if report.quick else "Benchmark",
        _DISPENSABLE,
    )
    if report.unknowns:
        rows = tuple((run, tuple(cells)) for run, *cells in unknown_rows(report))
        title = "Images of no known class, told from known ones by the largest softmax probability or logit, %"
        _print(MainTable(UNKNOWN_HEADER[1:], rows), title, _DISPENSABLE_OF_UNKNOWN)
    for pair in report.comparisons:
        result(*comparison_lines(pair))
    for row in report.corruptions:
        mce = "" if row.mce is None else f", mCE {percent(row.mce)}"
        result(
            f"corruptions: {row.run}/{row.subject} {percent(row.robust_accuracy)} % over 75 cells{mce}"
        )
    for cue in report.cue_conflicts:
        result(f"shape bias: {cue.run}/{cue.subject} {percent(cue.shape_bias)} % on {cue.n} images")
    for note in report.notes:
        out.print(f"note: {note}", style="yellow", markup=False)


def _print(table: MainTable, title: str, dispensable: Sequence[str]) -> None:
    """The table at the width of the terminal, without what has to go."""
    roomy = out.options.update(max_width=10_000)
    hidden: list[str] = []
    view = _view(table, title, hidden)
    for name in dispensable:
        if not out.is_terminal or out.measure(view, options=roomy).maximum <= out.width:
            break
        hidden.append(name)
        view = _view(table, title, hidden)
    # A file or a pipe has no width: there every column stands on one line.
    width = max(out.width, out.measure(view, options=roomy).maximum)
    Console(file=out.file, width=width, highlight=False, emoji=False).print(view)


def print_gates(report: Report) -> None:
    """Say how the gates went.

    Raises:
        GateFailed: one did not pass; what failed has been printed.
    """
    if not report.gates:
        return
    failed = [row for row in report.gates if not row.passed]
    if not failed:
        result(f"gates:  {len(report.gates)} of {len(report.gates)} passed")
        return
    result(*failed_table(report.gates))
    raise GateFailed(
        f"{len(failed)} of {len(report.gates)} gates failed.",
        f"The measured values are in {report.folder}/report.md.",
    )


def comparison_lines(pair: Comparison) -> list[str]:
    """A against B in a few lines."""
    lines = [
        f"A {pair.a_run}/{pair.a}  against  B {pair.b_run}/{pair.b}",
        f"  p50 A / B: {ratio_text(pair)}  ({ms(pair.p50_a_ms)} and {ms(pair.p50_b_ms)} ms, "
        f"{pair.turns} pairs of blocks)",
    ]
    for one in pair.accuracy:
        first, last = (100 * end for end in one.ci95)
        lines.append(
            f"  {one.suite} (n {one.n}): {percent(one.a)} and {percent(one.b)} %, A − B {100 * one.value:+.1f} points "
            f"[{first:+.1f}, {last:+.1f}], McNemar p {one.mcnemar_p:.3f}, agreement {percent(one.agreement)} %"
        )
    return lines


def _view(table: MainTable, title: str, hidden: list[str]) -> Table:
    view = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        padding=(0, 1, 0, 0),
    )
    shown = [number for number, name in enumerate(table.header) if name not in hidden]
    for number in shown:
        view.add_column(
            escape(table.header[number]), justify="left" if number == 0 else "right", no_wrap=True
        )
    several = len({run for run, _ in table.rows}) > 1
    previous = None
    for run, cells in table.rows:
        if several and run != previous:
            view.add_row(escape(run), style="bold")
        previous = run
        view.add_row(*(escape(cells[number]) for number in shown))
    return view
