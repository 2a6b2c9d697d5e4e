"""An artifact made by hand: its logits are the means of the colour channels, its classes `r`, `g` and `b`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgekd.core.manifest import Artifact, TensorSpec
from edgekd.core.preprocess import Preprocess
from edgekd.core.readers import sha256_file
from edgekd.export.parity import compare


def channel_means() -> onnx.ModelProto:
    """uint8 `[B, 16, 16, 3]` → the mean of each channel, as "logits"."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["x", "axes"], ["logits"], keepdims=0),
        ],
        "means",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 16, 16, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2])],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def write_artifact(folder: Path, content: bytes) -> Path:
    folder.mkdir()
    (folder / "model.onnx").write_bytes(content)
    Artifact(
        name="onnxruntime-fp32",
        target="onnxruntime",
        format="onnx",
        precision="fp32",
        files={"model.onnx": sha256_file(folder / "model.onnx")},
        inputs=(
            TensorSpec(name="image", dtype="uint8", shape=("batch", 16, 16, 3), layout="NHWC RGB"),
        ),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 3), layout="NC"),),
        classes=("r", "g", "b"),
        preprocess=Preprocess(size=16),
        parity=compare(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)),
        source={},
        versions={},
        created="2026-01-01T00:00:00+00:00",
    ).write(folder)
    return folder
