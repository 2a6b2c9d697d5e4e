"""The benchmark on a real, tiny ONNX artifact: the file itself is opened, run and timed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from benchmark_fakes import CLASSES, ONE_THREAD, SHORT, SMALL, paint_images, subject
from onnx import TensorProto, helper

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.evaluate.metrics import log_softmax
from edgekd.benchmark.subjects import Suite
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import Artifact, TensorSpec
from edgekd.core.readers import sha256_file
from edgekd.export.parity import compare
from edgekd.targets.session import open_session
from edgekd.targets.timing import stopwatch
from edgekd.targets.timing.stopwatch import END_TO_END_QUICK, QUICK


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """Logits are the mean red, green and blue."""
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "axes"], ["logits"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 16, 16, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    folder = tmp_path / "onnxruntime-fp32"
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    Artifact(
        name=folder.name,
        target="onnxruntime",
        format="onnx",
        precision="fp32",
        files={"model.onnx": sha256_file(folder / "model.onnx")},
        inputs=(
            TensorSpec(name="image", dtype="uint8", shape=("batch", 16, 16, 3), layout="NHWC"),
        ),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 3), layout="NC"),),
        classes=CLASSES,
        preprocess=SMALL,
        parity=compare(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)),
        source={},
        versions={},
        created="2026-01-01T00:00:00+00:00",
    ).write(folder)
    return folder


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        stopwatch, "QUICK", replace(QUICK, warmup_s=0.01, runs=30, seconds=0.05, block_s=0.005)
    )
    whole = replace(END_TO_END_QUICK, warmup_s=0.01, runs=30, seconds=0.05, block_s=0.005)
    monkeypatch.setattr(stopwatch, "END_TO_END_QUICK", whole)


def test_the_file_itself_is_measured(artifact: Path, tmp_path: Path) -> None:
    images = paint_images(30)
    one = subject(artifact.name, "artifact", open_session(artifact).run, folder=artifact)
    report = run_benchmark(
        [one], [Suite("id", images, np.arange(30))], tmp_path / "out", speed=ONE_THREAD
    )
    colours = np.stack([images.labels, np.arange(30), np.zeros(30)], axis=1).astype(np.float32)
    [row], [latency] = report.accuracy, report.latency
    assert row.top1 == pytest.approx((colours.argmax(axis=1) == images.labels).mean())
    assert row.nll == pytest.approx(
        -log_softmax(colours)[np.arange(30), images.labels].mean(), rel=1e-5
    )
    assert (latency.provider, latency.threads, latency.quick) == ("CPUExecutionProvider", 1, True)
    assert latency.n >= 30
    assert latency.load_ms is not None
    assert 0 < latency.p50_ms < 50
    # Decoding a PNG and resizing it takes longer than the mean of 768 numbers, and needs numpy and Pillow in memory.
    assert latency.end_to_end_p50_ms is not None
    assert latency.p50_ms < latency.end_to_end_p50_ms < 100
    assert latency.peak_rss_mb is not None
    assert 20 < latency.peak_rss_mb < 1000
    with np.load(tmp_path / "out" / "latency.npz") as kept:
        whole = kept[f"end_to_end_ms/{one.run}/{one.name}"]
    assert len(whole) >= 30
    assert latency.end_to_end_p50_ms in whole
    assert report.summary[0].size_mb == pytest.approx(
        (artifact / "model.onnx").stat().st_size / 1e6
    )


def test_an_altered_artifact_is_refused_and_nothing_is_written(
    artifact: Path, tmp_path: Path
) -> None:
    one = subject(artifact.name, "artifact", open_session(artifact).run, folder=artifact)
    (artifact / "model.onnx").write_bytes((artifact / "model.onnx").read_bytes() + b" ")
    with pytest.raises(EdgekdError, match="not the file that was exported"):
        run_benchmark(
            [one], [Suite("id", paint_images(9), np.arange(9))], tmp_path / "out", speed=SHORT
        )
    assert not (tmp_path / "out").exists()
