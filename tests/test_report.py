"""The whole benchmark on fake models: every number of the report, its schema, and what is said beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_fakes import (
    LARGE,
    SMALL,
    Paint,
    fake_measurements,
    four_subjects,
    id_and_ood,
    model,
    paint_images,
    subject,
)

import edgekd.benchmark.report as report_module
from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.markdown import markdown
from edgekd.benchmark.report import print_table, read_report
from edgekd.benchmark.rows import Report, SummaryRow
from edgekd.benchmark.subjects import Suite
from edgekd.benchmark.table import main_table
from edgekd.errors import EdgekdError

SCHEMA = json.loads((Path(report_module.__file__).parent / "report.schema.json").read_text())
FACTS = {
    "name": "r",
    "seed": 0,
    "split_hash": "abcd",
    "seconds": 61.23456,
    "templates": list("abcde"),
    "domain": None,
}
CONTEXT = {"data": "paint", "runs": [FACTS]}
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
}


def violations(value: Any, schema: dict[str, Any], where: str = "report") -> Iterator[str]:
    """The part of JSON Schema that report.schema.json uses."""
    if "$ref" in schema:
        yield from violations(value, SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]], where)
        return
    names = schema.get("type", [])
    for_type = [names] if isinstance(names, str) else names
    fits = [
        isinstance(value, (int, float)) if name == "number" else isinstance(value, TYPES[name]) for name in for_type
    ]  # fmt: skip
    if for_type and (not any(fits) or (isinstance(value, bool) and "boolean" not in for_type)):
        yield f"{where}: {value!r} is not {names}"
        return
    if "const" in schema and value != schema["const"]:
        yield f"{where}: {value!r} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is none of {schema['enum']}"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        yield f"{where}: {value} is out of range"
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{where}: {value!r} does not match"
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{where}: {len(value)} items"
        for place, item in enumerate(value):
            yield from violations(item, schema.get("items", {}), f"{where}[{place}]")
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        yield from (
            f"{where}: {key} is missing" for key in schema.get("required", ()) if key not in value
        )
        for key, item in value.items():
            if key not in known and others is False:
                yield f"{where}: {key} is unknown"
            else:
                yield from violations(item, known.get(key, others), f"{where}.{key}")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_measurements(
            monkeypatch, {"r/onnxruntime-fp32": 2.0, "r/onnxruntime-int8": 3.0}, picture=True
        )
        subjects = four_subjects(folder, sketch_every=3)
        report = run_benchmark(
            subjects, id_and_ood(paint_images()), folder / "out", quick=True, context=CONTEXT
        )
    return report, folder / "out"


def summary_of(report: Report, name: str, run: str = "r") -> SummaryRow:
    return next(row for row in report.summary if (row.run, row.subject) == (run, name))


def test_the_folder_holds_everything_and_the_json_fits_its_schema(
    measured: tuple[Report, Path],
) -> None:
    report, out = measured
    names = {
        "report.html",
        "report.json",
        "report.md",
        "report.png",
        "MODEL_CARD.md",
        "predictions.npz",
        "latency.npz",
    }
    assert {path.name for path in out.iterdir()} == names
    data = json.loads((out / "report.json").read_text())
    assert list(violations(data, SCHEMA)) == []
    assert read_report(out) == report
    assert report.folder == out
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".tmp")] == []


def test_the_schema_test_would_notice(measured: tuple[Report, Path]) -> None:
    data = measured[0].model_dump(mode="json")
    data["accuracy"][0]["top1"] = 97.0
    data["latency"][0].pop("p90_ms")
    data["summary"][0]["extra"] = 1
    data["accuracy"][1]["suite"] = "sketch"
    data["suites"][0]["family"] = "holiday"
    assert len(list(violations(data, SCHEMA))) == 5


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
    assert (int8.id, int8.ood_worst, int8.ood_worst_domain, int8.size_mb) == (
        0.5,
        0.5,
        "photo",
        1.0,
    )
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
    assert (fp32.quant_cost_ood.value, fp32.quant_cost_ood.mcnemar_p, fp32.agreement_ood) == (
        0.0,
        1.0,
        1.0,
    )


def test_accuracy_rows(measured: tuple[Report, Path]) -> None:
    rows = {(row.subject, row.suite): row for row in measured[0].accuracy}
    assert len(rows) == 4 * 3
    row = rows["torch", "ood:sketch"]
    assert (row.n, row.classes, row.top1) == (30, 3, pytest.approx(2 / 3))
    # Wrong on the multiples of three: exactly the cats.
    assert (row.worst_class, row.worst_class_recall, row.macro) == (
        "cat",
        0.0,
        pytest.approx(2 / 3),
    )
    confidence = np.exp(4) / (np.exp(4) + 2)
    assert row.ece == pytest.approx(confidence - 2 / 3, rel=1e-6)


def test_latency_rows_and_raw_samples(measured: tuple[Report, Path]) -> None:
    report, out = measured
    rows = {row.subject: row for row in report.latency}
    fp32 = rows["onnxruntime-fp32"]
    assert (fp32.p50_ms, fp32.n, fp32.processes, fp32.threads) == (pytest.approx(2.0), 201, 1, 2)
    assert (fp32.protocol, fp32.quick, fp32.load_ms, fp32.first_ms) == ("quick", True, 12.0, 9.0)
    assert (rows["teacher"].protocol, rows["teacher"].provider, rows["teacher"].first_ms) == (
        "context",
        "torch",
        None,
    )
    with np.load(out / "latency.npz") as raw:
        assert raw["samples_ms/r/onnxruntime-fp32/0"].mean() == pytest.approx(fp32.mean_ms)
        assert (
            raw["samples_ms/r/teacher/0"].shape
            == raw["blocks/r/teacher/0"].shape
            == (rows["teacher"].n,)
        )


def test_predictions_give_the_numbers_again(measured: tuple[Report, Path]) -> None:
    report, out = measured
    with np.load(out / "predictions.npz") as arrays:
        for row in report.accuracy:
            predicted = arrays[f"logits/{row.run}/{row.subject}/{row.suite}"].argmax(axis=1)
            assert (predicted == arrays[f"labels/{row.suite}"]).mean() == pytest.approx(row.top1)
        assert arrays["ids/id"][0] == "all/cat/0.png"


def test_markdown_says_what_a_reader_needs(measured: tuple[Report, Path]) -> None:
    report, out = measured
    text = (out / "report.md").read_text()
    assert text == markdown(report)
    for part in (
        "# Benchmark (QUICK – indicative only)",
        "| r | torch student | 66.7 | 66.7 | 66.7 | 66.7 | 66.7 | 0.0 | 74.1 |",
        "r: onnxruntime-int8 takes 1.50 times as long as onnxruntime-fp32 (95 % CI",
        "Images: id n = 60, ood:photo n = 30, ood:sketch n = 30.",
        "Run r: seed 0, split hash abcd, seconds 61.23, templates a; b; c and 2 more, domain –.",
        "Data: paint.",
        f"{LARGE.hash} (teacher zero-shot), {SMALL.hash} (torch student, onnxruntime-fp32, onnxruntime-int8)",
        "at least 128 runs and 10 s in one fresh process",
        "threads: 2.",
    ):
        assert part in text


def test_int8_faster_says_nothing_and_full_is_not_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_measurements(monkeypatch, {"r/onnxruntime-fp32": 2.0, "r/onnxruntime-int8": 1.0})
    report = run_benchmark(
        four_subjects(tmp_path), id_and_ood(paint_images()), tmp_path / "out", threads=1
    )
    assert not any("onnxruntime-int8" in note for note in report.notes)
    assert "QUICK" not in markdown(report)
    fp32 = next(row for row in report.latency if row.subject == "onnxruntime-fp32")
    assert (fp32.processes, fp32.n, len(fp32.p50_per_process_ms), fp32.threads) == (5, 1005, 5, 1)
    assert "each of 5 fresh processes" in markdown(report)
    assert list(violations(report.model_dump(mode="json"), SCHEMA)) == []


def test_two_runs_share_their_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_measurements(
        monkeypatch, {f"{run}/onnxruntime-{kind}": 2.0 for run in "ab" for kind in ("fp32", "int8")}
    )
    images = paint_images()
    subjects = four_subjects(tmp_path, run="a") + four_subjects(tmp_path, run="b", sketch_every=5)
    report = run_benchmark(
        subjects, id_and_ood(images), tmp_path / "out", quick=True, examples=False
    )
    assert summary_of(report, "teacher", "a").same_as is None
    assert summary_of(report, "teacher", "b").same_as == "a"
    assert summary_of(report, "torch", "b").retention == pytest.approx(0.8 / 0.9)
    shown = [(run, cells[0]) for run, cells in main_table(report).rows]
    assert len(shown) == 7
    assert [run for run, name in shown if name == "teacher zero-shot"] == ["a"]
    assert isinstance(images.reader, Paint)
    assert images.reader.reads[60:].tolist() == [1] * 60


def test_runs_that_left_out_different_domains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_measurements(monkeypatch, {})
    images = paint_images()
    suites = [
        Suite("id", images, np.arange(0, 60), run="a"),
        Suite("ood:photo", images, np.arange(60, 90), run="a"),
        Suite("id", images, np.arange(30, 90), run="b"),
        Suite("ood:sketch", images, np.arange(90, 120), run="b"),
    ]
    subjects = [
        made
        for run in "ab"
        for made in (
            subject("teacher", "teacher", model(10), run=run, preprocess=LARGE, identity="toy"),
            subject("torch", "torch", model(2), run=run),
        )
    ]
    report = run_benchmark(subjects, suites, tmp_path / "out", quick=True)
    assert [set(row.ood) for row in report.summary] == [
        {"photo"},
        {"photo"},
        {"sketch"},
        {"sketch"},
    ]
    assert [row.same_as for row in report.summary] == [None] * 4
    assert "ood:photo n = 30 (a); id n = 60, ood:sketch n = 30 (b)" in markdown(report)


def test_an_artifact_alone_on_unnamed_shift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_measurements(monkeypatch, {"r/onnxruntime-fp32": 2.0})
    artifact = four_subjects(tmp_path)[2]
    report = run_benchmark([artifact], id_and_ood(paint_images())[:1], tmp_path / "out", quick=True)
    [row] = report.summary
    assert (row.id, row.ood, row.ood_avg, row.gap, row.retention, row.quant_cost_id) == (
        0.5,
        {},
        None,
        None,
        None,
        None,
    )
    assert list(violations(report.model_dump(mode="json"), SCHEMA)) == []
    assert "What the export cost" not in markdown(report)


def test_what_cannot_be_measured_is_refused_before_anything_runs(tmp_path: Path) -> None:
    suites = id_and_ood(paint_images())

    def never(pixels: np.ndarray) -> np.ndarray:
        raise AssertionError("measured")

    one = subject("torch", "torch", never)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    old = tmp_path / "old"
    old.mkdir()
    (old / "report.json").write_text("{}")
    out = tmp_path / "out"
    for subjects, chosen, folder, overwrite, message in (
        ([], suites, out, False, "no model"),
        ([one], [], out, False, "no images"),
        (
            [one],
            [*suites, Suite("ood:art", suites[0].images, np.arange(0))],
            out,
            False,
            "measure on in ood:art",
        ),
        ([one, one], suites, out, False, "r/torch is to be measured twice"),
        (
            [one],
            [Suite("id", suites[0].images, np.arange(3), run="other")],
            out,
            False,
            "torch of run r",
        ),
        ([one], suites, full, True, "holds no report"),
        ([one], suites, full / "thesis.txt", True, "is a file"),
        ([one], suites, old, False, "already holds a report"),
    ):
        with pytest.raises(EdgekdError, match=message):
            run_benchmark(subjects, chosen, folder, overwrite=overwrite)
    assert (full / "thesis.txt").read_text() == "mine"
    assert not out.exists()


def test_overwrite_replaces_an_earlier_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_measurements(monkeypatch, {})
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("{}")
    run_benchmark(
        [subject("torch", "torch", model(2))], id_and_ood(paint_images()), out, overwrite=True
    )
    assert summary_of(read_report(out), "torch").id == 0.5


def test_a_failed_measurement_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_measurements(monkeypatch, {})

    def disk_full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_module, "write_json", disk_full)
    with pytest.raises(EdgekdError, match="is full"):
        run_benchmark(
            [subject("torch", "torch", model(2))],
            id_and_ood(paint_images()),
            tmp_path / "deep" / "out",
        )
    assert list((tmp_path / "deep").iterdir()) == []


def test_console_table_stands_on_one_line_each(
    measured: tuple[Report, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(measured[0])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Benchmark, QUICK – indicative only")
    row = next(line for line in lines if line.lstrip().startswith("onnxruntime-int8"))
    assert re.split(r" {2,}", row.strip())[:2] == ["onnxruntime-int8", "50.0"]
    assert row.rstrip().endswith("1.00")
    assert any("times as long" in line for line in lines)


def test_a_report_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"schema_version": 1}')
    with pytest.raises(EdgekdError, match="not of schema version 2"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text('{"schema_version": 2}')
    with pytest.raises(EdgekdError, match="is damaged"):
        read_report(tmp_path)
