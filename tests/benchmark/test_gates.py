from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_fakes import (
    four_measured,
)

from edgekd.benchmark.gates import METRICS, evaluate, parse_gate, parse_gates
from edgekd.benchmark.report.recommend import (
    check_recommendation,
    pareto,
    print_choice,
    recommend,
    ship,
)
from edgekd.benchmark.report.write import check_gates
from edgekd.benchmark.results.rows import Difference
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
    rows = evaluate([parse_gate(expression)], report)
    return next(row.value for row in rows if row.subject == artifact)


def test_values_are_percent_points_and_milliseconds(report: Report) -> None:
    for expression, expected in (
        ("id>=50", 50.0),
        ("ood_avg>=60", 50.0),
        ("ood_avg_drop<=1.5", 100 / 6),
        ("id_drop<=1", 100 / 6),
        ("retention>=90", 100 * 0.5 / 0.9),
        ("agreement_ood>=97", 50.0),
        ("p50_ms<5", 3.0),
        ("mb<2", 1.0),
        ("top1[ood:sketch] >= 55", 50.0),
        ("drop[ ood:sketch ]<=2", 100 / 6),
        ("worst_class_recall[id]>10", 50.0),
    ):
        assert value_of(report, expression) == pytest.approx(expected), expression
    ece = {(row.subject, row.suite): row.ece for row in report.accuracy}
    assert value_of(report, "ece[id]<=0.1") == ece["onnxruntime-int8", "id"]
    assert all(len(evaluate([parse_gate(f"{name}<=1000000")], report)) == 2 for name in METRICS)


def test_every_gate_is_held_against_every_artifact(report: Report) -> None:
    found = [(row.metric, row.subject.rpartition("-")[2], row.passed) for row in report.gates]
    assert found == [
        ("ood_avg_drop", "fp32", True), ("ood_avg_drop", "int8", False), ("p90_ms", "fp32", True),
        ("p90_ms", "int8", True),
    ]  # fmt: skip
    assert read_report(report.folder).gates == report.gates
    with pytest.raises(GateFailed, match="1 of 4"):
        check_gates(report)

    def results(expression: str, of: Report = report) -> list[bool]:
        return [row.passed for row in evaluate([parse_gate(expression)], of)]

    # Equality counts, and limits are not missed by binary fractions: 0.29 − 0.275 is 0.015000000000000013.
    passed = [results(f"id{operator}50")[1] for operator in (">=", "<=", ">", "<")]
    assert passed == [True, True, False, False]
    rows = (
        row.model_copy(update={"id": 0.29 if row.kind == "torch" else 0.275})
        for row in report.summary
    )
    close = report.model_copy(update={"summary": tuple(rows)})
    assert results("id_drop<=1.5", close)[0]
    # What cannot be evaluated has failed.
    for expression, reason in (
        ("mce<=70", "corruptions were not measured"),
        ("top1[ood:art]>=50", "no suite ood:art; measured: id, ood:photo, ood:sketch"),
        ("p99_ms<=5", "too few samples"),
        ("ece_id_scaled<=0.1", "no ID validation images"),
        ("worst_domain_top1[id]>=50", "one domain"),
    ):
        rows = evaluate([parse_gate(expression)], report)
        assert [(row.passed, row.value) for row in rows] == [(False, None)] * 2
        assert all(reason in str(row.reason) for row in rows)
    for kind, reason in (("torch", "no artifact"), ("artifact", "torch student")):
        summary = tuple(row for row in report.summary if row.kind == kind)[:1]
        alone = report.model_copy(update={"summary": summary})
        [row] = evaluate([parse_gate("ood_avg_drop<=99")], alone)
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


def test_gates_of_a_file_and_of_the_command(tmp_path: Path) -> None:
    path = tmp_path / "gates.toml"
    path.write_text(
        '[gates]\nood_avg_drop = "<= 1.5"\nid = [">=50", "<=90"]\n[benchmark]\nquick = true\n'
    )
    config = BenchmarkConfig.load(config=path, gates=["mce<=90"])
    assert config.gates == ("ood_avg_drop<= 1.5", "id>=50", "id<=90", "mce<=90")
    assert config.quick
    for text, message in (("[gates]\np90_ms = 20\n", "no operator"), ("[train]\nlr = 1\n", "no")):
        path.write_text(text)
        with pytest.raises(EdgekdError, match=message):
            BenchmarkConfig.load(config=path)
    assert len(parse_gates(["id>=50", "id>=50"])) == 1


