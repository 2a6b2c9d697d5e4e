"""Parameters and multiply-accumulates of an exported file, counted in its own graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

_FLOATS = tuple(map(onnx.TensorProto.DataType.Value, ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")))
_HOLD_GRAPHS = ("If", "Loop", "Scan")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Counted:
    """Size and computation of a model.

    Attributes:
        parameters: elements of its weights and biases.
        macs: multiply-accumulates of convolutions and matrix products for one image, as in timm's tables; None where
            they cannot be counted.
    """

    parameters: int
    macs: int | None


def count_folder(folder: Path) -> Counted | None:
    """Count in the ONNX graph of an artifact's folder; None where the format has none (OpenVINO, Core ML)."""
    found = sorted(folder.glob("*.onnx"))
    return count_onnx(found[0]) if found else None


def count_onnx(path: Path) -> Counted | None:
    """Count in the graph for a batch of one; None for a file that is no ONNX model."""
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        return None
    graph = model.graph
    constants = _constants(graph)
    return Counted(_parameters(graph, constants), _macs(model, constants))


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    nodes = (node for node in graph.node if node.op_type == "Constant")
    made = {
        node.output[0]: one.t for node in nodes for one in node.attribute if one.name == "value"
    }
    return {tensor.name: tensor for tensor in graph.initializer} | made


def _parameters(graph: onnx.GraphProto, constants: Mapping[str, onnx.TensorProto]) -> int:
    """Count float constants, and integers that stand for floats; scales and single numbers are no weights."""
    scales: set[str] = set()
    stored: set[str] = set()
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scales.update(node.input[1:])
        if node.op_type == "DequantizeLinear":
            stored.add(node.input[0])
    return sum(
        math.prod(tensor.dims)
        for name, tensor in constants.items()
        if math.prod(tensor.dims) > 1
        and name not in scales
        and (tensor.data_type in _FLOATS or name in stored)
    )


def _macs(model: onnx.ModelProto, constants: Mapping[str, onnx.TensorProto]) -> int | None:
    if any(node.op_type in _HOLD_GRAPHS for node in model.graph.node):
        return None
    shapes = _shapes(model) | {name: tuple(tensor.dims) for name, tensor in constants.items()}
    try:
        return sum(_macs_of(node, shapes) for node in model.graph.node)
    except KeyError:  # a size that only shows while the graph runs
        return None


def _macs_of(node: onnx.NodeProto, shapes: Shapes) -> int:
    if node.op_type == "Conv":
        # [O, I / groups, kernel…]: each output element takes one of O filters once
        return math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
    if node.op_type == "ConvTranspose":
        return math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])
    if node.op_type == "MatMul":
        return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    if node.op_type == "Gemm":
        turned = any(one.name == "transA" and one.i for one in node.attribute)
        return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if turned else 1]
    return 0


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return the shapes known for a batch of one; those that the file has for any batch are dropped first."""
    graph = model.graph
    del graph.value_info[:]
    for one in graph.output:
        one.type.tensor_type.ClearField("shape")
    for one in graph.input:
        if one.type.tensor_type.shape.dim:
            one.type.tensor_type.shape.dim[0].dim_value = 1
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found = {}
    for one in (*graph.input, *graph.value_info, *graph.output):
        dims = one.type.tensor_type.shape.dim
        if one.type.tensor_type.HasField("shape") and all(
            dim.HasField("dim_value") for dim in dims
        ):
            found[one.name] = tuple(dim.dim_value for dim in dims)
    return found
