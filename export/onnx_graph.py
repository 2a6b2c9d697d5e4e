"""An ONNX graph at hand: who writes and reads a tensor, its shape and value, a node's attributes, a layer's weight."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
from numpy.typing import NDArray
from onnx import NodeProto

WEIGHTED_OPS = ("Conv", "Gemm", "MatMul")


class Graph:
    """Maps over the graph of `model`, as it is at this moment.

    Args:
        model: with shapes inferred, where shapes are wanted.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.proto = model.graph
        self.constants = {tensor.name: tensor for tensor in self.proto.initializer}
        self.writer = {name: node for node in self.proto.node for name in node.output if name}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.proto.node:
            for name in node.input:
                if name:
                    self.readers[name].append(node)
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.outputs = {output.name for output in self.proto.output}
        self._infos = {
            info.name: info.type.tensor_type
            for info in (*self.proto.value_info, *self.proto.input, *self.proto.output)
        }

    def shape(self, name: str) -> list[int]:
        """Return a tensor's shape with 0 for a free dimension; empty where it is unknown."""
        if name in self.constants:
            return list(self.constants[name].dims)
        info = self._infos.get(name)
        return [dim.dim_value for dim in info.shape.dim] if info is not None else []

    def is_float(self, name: str) -> bool:
        """Return whether a tensor is known to hold float32."""
        info = self._infos.get(name)
        return info is not None and info.elem_type == onnx.TensorProto.FLOAT

    def value(self, name: str) -> NDArray[Any]:
        """Return a constant's value."""
        value: NDArray[Any] = onnx.numpy_helper.to_array(self.constants[name])
        return value

    def set_value(self, name: str, value: NDArray[Any]) -> None:
        """Set a constant's value, and with it its shape and type."""
        self.constants[name].CopyFrom(onnx.numpy_helper.from_array(value, name))

    def add_constant(self, name: str, value: NDArray[Any]) -> str:
        """Add a constant where there is none of this name; return the name."""
        if name not in self.constants:
            self.proto.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
            self.constants[name] = self.proto.initializer[-1]
        return name

    def activations(self, node: NodeProto) -> list[str]:
        """Return the computed inputs of a node, in order."""
        return [name for name in node.input if name and name not in self.constants]

    def only_reader(self, name: str) -> NodeProto | None:
        """Return the one node that reads a tensor; None where several do, or the caller of the graph."""
        found = self.readers.get(name, [])
        return found[0] if len(found) == 1 and name not in self.outputs else None

    def layers(self) -> Iterator[NodeProto]:
        """Yield the convolutions and matrix products with a constant weight, in graph order."""
        for node in self.proto.node:
            if node.op_type in WEIGHTED_OPS and node.input[1] in self.constants:
                yield node


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Return the value of a node's attribute."""
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def set_attribute(node: NodeProto, name: str, value: Any) -> None:
    """Set or replace a node's attribute."""
    for item in list(node.attribute):
        if item.name == name:
            node.attribute.remove(item)
    node.attribute.append(onnx.helper.make_attribute(name, value))


def output_axis(node: NodeProto, rank: int) -> int:
    """Return the axis of a weight's output channels."""
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return {"Conv": 0, "ConvTranspose": 1}.get(node.op_type, rank - 1)


def channel_rows(weight: NDArray[Any], axis: int) -> NDArray[Any]:
    """Return a weight as `[channels, K]`, its output channels along `axis`."""
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[NodeProto]) -> None:
    """Make `nodes`, some of which may be the graph's own, the nodes of a graph."""
    taken = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(taken)


def drop_unused(model: onnx.ModelProto) -> None:
    """Remove constants that no node reads, in place."""
    used = {name for node in model.graph.node for name in node.input}
    used |= {output.name for output in model.graph.output}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)


def sorted_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return `model` with every node behind those that it reads, changed in place."""
    from onnxruntime.quantization.onnx_model import ONNXModel

    wrapped = ONNXModel(model)
    wrapped.topological_sort()
    result: onnx.ModelProto = wrapped.model
    return result


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of `model` that computes in float16, between its uint8 input and its float32 output."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # advice about numbers that round to 0
    try:
        half = convert_float_to_float16(copied(model), keep_io_types=True)
    finally:
        logging.disable(before)
    return sorted_nodes(half)  # the conversion puts the casts around a node in float at the end
