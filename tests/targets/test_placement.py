"""Which node ran on which provider, as the runtimes tell it, and that no report is written of a fallback."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from benchmark_fakes import SHORT, fake_measurements, four_subjects, id_and_ood, paint_images
from device_fakes import write_artifact

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.report.document import document
from edgekd.benchmark.report.render import markdown
from edgekd.core.errors import EdgekdError
from edgekd.targets.onnxruntime import profiled_nodes
from edgekd.targets.session import Placement, open_session, refuse_fallback

IMAGE = np.zeros((1, 16, 16, 3), dtype=np.uint8)
OPERATORS = {"Cast": 1, "ReduceMean": 1, "Mul": 1}
AZURE, CPU = "AzureExecutionProvider", "CPUExecutionProvider"


def test_every_node_of_an_onnx_artifact_is_named(tmp_path: Path) -> None:
    session = open_session(write_artifact(tmp_path / "fp32"))
    placement = session.placement()
    assert placement is not None
    assert (placement.provider, placement.nodes) == (CPU, {CPU: OPERATORS})
    assert placement.counts() == {CPU: 3}
    refuse_fallback("fp32", placement)
    assert not list(tmp_path.glob("**/*.json.*"))  # the profile itself does not stay


@pytest.mark.skipif(
    AZURE not in onnxruntime.get_available_providers(), reason="this ONNX Runtime has one provider"
)
def test_a_real_fallback_is_found_and_refused(tmp_path: Path) -> None:
    """Azure's provider takes no plain operator, so ONNX Runtime hands all of them to the CPU without a word."""
    folder = write_artifact(tmp_path / "fp32")
    nodes = profiled_nodes(folder / "model.onnx", IMAGE, [AZURE, CPU], onnxruntime.SessionOptions())
    assert nodes == {CPU: OPERATORS}
    with pytest.raises(
        EdgekdError, match=r"AzureExecutionProvider.*3 of 3 nodes on CPU.*Cast, Mul, ReduceMean"
    ):
        refuse_fallback("r/fp32", Placement(AZURE, nodes, "ONNX Runtime's profile"))


def test_a_partial_fallback_and_an_empty_profile_are_refused() -> None:
    mixed = Placement("CUDA", {"CPU": {"Resize": 1}, "CUDA": {"Conv": 3}}, "a test")
    assert mixed.counts() == {"CUDA": 3, "CPU": 1}
    with pytest.raises(EdgekdError, match=r"1 of 4 nodes on CPU \(Resize\)"):
        refuse_fallback("x", mixed)
    with pytest.raises(EdgekdError, match="no node"):
        refuse_fallback("x", Placement("CPU", {}, "a test"))


def test_openvino_reports_operators_with_their_precision(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    from edgekd.core.manifest import read_artifact
    from edgekd.targets.openvino import open_file

    folder = write_artifact(tmp_path / "ov")
    openvino.save_model(
        openvino.convert_model(folder / "model.onnx"), folder / "model.xml", compress_to_fp16=False
    )
    artifact = dataclasses_replace_files(read_artifact(folder), "model.xml")
    data = artifact.model_dump(mode="json")
    placement = open_file(data, folder, threads=1, spinning=True, provider=None).placement()
    assert placement is not None
    assert (placement.provider, list(placement.nodes)) == ("CPU", ["CPU"])
    assert all(kind.split()[-1] in ("f32", "u8") for kind in placement.nodes["CPU"])
    refuse_fallback("ov", placement)


def dataclasses_replace_files(artifact, name):  # type: ignore[no-untyped-def]
    return artifact.model_copy(update={"format": "openvino", "files": {name: "0" * 64}})


def placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fp32: Placement | None):  # type: ignore[no-untyped-def]
    fake_measurements(monkeypatch, {"r/onnxruntime-fp32": 2.0, "r/onnxruntime-int8": 3.0})
    subjects = four_subjects(tmp_path)
    subjects[2] = dataclasses.replace(subjects[2], placement=lambda: fp32)
    return run_benchmark(subjects, id_and_ood(paint_images()), tmp_path / "out", speed=SHORT)


def test_the_report_shows_where_each_node_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Placement(CPU, {CPU: {"Conv": 12, "Add": 3}}, "ONNX Runtime's profile")
    report = placed(tmp_path, monkeypatch, told)
    rows = {row.subject: row for row in report.placements}
    assert rows["onnxruntime-fp32"].nodes == told.nodes
    assert rows["onnxruntime-int8"].nodes is None
    text = markdown(document(report))
    assert "| CPUExecutionProvider | 15 | Conv 12, Add 3 | ONNX Runtime's profile |" in text
    assert "| r/onnxruntime-int8 | – | – | n/a |" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Conv 12, Add 3" in page


def test_no_report_is_written_of_a_fallback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EdgekdError, match="fell back: 1 of 2 nodes on CPUExecutionProvider"):
        placed(
            tmp_path,
            monkeypatch,
            Placement("CUDA", {"CUDA": {"Conv": 1}, CPU: {"Resize": 1}}, "a test"),
        )
    assert not (tmp_path / "out").exists()
