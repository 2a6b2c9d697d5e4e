from __future__ import annotations

import functools
import json
import operator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_fakes import (
    SHORT,
    fake_measurements,
    four_measured,
    four_subjects,
    id_and_ood,
    paint_images,
    subject,
)

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.gates import parse_gates
from edgekd.benchmark.report.summary import answers
from edgekd.benchmark.report.tables import results
from edgekd.benchmark.report.write import print_report
from edgekd.benchmark.rescore import rescore
from edgekd.benchmark.results.metric import metrics_of
from edgekd.benchmark.results.rows import SummaryRow
from edgekd.benchmark.results.schema import Report
from edgekd.benchmark.results.storage import read_report
from edgekd.benchmark.subjects import Suite
from edgekd.core.errors import EdgekdError

FACTS = {"name": "r", "seed": 0, "split_hash": "abcd", "seconds": 61.2, "templates": list("abc")}

CONTEXT = {"data": "paint", "runs": [FACTS]}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    folder = tmp_path_factory.mktemp("measured")
    return four_measured(folder, picture=True, context=CONTEXT), folder / "out"


def summary_of(report: Report, name: str, run: str = "r") -> SummaryRow:
    return next(row for row in report.summary if (row.run, row.subject) == (run, name))


def test_the_folder_holds_everything_and_the_json_fits_its_schema(
    measured: tuple[Report, Path],
) -> None:
    report, out = measured
    assert {path.name for path in out.iterdir()} == {
        "report.html", "report.json", "report.md", "report.png", "MODEL_CARD.md", "predictions.npz", "latency.npz",
    }  # fmt: skip
    assert read_report(out) == report
    assert report.folder == out
    assert not list(out.parent.glob(".tmp*"))
    # Every number of the main rows is in the page and in the Markdown, as its definition writes it.
    page, text = ((out / name).read_text() for name in ("report.html", "report.md"))
    for row in (*report.accuracy, *report.latency, *report.summary):
        for key, one in metrics_of(type(row)).items():
            assert one.shown(row, key) in page, key
            assert one.shown(row, key) in text, key
    rows = {row.subject: row for row in report.latency}
    fp32, teacher = rows["onnxruntime-fp32"], rows["teacher"]
    assert (fp32.p50_ms, fp32.n, fp32.processes, fp32.threads) == (pytest.approx(2.0), 201, 1, 2)
    assert (fp32.protocol, fp32.quick, fp32.load_ms, fp32.first_ms) == ("quick", True, 12.0, 9.0)
    assert (teacher.protocol, teacher.provider, teacher.first_ms) == ("context", "torch", None)
    with np.load(out / "latency.npz") as raw:
        assert raw["samples_ms/r/onnxruntime-fp32/0"].mean() == pytest.approx(fp32.mean_ms)
        for name in ("samples_ms", "blocks"):
            assert raw[f"{name}/r/teacher/0"].shape == (teacher.n,)


def test_wrong_numbers_and_odd_facts_in_a_report_are_refused(
    measured: tuple[Report, Path], tmp_path: Path
) -> None:
    for place, value in (
        (("accuracy", 0, "top1"), 97.0), (("accuracy", 0, "extra"), 1), (("latency", 0, "p90_ms"), -1.0),
        (("suites", 0, "family"), "holiday"), (("corruptions",), [{"run": "r"}]), (("summary", 0, "size_mb"), 1e300),
        (("accuracy",), []), (("environment", "devices"), [5]), (("environment", "devices"), [{"device": "pi"}]),
        (("environment", "before", "throttle_flags"), "hot"),
    ):  # fmt: skip
        data: Any = measured[0].model_dump(mode="json")
        functools.reduce(operator.getitem, place[:-1], data)[place[-1]] = value
        (tmp_path / "report.json").write_text(json.dumps(data))
        with pytest.raises(EdgekdError, match="is damaged"):
            read_report(tmp_path)