KINDS = ["fp32", "int8"]


@pytest.fixture(scope="module")
def recommended(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """FP32 at 2 ms and INT8 at 3 ms."""
    gates = parse_gates(["p90_ms<=2.5"])
    return four_measured(tmp_path_factory.mktemp("measured"), sketch_every=2, gates=gates)


def changed(report: Report, **rows: dict[str, object]) -> Report:
    """The report with other values in the summary rows of these precisions."""
    summary = tuple(
        row.model_copy(update=rows.get(row.precision, {}) if row.kind == "artifact" else {})
        for row in report.summary
    )
    return report.model_copy(update={"summary": summary})


def test_the_most_accurate_file_within_the_gates_is_recommended(
    recommended: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    check_recommendation(recommended)
    assert ship(recommended).body in (recommended.folder / "report.md").read_text()
    found = recommend(changed(recommended, int8={"ood_avg": 0.99}))
    assert found is not None
    assert (found.file.precision, found.passes) == ("fp32", True)
    assert ship(recommended).tone == "good"
    assert ship(recommended.model_copy(update={"gates": ()})).tone == "", (
        "without gates none is fit"
    )
    # Where no file passes, the nearest is named.
    excess = {"onnxruntime-fp32": 1.5, "onnxruntime-int8": 1.2}
    gates = tuple(
        gate.model_copy(update={"passed": False, "value": gate.limit * excess[gate.subject or ""]})
        for gate in recommended.gates
    )
    report = recommended.model_copy(update={"gates": gates})
    found = recommend(report)
    assert found is not None
    assert (found.file.precision, found.passes) == ("int8", False)
    with pytest.raises(GateFailed, match="onnxruntime-int8: p90_ms is 3, not") as failure:
        check_recommendation(report)
    assert failure.value.exit_code == 1
    print_choice(report, [("openvino", "not installed")])
    printed = capsys.readouterr().out
    assert printed.index("onnxruntime-int8") < printed.index("left out: openvino")


def test_a_smaller_file_goes_first_where_its_loss_is_not_shown(recommended: Report) -> None:
    def pick(withheld: str | None, **int8: object) -> tuple[str, bool]:
        same = {"id": 0.8, "ood_avg": 0.6}
        report = changed(
            recommended, fp32=same | {"size_mb": 4.0}, int8=same | {"size_mb": 1.0} | int8
        )
        speeds = []
        for row in report.speed:
            ratio = 0.9 if "int8" in row.a else 1 / 0.9
            speeds.append(row.model_copy(update={"ratio": ratio, "withheld": withheld}))
        found = recommend(report.model_copy(update={"speed": tuple(speeds), "gates": ()}))
        assert found is not None
        return found.file.precision, "times as fast" in found.because

    none = Difference(value=0.0, ci95=(-1.0, 1.0), mcnemar_p=1.0)
    # Of files as accurate the slower is beaten unless it is smaller or more accurate.
    same = {"id": 0.8, "ood_avg": 0.6, "size_mb": 4.0}
    for better, front in (({}, ["fp32"]), ({"size_mb": 1.0}, KINDS), ({"ood_avg": 0.61}, KINDS)):
        report = changed(recommended, fp32=same, int8=same | better)
        assert [row.precision for row in pareto(report)] == front
    lossy = Difference(value=0.1, ci95=(0.05, 0.15), mcnemar_p=0.001)
    assert pick(None, quant_cost_ood=none) == ("int8", True)
    # An unsettled clock makes no file "faster", but it may be smaller.
    assert pick("of noise", quant_cost_ood=none) == ("int8", False)
    assert pick("of noise", quant_cost_ood=none, size_mb=5.0) == ("fp32", False)
    assert pick(None, quant_cost_ood=lossy, ood_avg=0.5) == ("fp32", False)
