"""Numbers made again from a kept report, by edgekd and by scikit-learn, which knows nothing of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmark_fakes import SHORT, fake_measurements, four_subjects, id_and_ood, paint_images
from sklearn.calibration import calibration_curve

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.evaluate import metrics
from edgekd.benchmark.rescore import rescore
from edgekd.benchmark.results.schema import Report
from edgekd.benchmark.subjects import Suite
from edgekd.core.errors import EdgekdError


def noisy(predict, seed: int):  # type: ignore[no-untyped-def]
    """Logits with some spread, so that calibration has something to measure."""

    def predicted(pixels: np.ndarray) -> np.ndarray:
        number = pixels[:, 0, 0, 1].astype(np.int64)
        noise = np.stack([np.random.default_rng(seed + n).normal(size=3) for n in number])
        return (predict(pixels) + 2 * noise).astype(np.float32)

    return predicted


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("rescore")
    images = paint_images(240)
    suites = [*id_and_ood(images), Suite("val", images, np.arange(0, 240, 5))]
    subjects = [
        replace(one, predict=noisy(one.predict, n)) for n, one in enumerate(four_subjects(folder))
    ]
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_measurements(monkeypatch, {"r/onnxruntime-fp32": 2.0, "r/onnxruntime-int8": 3.0})
        pair = (subjects[2], subjects[3])
        return run_benchmark(subjects, suites, folder / "out", speed=SHORT, compared=pair)


def test_predictions_of_another_report_are_refused(report: Report, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes((report.folder / "report.json").read_bytes())
    np.savez(tmp_path / "predictions.npz", other=np.zeros(3))
    with pytest.raises(EdgekdError, match="lacks labels/id"):
        rescore(tmp_path)
    (tmp_path / "predictions.npz").unlink()
    with pytest.raises(EdgekdError, match=r"no predictions\.npz"):
        rescore(tmp_path)


def test_ece_from_scikit_learns_calibration_curve(report: Report) -> None:
    with np.load(report.folder / "predictions.npz") as arrays:
        for row in report.accuracy:
            logits = arrays[f"logits/{row.run}/{row.subject}/{row.suite}"].astype(np.float64)
            labels = arrays[f"labels/{row.suite}"]
            assert row.scaled is not None
            for factor, expected in (
                (1.0, row.ece),
                (temperature(report, row.subject), row.scaled.ece),
            ):
                powers = np.exp((logits - logits.max(axis=1, keepdims=True)) / factor)
                confidence = powers.max(axis=1) / powers.sum(axis=1)
                right = logits.argmax(axis=1) == labels
                share, mean = calibration_curve(
                    right, confidence, n_bins=15
                )  # of the bins that hold something
                counts = np.histogram(confidence, bins=np.linspace(0, 1, 16))[0]
                other = (np.abs(share - mean) * counts[counts > 0]).sum() / len(labels)
                assert expected == pytest.approx(other, abs=1e-7)
    assert rescore(report.folder) == report
    assert not any(row.suite == "val" for row in report.accuracy)
    torch = next(row for row in report.summary if row.subject == "torch")
    rows = [row for row in report.accuracy if row.subject == "torch" and "ood" in row.suite]
    scaled = [row.scaled.ece for row in rows if row.scaled]
    assert torch.ece_ood_scaled == pytest.approx(np.mean(scaled))


def temperature(report: Report, subject: str) -> float:
    found = next(row.temperature for row in report.summary if row.subject == subject)
    assert found is not None
    return found


def test_temperatures_of_known_answers() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), size=20_000)
    labels = (probabilities.cumsum(axis=1) > rng.random((20_000, 1))).argmax(axis=1)
    assert metrics.fit_temperature(np.log(probabilities), labels) == pytest.approx(1.0, abs=0.03)
    assert metrics.fit_temperature(3 * np.log(probabilities), labels) == pytest.approx(3.0, abs=0.1)
    for labels, limit in zip(
        (np.arange(4), np.array([1, 2, 3, 0])), metrics.TEMPERATURES, strict=True
    ):
        assert metrics.fit_temperature(np.eye(4), labels) == pytest.approx(limit)
