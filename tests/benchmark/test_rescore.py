"""Numbers made again from the logits that a report keeps, by edgekd and by scikit-learn, which knows nothing of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.special
from benchmark_fakes import SHORT, fake_measurements, four_subjects, id_and_ood, paint_images
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, roc_auc_score

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.compare import shared_suites
from edgekd.benchmark.evaluate import metrics
from edgekd.benchmark.gates import evaluate, parse_gate, parse_gates
from edgekd.benchmark.rescore import rescore
from edgekd.benchmark.results.rows import UnknownRow
from edgekd.benchmark.results.schema import Report
from edgekd.benchmark.subjects import Suite
from edgekd.core.errors import EdgekdError
from edgekd.core.predictor import Predictor

N_ID, N_UNKNOWN = 60, 30


def wavering(predict: Predictor, seed: int, unknown: float) -> Predictor:
    """Surer of some images than of others, and about `unknown` times as sure of those numbered 200 and more."""

    def predicted(pixels: np.ndarray) -> np.ndarray:
        number = pixels[:, 0, 0, 1].astype(np.int64)
        share = np.stack([np.random.default_rng([seed, n]).uniform(0.2, 1.0) for n in number])
        factors = share * np.where(number >= 200, unknown, 1.0)
        return (predict(pixels) * factors[:, None]).astype(np.float32)

    return predicted


IMAGES = paint_images(240)
STRANGE = replace(IMAGES, labels=np.full(240, -1))
PLAIN = [Suite("id", IMAGES, np.arange(N_ID)), *id_and_ood(IMAGES)[1:]]
ODD = Suite(
    "unknown:odd", STRANGE, np.arange(200, 200 + N_UNKNOWN), None, "unknown", ("odd.",), base="id"
)
SUITES = [*PLAIN, ODD, Suite("val", IMAGES, np.arange(0, 240, 5))]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("rescore")
    # The student is half as sure of unknown images; INT8 is as sure of them as of known ones.
    factors = (0.4, 0.5, 0.5, 1.0)
    four = zip(four_subjects(folder, sketch_every=3), (0, 7, 7, 3), factors, strict=True)
    subjects = [
        replace(one, predict=wavering(one.predict, seed, factor)) for one, seed, factor in four
    ]
    gates = parse_gates(["auroc[unknown:odd]>=70", "unknown_auroc_worst>=70"])
    options = {"gates": gates, "compared": (subjects[2], subjects[3])}
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_measurements(monkeypatch, {"r/onnxruntime-fp32": 2.0, "r/onnxruntime-int8": 3.0})
        return run_benchmark(subjects, SUITES, folder / "out", speed=SHORT, **options)


def test_predictions_of_another_report_are_refused(report: Report, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes((report.folder / "report.json").read_bytes())
    np.savez(tmp_path / "predictions.npz", other=np.zeros(3))
    with pytest.raises(EdgekdError, match="lacks labels/id"):
        rescore(tmp_path)
    (tmp_path / "predictions.npz").unlink()
    with pytest.raises(EdgekdError, match=r"no predictions\.npz"):
        rescore(tmp_path)


def test_calibration_errors_by_scikit_learn(report: Report) -> None:
    temperature = {row.subject: row.temperature for row in report.summary}
    with np.load(report.folder / "predictions.npz") as arrays:
        for row in report.accuracy:
            logits = arrays[f"logits/{row.run}/{row.subject}/{row.suite}"].astype(np.float64)
            labels = arrays[f"labels/{row.suite}"]
            assert row.scaled is not None
            for factor, expected in ((1.0, row.ece), (temperature[row.subject], row.scaled.ece)):
                confidence = scipy.special.softmax(logits / factor, axis=1).max(axis=1)
                right = logits.argmax(axis=1) == labels
                # Of the bins that hold something.
                share, mean = calibration_curve(right, confidence, n_bins=15)
                counts = np.histogram(confidence, bins=np.linspace(0, 1, 16))[0]
                other = (np.abs(share - mean) * counts[counts > 0]).sum() / len(labels)
                assert expected == pytest.approx(other, abs=1e-7)
    assert rescore(report.folder) == report
    torch = next(row for row in report.summary if row.subject == "torch")
    rows = [row for row in report.accuracy if row.subject == "torch" and "ood" in row.suite]
    scaled = [row.scaled.ece for row in rows if row.scaled]
    assert torch.ece_ood_scaled == pytest.approx(np.mean(scaled))


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


def row_of(report: Report, subject: str) -> UnknownRow:
    return next(row for row in report.unknowns if row.subject == subject)


def test_detection_of_unknown_classes_by_scikit_learn(report: Report) -> None:
    assert [row.subject for row in report.unknowns] == [row.subject for row in report.summary]
    truth = np.repeat([1, 0], [N_ID, N_UNKNOWN])
    with np.load(report.folder / "predictions.npz") as arrays:
        assert set(arrays["labels/unknown:odd"].tolist()) == {-1}
        for row in report.unknowns:
            assert (row.suite, row.inside) == ("unknown:odd", "id")
            assert (row.n, row.n_inside) == (N_UNKNOWN, N_ID)
            suites = ("id", "unknown:odd")
            logits = [arrays[f"logits/r/{row.subject}/{suite}"].astype(float) for suite in suites]
            softmax = [scipy.special.softmax(part, axis=1).max(axis=1) for part in logits]
            assert row.confidence == pytest.approx(softmax[1].mean())
            assert row.confidence_inside == pytest.approx(softmax[0].mean())
            highest = [part.max(axis=1) for part in logits]
            for found, parts in ((row.msp, softmax), (row.mls, highest)):
                scores = np.concatenate(parts)
                inside = average_precision_score(truth, scores)
                outside = average_precision_score(1 - truth, -scores)
                values = (found.auroc, found.aupr_in, found.aupr_out)
                assert values == pytest.approx((roc_auc_score(truth, scores), inside, outside))
                assert found.auroc_ci95[0] < found.auroc < found.auroc_ci95[1]
    # They enter no mean and no accuracy.
    assert {row.suite for row in report.accuracy} == {suite.name for suite in PLAIN}
    torch = next(row for row in report.summary if row.subject == "torch")
    assert set(torch.ood) == {"photo", "sketch"}
    assert torch.gap == pytest.approx((torch.id or 0) - (torch.ood_avg or 0))
    _, _, fp32, int8 = four_subjects(report.folder / "again")
    assert shared_suites(fp32, int8, SUITES[:4]) == list(range(len(PLAIN)))


def test_what_the_export_cost(report: Report) -> None:
    torch, fp32, int8 = (
        row_of(report, name) for name in ("torch", "onnxruntime-fp32", "onnxruntime-int8")
    )
    assert torch.msp.auroc_cost is row_of(report, "teacher").msp.auroc_cost is None
    same = fp32.msp.auroc_cost
    assert (same.value, same.ci95) == (0.0, (0.0, 0.0)), "the very same answers"
    cost = int8.msp.auroc_cost
    assert cost.value == pytest.approx(torch.msp.auroc - int8.msp.auroc)
    assert 0.1 < cost.ci95[0] < cost.value < cost.ci95[1]


def value_of(report: Report, expression: str) -> tuple[float | None, str | None]:
    row = evaluate([parse_gate(expression)], report)[-1]
    assert row.subject == "onnxruntime-int8"
    return row.value, row.reason


def test_gates_in_percent_and_points(report: Report) -> None:
    assert [(row.metric, row.subject, row.passed) for row in report.gates] == [
        ("auroc[unknown:odd]", "onnxruntime-fp32", True),
        ("auroc[unknown:odd]", "onnxruntime-int8", False),
        ("unknown_auroc_worst", "onnxruntime-fp32", True),
        ("unknown_auroc_worst", "onnxruntime-int8", False),
    ]
    row = row_of(report, "onnxruntime-int8")
    assert row.mls.auroc_cost is not None
    for expression, expected in (
        ("auroc_mls[unknown:odd]>=50", row.mls.auroc),
        ("aupr_in[unknown:odd]>=50", row.msp.aupr_in),
        ("aupr_out_mls[unknown:odd]>=50", row.mls.aupr_out),
        ("fpr95[unknown:odd]<=50", row.msp.fpr95),
        ("confidence[unknown:odd]<=50", row.confidence),
        ("auroc_drop_mls[unknown:odd]<=1", row.mls.auroc_cost.value),
        ("unknown_auroc_worst>=50", row.msp.auroc),
    ):
        assert value_of(report, expression) == (pytest.approx(100 * expected), None), expression
    with pytest.raises(EdgekdError, match="in percent"):
        parse_gate("auroc[unknown:odd]>=0.9")
    with pytest.raises(EdgekdError) as caught:
        parse_gate("auroc>=90")
    assert "auroc[unknown:NAME]>=90" in caught.value.hint


def test_gates_that_nothing_was_measured_for(report: Report) -> None:
    without = report.model_copy(update={"unknowns": ()})
    for of, gate, said in (
        (report, "auroc[id]>=50", "no suite id of unknown classes; measured: unknown:odd"),
        (report, "top1[unknown:odd]>=50", "no class is the right answer on unknown:odd"),
        (without, "auroc[unknown:odd]>=50", "none was measured (--unknown)"),
        (without, "unknown_auroc_worst>=50", "no images of unknown classes were measured"),
    ):
        value, reason = value_of(of, gate)
        assert value is None
        assert said in str(reason)
    alone = report.model_copy(update={"unknowns": tuple(
        row.model_copy(update={"msp": row.msp.model_copy(update={"auroc_cost": None})}) for row in report.unknowns
    )})  # fmt: skip
    assert value_of(alone, "auroc_drop[unknown:odd]<=1")[1] == "the torch student was not measured"
