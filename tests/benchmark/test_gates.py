from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_fakes import (
    fake_measurements,
    four_measured,
    four_subjects,
    id_and_ood,
    paint_images,
)

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.gates import METRICS, evaluate, parse_gate, parse_gates
from edgekd.benchmark.report.recommend import (
    check_recommendation,
    pareto,
    print_choice,
    recommend,
    ship,
)
from edgekd.benchmark.report.write import check_gates
from edgekd.benchmark.results.schema import Report
from edgekd.benchmark.results.storage import read_report
from edgekd.configs.benchmark import BenchmarkConfig
from edgekd.core.errors import EdgekdError, GateFailed


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    # In domain and on both unseen domains: torch and FP32 are wrong on every third image, INT8 on every second.
    gates = parse_gates(["ood_avg_drop<=1.5", "p90_ms<=20"])
    return four_measured(tmp_path_factory.mktemp("gates"), gates=gates)


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
    with pytest.raises(GateFailed, match="1 of 4"):
        check_gates(report)


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
    gates, suites = parse_gates(["ood_avg_drop<=99"]), id_and_ood(paint_images())
    for one, reason in ((torch, "no artifact"), (artifact, "torch student")):
        [row] = run_benchmark([one], suites, tmp_path / one.name, gates=gates).gates
        assert (row.passed, row.value) == (False, None)
        assert f"{reason} was" in str(row.reason)


@pytest.mark.parametrize(
    ("expression", "message", "hint"),
    [
        ("ood_average<=1", "names no metric of a report", 'Did you mean "ood_avg"?'),
        ("top1>=80", "names no metric of a report", "top1[id]>=80"),
        ("p90_ms[id]<=20", "of a suite", "It takes no suite: p90_ms<=20."),
        ("topl[id]>=80", "of a suite", 'Did you mean "top1"?'),
        ("p90_ms==20", "is not a gate", "<= >= < >"),
        ("p90_ms", "is not a gate", "<= >= < >"),
        ("", "is not a gate", "<= >= < >"),
        ("p90_ms<=20ms", "is not a number", "no unit"),
        ("p90_ms<=nan", "is not a number", "no unit"),
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


def test_every_name_makes_a_gate(report: Report) -> None:
    assert len(evaluate([parse_gate(f"{name}<=1000000") for name in METRICS], report)) == 2 * len(
        METRICS
    )


@pytest.fixture(scope="module")
def recommended(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """FP32 at 2 ms and INT8 at 3 ms."""
    gates = parse_gates(["p90_ms<=2.5"])
    return four_measured(tmp_path_factory.mktemp("measured"), sketch_every=2, gates=gates)


def changed(report: Report, **rows: dict[str, object]) -> Report:
    """The report with other values in the summary rows of these precisions."""
    summary = tuple(
        row.model_copy(update=rows[row.precision])
        if row.kind == "artifact" and row.precision in rows
        else row
        for row in report.summary
    )
    return report.model_copy(update={"summary": summary})


def test_pareto_is_accuracy_latency_and_size(recommended: Report) -> None:
    same = {"id": 0.8, "ood_avg": 0.6, "size_mb": 4.0}
    # The slower file is beaten unless it is smaller or more accurate.
    assert [r.precision for r in pareto(changed(recommended, fp32=same, int8=same))] == ["fp32"]
    for better in ({"size_mb": 1.0}, {"ood_avg": 0.61}):
        found = pareto(changed(recommended, fp32=same, int8=same | better))
        assert [row.precision for row in found] == ["fp32", "int8"]


def test_only_files_within_the_gates_are_recommended(recommended: Report) -> None:
    found = recommend(changed(recommended, int8={"ood_avg": 0.99}))
    assert found is not None
    assert (found.file.precision, found.passes) == ("fp32", True)
    check_recommendation(recommended)


def test_where_no_file_passes_the_nearest_is_named(
    recommended: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(excess: dict[str, float]) -> Report:
        gates = tuple(
            gate.model_copy(
                update={"passed": False, "value": gate.limit * excess[gate.subject or ""]}
            )
            for gate in recommended.gates
        )
        return recommended.model_copy(update={"gates": gates})

    report = failing({"onnxruntime-fp32": 1.5, "onnxruntime-int8": 1.2})
    found = recommend(report)
    assert found is not None
    assert (found.file.precision, found.passes) == ("int8", False)
    with pytest.raises(GateFailed, match="onnxruntime-int8: p90_ms is 3, not") as failure:
        check_recommendation(report)
    assert failure.value.exit_code == 1
    print_choice(report, [("openvino", "not installed")])
    printed = capsys.readouterr().out
    assert printed.index("onnxruntime-int8") < printed.index("left out: openvino")


def test_mb_is_the_size_of_the_file() -> None:
    assert parse_gate("mb<=5").name == "size_mb"


def test_the_report_has_the_same_recommendation(recommended: Report) -> None:
    assert ship(recommended).body in (recommended.folder / "report.md").read_text()


def test_without_gates_no_file_is_called_fit_to_ship(
    recommended: Report,
) -> None:
    assert ship(recommended).tone == "good"
    assert ship(recommended.model_copy(update={"gates": ()})).tone == ""


def test_a_smaller_file_is_not_called_faster_by_an_unsettled_clock(recommended: Report) -> None:
    same = {"id": 0.8, "ood_avg": 0.6, "quant_cost_ood": None}
    costs = [row.quant_cost_id for row in recommended.summary if row.precision == "int8"]
    none = costs[0].model_copy(update={"ci95": (-1.0, 1.0)}) if costs and costs[0] else None
    report = changed(
        recommended,
        fp32=same | {"size_mb": 4.0},
        int8=same | {"size_mb": 1.0, "quant_cost_id": none},
    )
    speeds = tuple(
        row.model_copy(
            update={"ratio": 0.9 if "int8" in row.a else 1 / 0.9, "withheld": "of noise"}
        )
        for row in report.speed
    )
    found = recommend(report.model_copy(update={"speed": speeds, "gates": ()}))
    assert found is not None
    assert found.file.precision == "int8"
    assert "times as fast" not in found.because
