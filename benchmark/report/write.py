"""Write a report's folder, and print a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.benchmark.report import charts, provenance
from edgekd.benchmark.report.document import document, points_of
from edgekd.benchmark.report.modelcard import model_card
from edgekd.benchmark.report.render import html, markdown, print_document
from edgekd.benchmark.results.schema import Report
from edgekd.benchmark.results.storage import Arrays, RawResults
from edgekd.benchmark.subjects import Suite
from edgekd.core.errors import GateFailed
from edgekd.core.files import csv_text, replacing, write_json, write_text


def write_report(
    report: Report, predictions: Arrays, latency: Arrays, shown: Sequence[Suite] = ()
) -> None:
    """Write report.html, .json, .md and .png, the model card and the arrays into the report's folder.

    Args:
        shown: suites whose images the page may show as examples of errors.
    """
    folder = report.folder
    folder.mkdir(parents=True, exist_ok=True)
    page = document(report, RawResults(report, predictions, latency), shown)
    write_json(folder / "report.json", report.model_dump(mode="json"))
    write_text(folder / "report.html", html(page))
    write_text(folder / "report.md", markdown(page))
    write_text(folder / "MODEL_CARD.md", model_card(report))
    draw_picture(report, folder / "report.png")
    if report.corruptions:
        cells = [
            (row.run, row.subject, name, severity, row.n, round(value, 6))
            for row in report.corruptions
            for name, values in row.top1.items()
            for severity, value in enumerate(values, start=1)
        ]
        header = ("run", "subject", "corruption", "severity", "n", "top1")
        write_text(folder / "corruptions.csv", csv_text([header, *cells]))
    np.savez_compressed(folder / "predictions.npz", **dict[str, Any](predictions))
    np.savez_compressed(folder / "latency.npz", **dict[str, Any](latency))


def draw_picture(report: Report, path: Path) -> None:
    """Write the chart of accuracy against latency and size as PNG, 1600 × 1000 pixels."""
    figure = charts.accuracy_figure(points_of(report), 900, 562.5)
    figure.subplots_adjust(top=0.84, bottom=0.17)
    style: dict[str, Any] = {"color": charts.LIGHT["ink"], "va": "center"}
    badge = f" ({provenance.QUICK_MARK})" if report.quick else ""
    title = f"Accuracy in domain (hollow) and out of domain (filled){badge}"
    figure.text(0.02, 0.965, title, weight="bold", size=14, **style)
    origin = f"{provenance.machine_line(report)}. {provenance.images(report)[:110]}"
    figure.text(0.02, 0.03, origin, size=9, **style)
    handles, names = figure.axes[0].get_legend_handles_labels() if figure.axes else ([], [])
    figure.legend(
        handles, names, loc="upper left", bbox_to_anchor=(0.01, 0.945), ncols=4, frameon=False
    )
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=128)


def print_report(report: Report) -> None:
    """Print the answers, the gates, the main tables and the notes on standard output."""
    print_document(document(report))


def check_gates(report: Report) -> None:
    """Raise `GateFailed` where a gate did not pass."""
    failed = sum(not row.passed for row in report.gates)
    if failed:
        raise GateFailed(
            f"{failed} of {len(report.gates)} gates failed.",
            f"The measured values are in {report.folder}/report.md.",
        )
