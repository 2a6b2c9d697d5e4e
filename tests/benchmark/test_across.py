from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark_fakes import draw_nothing, four_measured, id_and_ood, paint_images
from test_page import Elements

import edgekd
from edgekd.benchmark.report.comparison import (
    against,
    differences,
    effective_robustness,
    entries,
    groups,
    log_odds,
    read_sources,
    reference,
    write_comparison,
)
from edgekd.core.errors import EdgekdError


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs: the first two on the same images, the third on fewer."""
    place = tmp_path_factory.mktemp("across")
    fewer = [replace(suite, indices=suite.indices[:-6]) for suite in id_and_ood(paint_images())]
    runs = (("one", 3, None), ("two", 5, None), ("three", 3, fewer))
    for run, every, suites in runs:
        four_measured(place / run, run=run, sketch_every=every, suites=suites)
        (place / run / "out").rename(place / run / "benchmark")
    return [place / run for run, *_ in runs]


def test_the_same_images_are_compared_by_hand(runs: list[Path]) -> None:
    sources = read_sources(runs[:2])
    found = {entry.name: entry for entry in entries(sources)}
    assert list(found) == [
        "A one: teacher zero-shot", "A one: torch student", "A one: onnxruntime-fp32", "A one: onnxruntime-int8",
        "B two: torch student", "B two: onnxruntime-fp32", "B two: onnxruntime-int8",
    ]  # fmt: skip
    both = list(found.values())
    assert [len(group) for by in ("images", "machine") for group in groups(both, by)] == [7, 7]
    [told] = differences(sources, both)
    assert "measured at different times" in told
    base = reference(both)
    assert base.name == "A one: onnxruntime-fp32"
    # Wrong on every fifth instead of every third of images 60–119: 12 instead of 20 of 60, 16 won and 8 lost.
    change = against(found["B two: onnxruntime-fp32"], base)
    assert change.value == pytest.approx(8 / 60)
    assert change.mcnemar_p == pytest.approx(0.1516, abs=1e-4)  # two-sided binomial of 8 in 24
    assert change.ci95[0] < 0 < change.value < change.ci95[1]


def test_other_images_machines_and_versions_are_never_mixed(
    runs: list[Path], tmp_path: Path
) -> None:
    sources = read_sources(runs)
    found = entries(sources)
    assert [{entry.source.letter for entry in group} for group in groups(found, "images")] == [
        {"A", "B"}, {"C"},
    ]  # fmt: skip
    assert "images of id differ between A (n = 60), B (n = 60) and C (n = 54)" in next(
        differences(sources, found)
    )
    page = write_comparison(runs, tmp_path / "mixed")
    assert list(Elements(page.read_text(encoding="utf-8")).named("script")) == []
    text = page.with_name("comparison.md").read_text(encoding="utf-8")
    assert text.count("On the same images:") == 2
    assert "id n = 60, ood:photo n = 30, ood:sketch n = 30" in text
    assert "id n = 54, ood:photo n = 24, ood:sketch n = 24" in text

    shutil.copytree(runs[1] / "benchmark", tmp_path / "elsewhere")
    path = tmp_path / "elsewhere" / "report.json"
    data = json.loads(path.read_text()) | {"quick": False}
    data["environment"]["versions"]["onnxruntime"] = "1.2.3"
    for cpu in ("Cortex-A76", None):
        data["environment"]["cpu"] = cpu
        path.write_text(json.dumps(data))
        sources = read_sources([runs[0], path.parent])
        found = entries(sources)
        assert [len(group) for group in groups(found, "machine")] == [4, 3]
        assert [len(group) for group in groups(found, "images")] == [7]
        told = " ".join(differences(sources, found))
        named = (cpu or "unknown processor", "full protocol", "Versions of onnxruntime differ")
        assert all(part in told for part in named)
    page = write_comparison([runs[0], path.parent], tmp_path / "out")
    assert page.read_text(encoding="utf-8").count("<h3>Latency of one image</h3>") == 2


def test_the_library_and_its_refusals(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    assert edgekd.report(*runs[:2], out=out) == out / "comparison.html"
    assert {path.name for path in out.iterdir()} == {"comparison.html", "comparison.md"}
    with pytest.raises(EdgekdError, match="holds a comparison"):
        edgekd.report(*runs[:2], out=out)
    edgekd.report(runs[0], out=out, overwrite=True)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(EdgekdError, match="not a comparison"):
        edgekd.report(runs[0], out=tmp_path, overwrite=True)
    with pytest.raises(EdgekdError, match="There is no report in"):
        edgekd.report(tmp_path / "nowhere", out=tmp_path / "new")
    with pytest.raises(EdgekdError, match="given twice"):
        edgekd.report(runs[0], runs[0] / "benchmark", out=tmp_path / "new")
    shutil.copytree(runs[0] / "benchmark", tmp_path / "partial")
    (tmp_path / "partial" / "latency.npz").unlink()
    with pytest.raises(EdgekdError, match=r"no latency\.npz"):
        edgekd.report(tmp_path / "partial", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def entry(
    name: str, kind: str, top1: dict[str, float], *, run: str | None = None, n: int = 10_000
) -> Any:
    rows = {suite: SimpleNamespace(top1=value, n=n) for suite, value in top1.items()}
    summary, source = SimpleNamespace(kind=kind, run=run or name), SimpleNamespace(letter="")
    outside = [suite for suite in rows if suite.startswith("ood:")]
    return SimpleNamespace(
        name=name, summary=summary, source=source, accuracy=rows, outside=outside
    )


def on_line(inside: float, slope: float, intercept: float) -> float:
    """Written out again: σ(slope · ln(p / (1 − p)) + intercept)."""
    return 1 / (1 + math.exp(-(slope * math.log(inside / (1 - inside)) + intercept)))


def student(
    name: str, inside: float, *, beyond: float = 0.0, kind: str = "torch", run: str | None = None
) -> Any:
    return entry(name, kind, {"id": inside, "ood:x": on_line(inside, 0.8, -1.0) + beyond}, run=run)


def test_students_on_a_line_shape_it_and_a_teacher_is_set_against_it() -> None:
    group = [
        student("a", 0.6), student("b", 0.75), student("c", 0.9),
        student("c int8", 0.88, beyond=-0.03, kind="artifact", run="c"), student("t", 0.7, beyond=0.2, kind="teacher"),
    ]  # fmt: skip
    found = effective_robustness(group)
    assert found.lines == {"ood:x": pytest.approx((0.8, -1.0, 1.0))}
    assert found.models == ("a", "b", "c")
    beyond = [one["ood:x"] for one in found.beyond]
    assert beyond == pytest.approx([0, 0, 0, -0.03, 0.2], abs=1e-9)


def test_residuals_of_least_squares_by_hand() -> None:
    """Log-odds 0, 1, 2 in domain and 0, 1, 0 outside: the line is flat at 1/3."""

    def sigmoid(odds: float) -> float:
        return 1 / (1 + math.exp(-odds))

    odds = {"a": (0, 0), "b": (1, 1), "c": (2, 0)}
    group = [
        entry(n, "torch", {"id": sigmoid(x), "ood:x": sigmoid(y)}) for n, (x, y) in odds.items()
    ]
    found = effective_robustness(group)
    slope, _, r2 = found.lines["ood:x"]
    assert (slope, r2) == pytest.approx((0, 0), abs=1e-9)
    assert found.beyond[1]["ood:x"] == pytest.approx(sigmoid(1) - sigmoid(1 / 3))


def test_what_a_line_needs() -> None:
    few = [student("a", 0.5), student("b", 0.6), student("c", 0.7, kind="artifact", run="b")]
    for group, reason in (
        (few, "there are 2"),
        ([student(name, 0.5) for name in "abc"], "the same accuracy in domain"),
        ([entry(name, "torch", {"ood:x": 0.5}) for name in "abc"], "no suites both in and out"),
    ):
        assert reason in effective_robustness(group)
    # Files stand in for students, and all right is half an image away.
    group = [student(name, 0.5 + 0.1 * n, kind="artifact") for n, name in enumerate("abc")]
    assert effective_robustness(group).models == ("a", "b", "c")
    for top1, odds in ((1.0, math.log(99)), (0.0, -math.log(99))):
        assert log_odds(SimpleNamespace(top1=top1, n=50)) == pytest.approx(odds)  # type: ignore[arg-type]
