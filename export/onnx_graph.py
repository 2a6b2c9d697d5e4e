"""Look-ups in an ONNX graph: who writes and reads a tensor, its shape, its value, a node's attributes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
from numpy.typing import NDArray

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
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.proto.node:
            for name in node.input:
                if name:
                    self.readers[name].append(node)
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

    def activations(self, node: onnx.NodeProto) -> list[str]:
        """Return the computed inputs of a node, in order."""
        return [name for name in node.input if name and name not in self.constants]

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """Return the one node that reads a tensor; None where several do, or the caller of the graph."""
        found = self.readers.get(name, [])
        return found[0] if len(found) == 1 and name not in self.outputs else None


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return the value of a node's attribute."""
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    """Set or replace a node's attribute."""
    for item in list(node.attribute):
        if item.name == name:
            node.attribute.remove(item)
    node.attribute.append(onnx.helper.make_attribute(name, value))


def output_axis(node: onnx.NodeProto, rank: int) -> int:
    """Return the axis of a weight's output channels."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return rank - 1


def drop_unused(model: onnx.ModelProto) -> None:
    """Remove constants that no node reads, in place."""
    used = {name for node in model.graph.node for name in node.input}
    used |= {output.name for output in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def sorted_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return `model` with every node behind those that it reads, changed in place.

    ONNX Runtime's conversion to half precision puts the casts around a node that stays in float at the end.
    """
    from onnxruntime.quantization.onnx_model import ONNXModel

    wrapped = ONNXModel(model)
    wrapped.topological_sort()
    result: onnx.ModelProto = wrapped.model
    return result
