"""The chart of accuracy against latency: points where the numbers are, names in the legend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmark_fakes import SHORT, fake_measurements, four_subjects, id_and_ood, paint_images
from matplotlib.figure import Figure
from PIL import Image

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.report.charts import Point, accuracy_figure
from edgekd.benchmark.report.document import points_of
from edgekd.benchmark.report.write import draw_picture
from edgekd.benchmark.results.schema import Report


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Three runs of equal accuracy and nearly equal latency."""
    runs = ("erm", "kd", "vl2v-adip")
    times = {
        f"{run}/onnxruntime-{kind}": 2.0 + 0.01 * n
        for n, run in enumerate(runs)
        for kind in ("fp32", "int8")
    }
    folder = tmp_path_factory.mktemp("crowded")
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_measurements(monkeypatch, times)
        subjects = [subject for run in runs for subject in four_subjects(folder, run=run)]
        return run_benchmark(subjects, id_and_ood(paint_images()), folder / "out", speed=SHORT)


@pytest.fixture(scope="module")
def drawn(crowded: Report) -> Figure:
    return accuracy_figure(points_of(crowded), 1000)


def test_points_stand_at_latency_and_accuracy(crowded: Report, drawn: Figure) -> None:
    axes = drawn.axes[0]
    marked = {
        (float(line.get_xdata()[0]), round(float(line.get_ydata()[0]), 6))
        for line in axes.lines
        if line.get_marker() not in ("None", None)
    }
    for row in crowded.exported:
        p50 = crowded.time(row).p50_ms
        assert {(p50, round(100 * row.id, 6)), (p50, round(100 * row.ood_avg, 6))} <= marked
    assert axes.get_xscale() == "log"
    names = axes.get_legend_handles_labels()[1]
    assert {"teacher zero-shot†", "kd: onnxruntime-int8"} <= set(names)
    assert len(names) == len(set(names)) == 10


def test_a_slow_torch_student_does_not_stretch_the_axis(crowded: Report) -> None:
    def slower(point: Point) -> Point:
        if point.summary.kind == "artifact":
            return point
        time = point.time.model_copy(update={"p50_ms": 80.0, "p50_ci95_ms": (79.0, 81.0)})
        return replace(point, time=time)

    figure = accuracy_figure(list(map(slower, points_of(crowded))), 1000)
    low, high = figure.axes[0].get_xlim()
    assert high / low < 4
    assert "80.00 →" in {text.get_text().strip() for text in figure.axes[0].texts}


def test_without_unseen_domains_and_with_one_subject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_measurements(monkeypatch, {"r/onnxruntime-fp32": 2.0})
    report = run_benchmark(
        four_subjects(tmp_path)[2:3], id_and_ood(paint_images())[:1], tmp_path / "out"
    )  # fmt: skip
    path = tmp_path / "alone.png"
    draw_picture(report, path)
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape == (1000, 1600, 3)
    assert (picture < 128).any()
    assert len(accuracy_figure([], 1000).texts) == 1
