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

from edgekd.benchmark.accuracy import Suite
from edgekd.benchmark.failures import failures, thumbnails
from edgekd.benchmark.kept import Kept
from edgekd.benchmark.markdown import markdown
from edgekd.benchmark.modelcard import model_card
from edgekd.benchmark.page import page
from edgekd.benchmark.picture import draw_picture
from edgekd.benchmark.rows import SCHEMA_VERSION, Report
from edgekd.benchmark.table import QUICK_MARK, MainTable, main_table
from edgekd.console import is_main_process, out
from edgekd.errors import EdgekdError
from edgekd.files import read_json, replacing, write_json, write_text
from edgekd.manifest import first_problem

_DISPENSABLE = ("ECE ID / OOD", "retention", "p90 ms", "MB")
"""Columns that a terminal too narrow for all goes without, in this order; report.md has them."""


def write_report(
    report: Report,
    folder: Path,
    *,
    predictions: Mapping[str, NDArray[Any]],
    latency: Mapping[str, NDArray[Any]],
    shown: Sequence[Suite] = (),
) -> None:
    """Write report.html, .json, .md and .png, the model card and the arrays; the folder appears in one step.

    An earlier report at `folder` is replaced.

    Args:
        shown: suites whose images the page may show as examples of mistakes.
    """
    kept = Kept(report, predictions, latency)
    found = failures(kept)
    html = page(kept, found, thumbnails(found, shown))
    with replacing(folder) as scratch:
        scratch.mkdir()
        write_json(scratch / "report.json", report.model_dump(mode="json"))
        write_text(scratch / "report.html", html)
        write_text(scratch / "report.md", markdown(report))
        write_text(scratch / "MODEL_CARD.md", model_card(report))
        draw_picture(report, scratch / "report.png")
        np.savez_compressed(scratch / "predictions.npz", **dict[str, Any](predictions))
        np.savez_compressed(scratch / "latency.npz", **dict[str, Any](latency))


def read_report(folder: Path) -> Report:
    """Load `report.json` of a report folder.

    Raises:
        EdgekdError: no report there, a damaged one, or one of another schema version.
    """
    data = read_json(folder / "report.json", "report")
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
        raise EdgekdError(
            f"The report at {folder} is not of schema version {SCHEMA_VERSION}.", "Run edgekd benchmark again."
        )
    try:
        return Report.model_validate(data | {"folder": folder})
    except ValidationError as error:
        raise EdgekdError(
            f"The report at {folder} is damaged: {first_problem(error)}.", "Run edgekd benchmark again."
        ) from error


def print_table(report: Report) -> None:
    """The main table and the notes on standard output."""
    if not is_main_process():
        return
    table, roomy = main_table(report), out.options.update(max_width=10_000)
    title = f"Benchmark, {QUICK_MARK}" if report.quick else "Benchmark"
    hidden: list[str] = []
    view = _view(table, title, hidden)
    for name in _DISPENSABLE:
        if not out.is_terminal or out.measure(view, options=roomy).maximum <= out.width:
            break
        hidden.append(name)
        view = _view(table, title, hidden)
    # A file or a pipe has no width: there every column stands on one line.
    Console(file=out.file, width=max(out.width, out.measure(view, options=roomy).maximum), highlight=False).print(view)
    for note in report.notes:
        out.print(f"note: {note}", style="yellow", markup=False)


def _view(table: MainTable, title: str, hidden: list[str]) -> Table:
    view = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    shown = [number for number, name in enumerate(table.header) if name not in hidden]
    for number in shown:
        view.add_column(escape(table.header[number]), justify="left" if number == 0 else "right", no_wrap=True)
    several = len({run for run, _ in table.rows}) > 1
    previous = None
    for run, cells in table.rows:
        if several and run != previous:
            view.add_row(escape(run), style="bold")
        previous = run
        view.add_row(*(escape(cells[number]) for number in shown))
    return view
