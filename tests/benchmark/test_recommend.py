"""Which file is recommended: on the Pareto front, within the gates, or nearest to them."""

from __future__ import annotations

import pytest
from benchmark_fakes import fake_measurements, four_subjects, id_and_ood, paint_images

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.gates import parse_gate, parse_gates
from edgekd.benchmark.report.recommend import (
    check_recommendation,
    pareto,
    print_recommendation,
    recommend,
)
from edgekd.benchmark.results.schema import Report
from edgekd.core.errors import GateFailed

FACTS = {
    "name": "r",
    "seed": 0,
    "split_hash": "abcd",
    "seconds": 61.0,
    "templates": ["a {}"],
    "domain": None,
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """FP32 at 2 ms and INT8 at 3 ms."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_measurements(monkeypatch, {"r/onnxruntime-fp32": 2.0, "r/onnxruntime-int8": 3.0})
        return run_benchmark(
            four_subjects(folder),
            id_and_ood(paint_images()),
            folder / "report",
            context={"runs": [FACTS]},
            gates=parse_gates(["p90_ms<=2.5"]),
        )


def changed(report: Report, **rows: dict[str, object]) -> Report:
    """The report with other values in the summary rows of these precisions."""
    summary = tuple(
        row.model_copy(update=rows[row.precision])
        if row.kind == "artifact" and row.precision in rows
        else row
        for row in report.summary
    )
    return report.model_copy(update={"summary": summary})


def test_pareto_is_accuracy_latency_and_size(measured: Report) -> None:
    same = {"id": 0.8, "ood_avg": 0.6, "size_mb": 4.0}
    # The slower file is beaten unless it is smaller or more accurate.
    assert [r.precision for r in pareto(changed(measured, fp32=same, int8=same))] == ["fp32"]
    for better in ({"size_mb": 1.0}, {"ood_avg": 0.61}):
        found = pareto(changed(measured, fp32=same, int8=same | better))
        assert [row.precision for row in found] == ["fp32", "int8"]


def test_only_files_within_the_gates_are_recommended(measured: Report) -> None:
    found = recommend(changed(measured, int8={"ood_avg": 0.99}))
    assert found is not None
    assert (found.file.precision, found.passes) == ("fp32", True)
    check_recommendation(measured)


def test_where_no_file_passes_the_nearest_is_named(
    measured: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(excess: dict[str, float]) -> Report:
        gates = tuple(
            gate.model_copy(
                update={"passed": False, "value": gate.limit * excess[gate.subject or ""]}
            )
            for gate in measured.gates
        )
        return measured.model_copy(update={"gates": gates})

    report = failing({"onnxruntime-fp32": 1.5, "onnxruntime-int8": 1.2})
    found = recommend(report)
    assert found is not None
    assert (found.file.precision, found.passes) == ("int8", False)
    with pytest.raises(GateFailed, match="onnxruntime-int8: p90_ms is 3, not") as failure:
        check_recommendation(report)
    assert failure.value.exit_code == 1
    print_recommendation(report, [("openvino", "not installed")])
    printed = capsys.readouterr().out
    assert printed.index("onnxruntime-int8") < printed.index("left out: openvino")


def test_a_gate_without_a_value_is_further_than_any_number(measured: Report) -> None:
    gates = tuple(
        gate.model_copy(
            update={"passed": False, "value": None if "fp32" in str(gate.subject) else 9e9}
        )
        for gate in measured.gates
    )
    found = recommend(measured.model_copy(update={"gates": gates}))
    assert found is not None
    assert found.file.precision == "int8"


def test_mb_is_the_size_of_the_file() -> None:
    assert parse_gate("mb<=5").name == "size_mb"


def test_the_report_has_the_same_recommendation(measured: Report) -> None:
    assert "Ship this one" in (measured.folder / "report.md").read_text()


def test_a_smaller_file_is_not_called_faster_by_an_unsettled_clock(measured: Report) -> None:
    same = {"id": 0.8, "ood_avg": 0.6, "quant_cost_ood": None}
    costs = [row.quant_cost_id for row in measured.summary if row.precision == "int8"]
    none = costs[0].model_copy(update={"ci95": (-1.0, 1.0)}) if costs and costs[0] else None
    report = changed(
        measured,
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
    assert "of noise" in found.because
