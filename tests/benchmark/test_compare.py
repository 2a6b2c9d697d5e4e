"""A against B: the ratio of medians with its interval, paired accuracies, and what cannot be compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmark_fakes import SHORT, fake_measurements, four_subjects, id_and_ood, paint_images

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.compare import compare
from edgekd.benchmark.report.document import document
from edgekd.benchmark.report.render import markdown
from edgekd.benchmark.report.tables import comparison
from edgekd.benchmark.report.write import print_report
from edgekd.benchmark.subjects import Suite
from edgekd.core.errors import EdgekdError
from edgekd.targets.timing.intervals import ratio_interval
from edgekd.targets.timing.speed import Timing
from edgekd.targets.timing.stopwatch import LatencySamples


def turns(
    count: int, scale: float, drift: np.ndarray, rng: np.random.Generator
) -> list[np.ndarray]:
    return [scale * drift[i] * rng.lognormal(0, 0.05, 40) for i in range(count)]


def test_the_interval_covers_the_true_ratio_at_its_level() -> None:
    covered, widths = 0, []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        # The machine speeds up and slows down by a third; both models feel it alike.
        drift = np.exp(0.3 * np.sin(np.arange(20) + rng.uniform(0, 6)))
        a, b = turns(20, 1.2, drift, rng), turns(20, 1.0, drift, rng)
        low, high = ratio_interval(a, b, np.zeros(20, dtype=np.int64), replicates=200)
        covered += low <= 1.2 <= high
        widths.append(high - low)
    assert covered >= 88
    # Draws that ignored the pairing would be as wide as the drift; these are not.
    assert np.median(widths) < 0.25


def test_only_turns_that_have_a_partner_count() -> None:
    def samples(blocks: int, value: float, alone: float) -> LatencySamples:
        times = np.repeat([value] * 10 + [alone] * (blocks - 10), 5).astype(float)
        return LatencySamples(times, np.repeat(np.arange(blocks) * 2, 5), 1.0, 1, 1.0, True, True)

    from benchmark_fakes import model, subject

    images = paint_images(12)
    a, b = subject("a", "artifact", model(0)), subject("b", "artifact", model(2))
    suite = Suite("id", images, np.arange(12))
    logits = {
        (one.key, 0): one.predict(np.stack([np.asarray(images.read(i)) for i in range(12)]))
        for one in (a, b)
    }
    timed = Timing("x", True, 0.1, 0.0, 0.0)
    parts = [samples(30, 2.0, 99.0)], [samples(10, 4.0, 0.0)]
    found = compare((a, b), [suite], logits, parts, (timed, timed))
    assert found.withheld is None
    unsettled = replace(timed, settled=False)
    noisy = compare((a, b), [suite], logits, parts, (timed, unsettled))
    assert "settled" in str(noisy.withheld)
    assert "0.5" not in comparison(noisy).note
    assert (found.p50_ratio, found.p50_ratio_ci95, found.turns) == (0.5, (0.5, 0.5), 10)
    [row] = found.accuracy
    assert (row.a, row.b, row.value, row.agreement) == (1.0, 0.5, 0.5, 0.5)
    # 6 images won, none lost: 2 · (1/2)^6.
    assert row.mcnemar_p == pytest.approx(2 / 64)


def test_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_measurements(monkeypatch, {"r/onnxruntime-fp32": 2.0, "r/onnxruntime-int8": 3.0})
    subjects = four_subjects(tmp_path, sketch_every=3)
    pair = (subjects[3], subjects[2])
    report = run_benchmark(
        subjects, id_and_ood(paint_images()), tmp_path / "out", speed=SHORT, compared=pair
    )
    [found] = report.comparisons
    assert (found.a, found.b) == ("onnxruntime-int8", "onnxruntime-fp32")
    assert found.p50_ratio == pytest.approx(1.5)
    assert [row.suite for row in found.accuracy] == ["id", "ood:photo", "ood:sketch"]
    assert "Latency A / B: 1.500 [" in markdown(document(report))
    print_report(report)
    assert "Latency A / B: 1.500" in capsys.readouterr().out


def test_artifacts_without_common_images_are_refused_at_once(tmp_path: Path) -> None:
    images = paint_images()
    first, second = four_subjects(tmp_path, run="a")[2], four_subjects(tmp_path, run="b")[2]
    suites = [
        Suite("id", images, np.arange(60), run="a"),
        Suite("id", images, np.arange(60), run="b"),
    ]
    with pytest.raises(EdgekdError, match="no test images in common"):
        run_benchmark([first, second], suites, tmp_path / "out", compared=(first, second))
