"""Write a report's folder, and print a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.report import charts, provenance
from edgekd.benchmark.report.console import print_document
from edgekd.benchmark.report.contents import document, points_of
from edgekd.benchmark.report.failures import failures, thumbnails
from edgekd.benchmark.report.html import html
from edgekd.benchmark.report.markdown import markdown
from edgekd.benchmark.report.modelcard import model_card
from edgekd.benchmark.report.schema import Report
from edgekd.benchmark.report.storage import RawResults
from edgekd.benchmark.subjects import Suite
from edgekd.core.errors import GateFailed
from edgekd.core.files import csv_text, replacing, write_json, write_text


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
        shown: suites whose images the page may show as examples of errors.
    """
    raw = RawResults(report, predictions, latency)
    found = failures(raw)
    page = document(report, raw, found, thumbnails(found, shown))
    write_json(folder / "report.json", report.model_dump(mode="json"))
    write_text(folder / "report.html", html(page))
    write_text(folder / "report.md", markdown(page))
    write_text(folder / "MODEL_CARD.md", model_card(report))
    draw_picture(report, folder / "report.png")
    if report.corruptions:
        write_text(folder / "corruptions.csv", corruptions_csv(report))
    np.savez_compressed(folder / "predictions.npz", **dict[str, Any](predictions))
    np.savez_compressed(folder / "latency.npz", **dict[str, Any](latency))


def draw_picture(report: Report, path: Path) -> None:
    """Write the chart of accuracy against latency and size as PNG, 1600 × 1000 pixels."""
    figure = charts.accuracy_figure(points_of(report), 900, 562.5)
    figure.subplots_adjust(top=0.86, bottom=0.17)
    mark = f" ({provenance.QUICK_MARK})" if report.quick else ""
    style: dict[str, Any] = {"color": charts.LIGHT["ink"], "va": "center"}
    figure.text(
        0.02,
        0.955,
        f"Accuracy in domain (hollow) and out of domain (filled){mark}",
        weight="bold",
        size=14,
        **style,
    )
    figure.text(
        0.02,
        0.03,
        f"{provenance.machine_line(report)}. {provenance.images(report)[:110]}",
        size=9,
        **style,
    )
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=128)


def corruptions_csv(report: Report) -> str:
    """Return every cell: run, subject, corruption, severity, n, top1."""
    rows = [
        (row.run, row.subject, name, severity, row.n, round(value, 6))
        for row in report.corruptions
        for name, cells in row.top1.items()
        for severity, value in enumerate(cells, start=1)
    ]
    return csv_text([("run", "subject", "corruption", "severity", "n", "top1"), *rows])


def print_table(report: Report) -> None:
    """Print the answers, the gates, the main tables and the notes on standard output."""
    print_document(document(report))


def print_gates(report: Report) -> None:
    """Check that every gate passed.

    Raises:
        GateFailed: one did not pass.
    """
    failed = sum(not row.passed for row in report.gates)
    if failed:
        raise GateFailed(
            f"{failed} of {len(report.gates)} gates failed.",
            f"The measured values are in {report.folder}/report.md.",
        )