def test_the_previous_version_is_read_and_others_are_named(
    measured: tuple[Report, Path], tmp_path: Path
) -> None:
    report, _ = measured
    data = report.model_dump(mode="json", exclude={"gains"}) | {"schema_version": 2}
    for row in data["summary"]:
        del row["adapted_avg"]
    for row in data["placements"]:
        row["asked"], row["told_by"] = row.pop("provider"), row.pop("source")
    (tmp_path / "report.json").write_text(json.dumps(data))
    assert read_report(tmp_path) == report.model_copy(update={"gains": (), "folder": tmp_path})
    for version in (1, 4, None, "3"):
        (tmp_path / "report.json").write_text(json.dumps(data | {"schema_version": version}))
        with pytest.raises(EdgekdError, match=f"version {version}; this edgekd reads 2 and 3"):
            read_report(tmp_path)


def test_summary_by_hand(measured: tuple[Report, Path]) -> None:
    # Images 0–59 are in domain, 60–89 photo, 90–119 sketch; a model is wrong on every tenth, third or second image.
    report, _ = measured
    teacher, torch, int8 = (
        summary_of(report, name) for name in ("teacher", "torch", "onnxruntime-int8")
    )
    assert (teacher.id, teacher.ood, teacher.retention) == (0.9, {"photo": 0.9, "sketch": 0.9}, 1.0)
    assert torch.id == torch.ood_avg == pytest.approx(2 / 3)
    assert torch.retention == pytest.approx((2 / 3) / 0.9)
    assert torch.gap == pytest.approx(0.0)
    assert (torch.agreement_id, torch.quant_cost_id, torch.size_mb) == (None, None, None)
    worst = (int8.ood_worst, int8.ood_worst_domain)
    assert (int8.id, worst, int8.size_mb) == (0.5, (0.5, "photo"), 1.0)
    # Multiples of 2 or 3 but not of both are where the two disagree: half of all numbers.
    assert int8.agreement_id == pytest.approx(0.5)
    assert int8.quant_cost_id is not None
    assert int8.quant_cost_id.value == pytest.approx(1 / 6)
    # 20 images lost, 10 won, of 30 discordant: exact two-sided binomial.
    assert int8.quant_cost_id.mcnemar_p == pytest.approx(0.0987, abs=1e-4)
    low, high = int8.quant_cost_id.ci95
    assert low < 1 / 6 < high
    fp32 = summary_of(report, "onnxruntime-fp32")
    assert fp32.quant_cost_ood is not None
    cost = fp32.quant_cost_ood
    assert (cost.value, cost.mcnemar_p, fp32.agreement_ood) == (0.0, 1.0, 1.0)
    rows = {(row.subject, row.suite): row for row in report.accuracy}
    assert len(rows) == 4 * 3
    row = rows["torch", "ood:sketch"]
    assert (row.n, row.classes, row.top1) == (30, 3, pytest.approx(2 / 3))
    # Wrong on the multiples of three: exactly the cats.
    assert (row.worst_class, row.worst_class_recall) == ("cat", 0.0)
    assert row.macro == pytest.approx(2 / 3)
    confidence = np.exp(4) / (np.exp(4) + 2)
    assert row.ece == pytest.approx(confidence - 2 / 3, rel=1e-6)


def test_what_cannot_be_measured_is_refused_before_anything_runs(tmp_path: Path) -> None:
    suites = id_and_ood(paint_images())

    def never(pixels: np.ndarray) -> np.ndarray:
        raise AssertionError("measured")

    one, out = subject("torch", "torch", never), tmp_path / "out"
    empty = Suite("ood:art", suites[0].images, np.arange(0))
    foreign = Suite("id", suites[0].images, np.arange(3), run="other")
    for subjects, chosen, message in (
        ([], suites, "no model"),
        ([one], [], "no images"),
        ([one], [*suites, empty], "measure on in ood:art"),
        ([one, one], suites, "r/torch is given twice"),
        ([one], [foreign], "torch of run r"),
    ):
        with pytest.raises(EdgekdError, match=message):
            run_benchmark(subjects, chosen, out)
    assert not out.exists()


