"""What rounding weights shifts on average comes back through the biases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from export_fakes import SIZE, Block, logits, pictures
from onnx import numpy_helper
from torch import nn

from edgekd.core.preprocess import Preprocess
from edgekd.export.graph import Deployable
from edgekd.export.onnx import export_onnx
from edgekd.export.onnx_graph import Graph
from edgekd.export.quantize import calibration as ranges
from edgekd.export.quantize.onnx_scheme import averaged_inputs, correct_biases
from edgekd.export.quantize.onnxruntime import OnnxRuntimeInt8


def one_layer(group: int, bias: np.ndarray, *, shared: bool = False) -> onnx.ModelProto:
    """`x` [B, 4, H, W] through one convolution with two outputs, without a file or a test image."""
    weight = np.arange(2 * (4 // group), dtype=np.float32).reshape(2, 4 // group, 1, 1) + 0.4
    nodes = [onnx.helper.make_node("Conv", ["x", "w", "b"], ["y"], "conv", group=group)]
    nodes += [onnx.helper.make_node("Add", ["y", "b"], ["z"], "add")] if shared else []
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [],
        [],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    return onnx.helper.make_model(graph)


@pytest.mark.parametrize(
    ("group", "expected"),
    [(1, [10 + 0.4 * 10, 20 + 0.4 * 10]), (2, [10 + 0.4 * (1 + 2), 20 + 0.4 * (3 + 4)])],
)
def test_by_hand(group: int, expected: list[float]) -> None:
    """Weights k + 0.4 are rounded to k, so each input's mean is missing 0.4 times."""
    model = one_layer(group, np.array([10, 20], np.float32))
    done = correct_biases(
        Graph(model), {"x": np.array([1.0, 2.0, 3.0, 4.0])}, {"w": (0, np.ones(2, np.float32))}
    )
    assert done == 1
    np.testing.assert_allclose(
        numpy_helper.to_array(model.graph.initializer[1]), expected, rtol=1e-6
    )


def test_what_cannot_be_corrected_stays() -> None:
    means, scales = {"x": np.ones(4)}, {"w": (0, np.ones(2, np.float32))}
    for model in (
        one_layer(1, np.zeros(2, np.float32), shared=True),
        one_layer(1, np.zeros(2, np.float32)),
    ):
        known = means if len(model.graph.node) > 1 else {}
        assert correct_biases(Graph(model), known, scales) == 0
        assert not numpy_helper.to_array(model.graph.initializer[1]).any()


def test_outputs_keep_their_means(tmp_path: Path) -> None:
    """The pointwise layer has no border, so its output's mean over the images comes back exactly."""
    path = tmp_path / "fp32.onnx"
    export_onnx(
        Deployable(Block(), nn.Linear(16, 4), Preprocess(size=SIZE)), path, size=SIZE, metadata={}
    )
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    images = pictures(2 * ranges._BATCH + 3)
    graph = Graph(model)
    averaged = averaged_inputs(graph, OnnxRuntimeInt8().float_nodes(graph))
    _, means = ranges.observe(model, images, [], averaged)
    head = next(node for node in model.graph.node if node.op_type == "Gemm")
    pointwise = next(node for node in model.graph.node if "pointwise" in "".join(node.input))
    assert {head.input[0], pointwise.input[0]} <= set(averaged)
    before = logits(path, images).mean(axis=0)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    weight = numpy_helper.to_array(constants[pointwise.input[1]])
    coarse = np.full(16, 0.1, np.float32)
    rounded = (0.1 * np.round(weight / np.float32(0.1))).astype(np.float32)
    errors = []
    for corrected in (False, True):
        if corrected:
            assert correct_biases(Graph(model), means, {pointwise.input[1]: (0, coarse)}) == 1
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        tensor = next(
            tensor for tensor in changed.graph.initializer if tensor.name == pointwise.input[1]
        )
        tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
        onnx.save(changed, tmp_path / "changed.onnx")
        errors.append(np.abs(logits(tmp_path / "changed.onnx", images).mean(axis=0) - before).max())
    assert errors[1] < 1e-5 < 1e-3 < errors[0]
