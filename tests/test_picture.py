"""The picture: labels that do not overlap and stay inside, points where the numbers are."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from benchmark_fakes import fake_measurements, four_subjects, id_and_ood, paint_images
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.picture import build_picture, draw_picture
from edgekd.benchmark.rows import Report


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Three runs of equal accuracy and nearly equal latency: the worst case for labels."""
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
        return run_benchmark(subjects, id_and_ood(paint_images()), folder / "out", quick=True)


@pytest.fixture(scope="module")
def drawn(crowded: Report) -> tuple[Figure, list[Text]]:
    return build_picture(crowded)


def test_labels_do_not_overlap_and_stay_inside(drawn: tuple[Figure, list[Text]]) -> None:
    figure, labels = drawn
    frame = figure.axes[0].get_window_extent()
    boxes = {label.get_text(): label.get_window_extent() for label in labels}
    assert len(boxes) == 10
    for (first, a), (second, b) in combinations(boxes.items(), 2):
        assert not a.shrunk(0.98, 0.9).overlaps(b.shrunk(0.98, 0.9)), f"{first} on {second}"
    for text, box in boxes.items():
        assert frame.x0 <= box.x0, text
        assert box.x1 <= frame.x1, text
        assert frame.y0 <= box.y0, text
        assert box.y1 <= frame.y1, text


def test_points_stand_at_latency_and_accuracy(
    crowded: Report, drawn: tuple[Figure, list[Text]]
) -> None:
    figure, labels = drawn
    [axes] = figure.axes
    marked = {
        (float(line.get_xdata()[0]), round(float(line.get_ydata()[0]), 6))
        for line in axes.lines
        if line.get_marker() not in ("None", None)
    }
    for row in crowded.summary:
        if row.same_as is None:
            latency = next(
                item
                for item in crowded.latency
                if (item.run, item.subject) == (row.run, row.subject)
            )
            assert (latency.p50_ms, round(100 * row.id, 6)) in marked
            assert (latency.p50_ms, round(100 * row.ood_avg, 6)) in marked
    assert axes.get_xscale() == "log"
    assert "QUICK" in axes.get_title(loc="left")
    assert {label.get_text().split("  ")[0] for label in labels} >= {
        "teacher zero-shot†",
        "kd: onnxruntime-int8",
    }


def test_each_subject_has_its_own_colour(drawn: tuple[Figure, list[Text]]) -> None:
    _, labels = drawn
    assert len({label.get_color() for label in labels}) == len(labels)


def test_without_unseen_domains_and_with_one_subject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_measurements(monkeypatch, {"r/onnxruntime-fp32": 2.0})
    report = run_benchmark(
        four_subjects(tmp_path)[2:3], id_and_ood(paint_images())[:1], tmp_path / "out", quick=False
    )  # fmt: skip
    path = tmp_path / "alone.png"
    draw_picture(report, path)
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape == (1000, 1600, 3)
    assert (picture < 128).any()
    figure, labels = build_picture(report)
    assert [label.get_text() for label in labels] == ["onnxruntime-fp32  50.0"]
    assert "QUICK" not in figure.axes[0].get_title(loc="left")