def two_runs(place: Path, **facts: Any) -> Report:
    """`base` is wrong on every 2nd image, `mine` on every 10th; of both a torch student and two files."""
    images = paint_images()
    subjects = four_subjects(place, run="base", sketch_every=2)
    subjects += four_subjects(place, run="mine", sketch_every=10)
    runs = [{"name": "base", "recipe": "erm"}, {"name": "mine", "recipe": "kd"} | facts]
    suites = id_and_ood(images)
    if facts.get("unlabelled"):  # `base` has left out the domain that `mine` has seen
        last = suites.pop()
        suites += [replace(last, run="base"), replace(last, name="adapted:sketch", run="mine")]
    return run_benchmark(
        subjects, suites, place / "out", speed=SHORT, context={"runs": runs},
        gates=parse_gates(["ood_avg>=80"]), examples=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Report:
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_measurements(
            monkeypatch,
            {"base/onnxruntime-fp32": 2.0, "base/onnxruntime-int8": 1.0, "mine/onnxruntime-fp32": 2.0,
             "mine/onnxruntime-int8": 1.0},
        )  # fmt: skip
        return two_runs(tmp_path_factory.mktemp("pair"))


def test_two_runs_in_one_benchmark_tell_what_was_gained(pair: Report) -> None:
    gains = {(row.subject, row.where): row for row in pair.gains}
    assert {row.cause for row in pair.gains} == {"distillation"}
    row = gains["torch", "ood"]
    assert (row.run, row.base_run, row.n) == ("mine", "base", 60)
    assert row.gain.value == pytest.approx(0.4)
    low, high = row.gain.ci95
    assert 0.25 < low < 0.4 < high < 0.55
    # 24 images won and none lost: 2 · (1/2)^24.
    assert row.gain.mcnemar_p == pytest.approx(2 / 2**24)
    assert rescore(pair.folder) == pair
    # The two share their teacher, who is measured and shown once.
    assert summary_of(pair, "teacher", "base").same_as is None
    assert summary_of(pair, "teacher", "mine").same_as == "base"
    names = [row[0] for row in results(pair).rows]
    assert len(names) == 7
    assert [name for name in names if "teacher" in str(name)] == ["teacher zero-shot"]


def test_the_report_answers_first(pair: Report, capsys: pytest.CaptureFixture[str]) -> None:
    told = {text.label: text.body for text in answers(pair)}
    assert list(told) == ["Distillation", "Export", "Speed", "Ship"]
    assert told["Distillation"].startswith("mine against base (onnxruntime-int8): +38.3 points ([")
    assert "2.00 times as fast" in told["Speed"]
    assert told["Ship"].startswith("yes, mine/onnxruntime-int8: it passes every gate")
    print_report(pair)
    printed = capsys.readouterr().out
    page = (pair.folder / "report.html").read_text()
    for text in (printed, page, (pair.folder / "report.md").read_text()):
        at = [text.index(part) for part in ("Distillation", "Export", "Ship", "FAILED", "ID % ↑")]
        assert at == sorted(at)


def test_what_unlabelled_images_gained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{run}/onnxruntime-{kind}" for run in ("base", "mine") for kind in ("fp32", "int8")]
    fake_measurements(monkeypatch, dict.fromkeys(names, 2.0))
    report = two_runs(tmp_path, unlabelled="sketches", recipe="erm")
    [row] = [row for row in report.gains if (row.subject, row.where) == ("torch", "adapted")]
    assert (row.cause, row.suites, row.gain.value) == ("unlabelled", ("adapted:sketch",), 0.4)
    mine = summary_of(report, "torch", "mine")
    assert (mine.apart, mine.adapted_avg) == ({"adapted:sketch": 0.9}, 0.9)
    assert mine.ood == {"photo": 0.9}
    assert set(summary_of(report, "torch", "base").ood) == {"photo", "sketch"}
    assert summary_of(report, "teacher", "mine").same_as is None, "it was tested on other domains"
    [told] = [text.body for text in answers(report) if text.label == "Unlabelled images"]
    assert told.startswith("mine against base")
    assert "on the adapted domains" in told
