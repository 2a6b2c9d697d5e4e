"""Gates: what is a gate, what it compares, and that nothing passes in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_fakes import SHORT, fake_measurements, four_subjects, id_and_ood, paint_images

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.gates import (
    METRICS,
    evaluate,
    parse_gate,
    parse_gates,
)
from edgekd.benchmark.report.document import document
from edgekd.benchmark.report.render import markdown
from edgekd.benchmark.report.write import check_gates, print_report
from edgekd.benchmark.results.schema import Report
from edgekd.benchmark.results.storage import read_report
from edgekd.configs.benchmark import BenchmarkConfig
from edgekd.core.errors import EdgekdError, GateFailed


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    # In domain and on both unseen domains: torch and FP32 are wrong on every third image, INT8 on every second.
    folder = tmp_path_factory.mktemp("gates")
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_measurements(monkeypatch, {"r/onnxruntime-fp32": 2.0, "r/onnxruntime-int8": 3.0})
        gates = parse_gates(["ood_avg_drop<=1.5", "p90_ms<=20"])
        subjects = four_subjects(folder, sketch_every=3)
        return run_benchmark(
            subjects, id_and_ood(paint_images()), folder / "out", speed=SHORT, gates=gates
        )


def value_of(report: Report, expression: str, artifact: str = "onnxruntime-int8") -> float | None:
    return next(
        row.value for row in evaluate([parse_gate(expression)], report) if row.subject == artifact
    )


def test_values_are_percent_points_and_milliseconds(report: Report) -> None:
    for expression, expected in (
        ("id>=50", 50.0),
        ("ood_avg>=60", 50.0),
        ("ood_avg_drop<=1.5", 100 / 6),
        ("id_drop<=1", 100 / 6),
        ("retention>=90", 100 * 0.5 / 0.9),
        ("agreement_ood>=97", 50.0),
        ("p50_ms<5", 3.0),
        ("size_mb<2", 1.0),
        ("top1[ood:sketch] >= 55", 50.0),
        ("drop[ ood:sketch ]<=2", 100 / 6),
        ("worst_class_recall[id]>10", 50.0),
    ):
        assert value_of(report, expression) == pytest.approx(expected), expression
    assert value_of(report, "ece[id]<=0.1") == next(
        row.ece for row in report.accuracy if (row.subject, row.suite) == ("onnxruntime-int8", "id")
    )


def test_the_report_holds_every_gate_on_every_artifact(report: Report) -> None:
    found = {(row.metric, row.subject): row.passed for row in report.gates}
    assert found == {
        ("ood_avg_drop", "onnxruntime-fp32"): True,
        ("ood_avg_drop", "onnxruntime-int8"): False,
        ("p90_ms", "onnxruntime-fp32"): True,
        ("p90_ms", "onnxruntime-int8"): True,
    }
    assert read_report(report.folder).gates == report.gates
    assert "| ✗ FAILED | ood_avg_drop | r/onnxruntime-int8 | 16.67 | \\<= 1.5 |" in markdown(
        document(report)
    )


def test_equality_counts_and_decimal_limits_are_not_missed_by_binary_fractions(
    report: Report,
) -> None:
    def passes(expression: str) -> bool:
        return evaluate([parse_gate(expression)], report)[1].passed

    assert passes("id>=50")
    assert passes("id<=50")
    assert not passes("id>50")
    assert not passes("id<50")
    # 0.29 − 0.275 is 0.015000000000000013 in binary.
    rows = [
        row.model_copy(update={"id": 0.29 if row.kind == "torch" else 0.275}) for row in report.summary
    ]  # fmt: skip
    assert evaluate(
        [parse_gate("id_drop<=1.5")], report.model_copy(update={"summary": tuple(rows)})
    )[0].passed


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("mce<=70", "corruptions were not measured"),
        ("top1[ood:art]>=50", "no suite ood:art; measured: id, ood:photo, ood:sketch"),
        ("p99_ms<=5", "too few samples"),
        ("ece_id_scaled<=0.1", "no ID validation images"),
        ("worst_domain_top1[id]>=50", "one domain"),
    ],
)
def test_what_cannot_be_evaluated_has_failed(report: Report, expression: str, reason: str) -> None:
    rows = evaluate([parse_gate(expression)], report)
    assert [row.passed for row in rows] == [False, False]
    assert all(row.value is None and reason in str(row.reason) for row in rows)


def test_without_an_artifact_or_a_torch_student_nothing_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_measurements(monkeypatch, {"r/onnxruntime-fp32": 2.0})
    _, torch, artifact, _ = four_subjects(tmp_path)
    for one, reason in (
        (torch, "no artifact was measured"),
        (artifact, "torch student was not measured"),
    ):
        report = run_benchmark(
            [one],
            id_and_ood(paint_images()),
            tmp_path / one.name,
            gates=parse_gates(["ood_avg_drop<=99"]),
        )
        [row] = report.gates
        assert (row.passed, row.value, row.reason) == (False, None, row.reason)
        assert reason in str(row.reason)


@pytest.mark.parametrize(
    ("expression", "message", "hint"),
    [
        ("ood_average<=1", "names no metric of a report", 'Did you mean "ood_avg"?'),
        ("p90<=20", "names no metric", 'Did you mean "p90_ms"?'),
        ("top1>=80", "names no metric of a report", "top1[id]>=80"),
        ("p90_ms[id]<=20", "of a suite", "It takes no suite: p90_ms<=20."),
        ("topl[id]>=80", "of a suite", 'Did you mean "top1"?'),
        ("p90_ms=20", "is not a gate", "<= >= < >"),
        ("p90_ms==20", "is not a gate", "<= >= < >"),
        ("p90_ms", "is not a gate", "<= >= < >"),
        ("", "is not a gate", "<= >= < >"),
        ("p90_ms<=20ms", "is not a number", "no unit"),
        ("p90_ms<=nan", "is not a number", "no unit"),
        ("p90_ms<=inf", "is not a number", "no unit"),
        ("id>=0.8", "is in percent", "Write id>=80."),
        ("top1[id]>=0.8", "is in percent", "Write top1[id]>=80."),
    ],
)
def test_mistakes_are_refused_with_a_hint(expression: str, message: str, hint: str) -> None:
    with pytest.raises(EdgekdError) as caught:
        parse_gate(expression)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_table_of_gates(tmp_path: Path) -> None:
    path = tmp_path / "gates.toml"
    path.write_text('[gates]\nood_avg_drop = "<= 1.5"\nid = [">=50", "<=90"]\n')
    config = BenchmarkConfig.load(config=path)
    assert config.gates == ("ood_avg_drop<= 1.5", "id>=50", "id<=90")
    path.write_text("[gates]\np90_ms = 20\n")
    with pytest.raises(EdgekdError, match="has no operator"):
        BenchmarkConfig.load(config=path)
    assert len(parse_gates(["id>=50", "id>=50"])) == 1


def test_the_console_lists_passes_and_failures(
    report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(report)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["✓", "passed", "p90_ms", "r/onnxruntime-fp32", "2.16", "<=", "20"] in lines
    assert ["✗", "FAILED", "ood_avg_drop", "r/onnxruntime-int8", "16.67", "<=", "1.5"] in lines
    with pytest.raises(GateFailed, match="1 of 4"):
        check_gates(report)


def test_every_name_makes_a_gate(report: Report) -> None:
    assert len(evaluate([parse_gate(f"{name}<=1000000") for name in METRICS], report)) == 2 * len(
        METRICS
    )
