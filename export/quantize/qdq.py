"""Insert Q/DQ pairs that ONNX Runtime fuses with adjacent operators into integer operators.

Activations are uint8 per tensor, weights int8 per output channel, biases int32. Activation functions are simplified:

- Relu and Clip are removed: the QuantizeLinear after them saturates at their limits.
- HardSigmoid is removed: with 3 added to the bias before it, a QuantizeLinear over 0 to 6 does its clip, and a
  DequantizeLinear with a sixth of that scale gives 0 to 1.
- HardSwish, x · clip(x + 3, 0, 6) / 6, becomes one multiplication: its input is stored over −3 to its maximum, so that
  saturation replaces the lower clip, and the same bytes with zero point 0 represent x + 3. The upper clip is a Clip of
  bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper

from edgekd.export.onnx.graphs import (
    WEIGHTED_OPS,
    Graph,
    as_int8,
    attribute,
    drop_unused,
    replace_nodes,
)
from edgekd.export.quantize.calibration import Ranges

SATURATING_OPS = ("Relu", "Clip")
"""Operators that the saturation of a QuantizeLinear replaces."""
MOVING_OPS = ("Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that only move values, so that bytes keep their scale."""
MAP_OPS = (
    "Add", "AveragePool", "Concat", "GlobalAveragePool", "HardSigmoid", "HardSwish", "Mul", "Sigmoid",
)  # fmt: skip
"""Operators with an int8 kernel that is faster than float if the inputs are bytes already."""
INTEGER_OPS = (*WEIGHTED_OPS, *MAP_OPS, *SATURATING_OPS, *MOVING_OPS)
_TOKENS = ("Concat", "Add", "Mul", "Sigmoid")
"""Operators that are quantized only on maps `[B, C, H, W]`, since ONNX Runtime's int8 products give float tokens."""

WeightScaling = Callable[[NodeProto, NDArray[np.float32]], tuple[int, NDArray[Any]] | None]
"""Node and its float weight → axis of its output channels and their scales; None if it stays float."""


@dataclass(frozen=True)
class Steps:
    """Scale and zero point of bytes: `scale · (byte − zero)`."""

    scale: np.float32
    zero: int

    @classmethod
    def over(cls, low: float, high: float) -> Steps:
        """Return the 256 steps over `low` to `high`, extended to include 0 exactly."""
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        scale = np.float32((high - low) / 255) if high > low else np.float32(1)
        if not scale > 0:  # underflow in float32
            scale = np.float32(1)
        return cls(scale, int(np.clip(round(-low / float(scale)), 0, 255)))


@dataclass(frozen=True)
class Plan:
    """The parts of a graph to quantize."""

    taken: dict[str, NodeProto]
    """Nodes to quantize, by name, in graph order."""
    rounded: frozenset[str]
    """Activations to store as bytes, without those before a fused activation function."""


def plan(model: onnx.ModelProto, in_float: Collection[str]) -> Plan:
    """Return the parts of `model` to quantize, except the nodes `in_float`.

    These are the layers, and operators between them with an int8 kernel and inputs that are bytes already. Other
    operators would need conversions in both directions.
    """
    graph = Graph(model)
    nodes = {
        node.name: node
        for node in model.graph.node
        if node.name not in in_float and node.op_type in WEIGHTED_OPS and _is_layer(graph, node)
    }
    rounded = {name for node in nodes.values() for name in graph.activations(node)}
    rounded |= {node.output[0] for node in nodes.values() if node.op_type == "Conv"}
    taken: dict[str, NodeProto] = {}
    for node in model.graph.node:
        if node.name in nodes:
            taken[node.name] = node
        elif node.name not in in_float and _fits(graph, node, rounded, taken):
            taken[node.name] = node
            rounded.add(node.output[0])
            if node.op_type in SATURATING_OPS:
                rounded.discard(node.input[0])
    return Plan(taken, frozenset(rounded))


def _is_layer(graph: Graph, node: NodeProto) -> bool:
    if not all(graph.is_float(name) for name in (*graph.activations(node), node.output[0])):
        return False
    return node.op_type == "MatMul" or node.input[1] in graph.constants


def _fits(graph: Graph, node: NodeProto, rounded: set[str], taken: Mapping[str, NodeProto]) -> bool:
    """Return whether the inputs of a node are bytes and it has an int8 kernel for them."""
    if node.op_type not in INTEGER_OPS or node.op_type in WEIGHTED_OPS:
        return False
    data = graph.activations(node)
    if not all(name in rounded for name in data) or not graph.is_float(node.output[0]):
        return False
    if node.op_type in _TOKENS and any(len(graph.shape(name)) != 4 for name in data):
        return False
    source = graph.writer.get(node.input[0])
    alone = graph.only_reader(node.input[0]) is not None and node.output[0] not in graph.outputs
    behind = source.op_type if alone and source is not None and source.name in taken else ""
    if node.op_type in SATURATING_OPS:
        return behind != "" and behind not in MOVING_OPS
    if node.op_type == "HardSigmoid":
        return behind == "Conv"
    if node.op_type == "HardSwish":
        return behind in ("Conv", "Add")
    return node.op_type not in ("Add", "Mul") or len(data) == 2


def quantize(model: onnx.ModelProto, ranges: Ranges, chosen: Plan, scaling: WeightScaling) -> None:
    """Insert the Q/DQ pairs of the plan `chosen` into `model`, in place.

    Args:
        ranges: extremes of every quantized activation.
    """
    _Writer(model, ranges, chosen, scaling).write()
    drop_unused(model)


class _Writer:
    """Writes the quantized nodes in one pass over the graph."""

    def __init__(
        self, model: onnx.ModelProto, ranges: Ranges, chosen: Plan, scaling: WeightScaling
    ) -> None:
        self.graph, self.ranges, self.scaling = Graph(model), ranges, scaling
        self.taken, self.rounded = chosen.taken, chosen.rounded
        self.nodes: list[NodeProto] = []
        self.steps: dict[str, Steps] = {}
        """Quantized tensor → its scale and zero point."""
        self.alias: dict[str, str] = {}
        """Output of a removed operator → its replacement."""
        self.swished = {
            node.input[0]: node for node in self.taken.values() if node.op_type == "HardSwish"
        }
        self.gated = {
            node.input[0]: node for node in self.taken.values() if node.op_type == "HardSigmoid"
        }

    def write(self) -> None:
        graph = self.graph
        for one in graph.proto.input:
            if one.name in self.rounded:
                self._round(one.name)
        for node in list(graph.proto.node):
            if node.op_type in SATURATING_OPS and node.name in self.taken:
                continue  # replaced by the output of the previous node
            self._emit(node)
        replace_nodes(graph.proto, self.nodes)
        del graph.proto.value_info[:]

    def _emit(self, node: NodeProto) -> None:
        """Write a node and the pairs after its outputs."""
        taken = node.name in self.taken
        if taken and node.op_type == "HardSigmoid":
            return  # the bytes of its input are read as its output
        made = NodeProto()
        made.CopyFrom(node)
        made.input[:] = [self._read(name) for name in node.input]
        if taken and node.op_type in WEIGHTED_OPS:
            self._weigh(node, made)
        if taken and node.op_type == "HardSwish":
            self._swish(node, made)
        self.nodes.append(made)
        for place, name in enumerate(node.output):
            last = self._behind(name)
            made.output[place] = last
            if last in self.rounded:
                self._round(last, source=node if taken and node.op_type in MOVING_OPS else None)

    def _behind(self, name: str) -> str:
        """Return the output of the saturating operators after a tensor, if they are fused."""
        while (reader := self.graph.only_reader(name)) is not None:
            if reader.op_type not in SATURATING_OPS or reader.name not in self.taken:
                break
            name = reader.output[0]
        return name

    def _read(self, name: str) -> str:
        """Return the name that replaces a tensor as an input."""
        return f"{name}/read" if name in self.steps else name

    def _round(self, name: str, source: NodeProto | None = None) -> None:
        """Quantize a tensor, and dequantize it.

        Args:
            source: the moving operator that produces it, whose input has the scale.
        """
        gate, swish = self.gated.get(name), self.swished.get(name)
        if source is not None and source.input[0] in self.steps:
            steps = self.steps[source.input[0]]
        elif gate is not None:
            alpha = float(attribute(gate, "alpha", 0.2))
            steps = Steps(np.float32(1 / (255 * alpha)), 0)
        elif swish is not None:
            # With a whole number of steps from −3 to 0, reading with zero point 0 adds exactly 3.
            count = max(int(765 / (max(float(self.ranges[name][1]), 0.0) + 3)), 1)
            steps = Steps(np.float32(3 / count), count)
        else:
            low, high = self.ranges[name]
            steps = Steps.over(float(low), float(high))
        self.steps[name] = steps
        stored = f"{name}/bytes"
        self._pair("QuantizeLinear", name, steps, stored)
        if gate is None:
            self._pair("DequantizeLinear", stored, steps, f"{name}/read")
            return
        output = gate.output[0]
        self.steps[output] = Steps(np.float32(1 / 255), 0)
        self._pair("DequantizeLinear", stored, self.steps[output], f"{output}/read")

    def _pair(self, kind: str, source: str, steps: Steps, output: str) -> None:
        graph = self.graph
        scale = graph.add_constant(f"{output}/scale", np.array(steps.scale, np.float32))
        zero = graph.add_constant(f"{output}/zero", np.array(steps.zero, np.uint8))
        self.nodes.append(helper.make_node(kind, [source, scale, zero], [output], name=output))

    def _swish(self, node: NodeProto, made: NodeProto) -> None:
        """Replace HardSwish by a product of its input and the clipped bytes of its input."""
        graph, source = self.graph, node.input[0]
        steps, stored = self.steps[source], f"{source}/bytes"
        if 2 * steps.zero < 255:
            ends = [
                graph.add_constant(f"{source}/{end}", np.array(byte, np.uint8))
                for end, byte in (("from", 0), ("to", 2 * steps.zero))
            ]
            clipped = f"{source}/clipped"
            self.nodes.append(helper.make_node("Clip", [stored, *ends], [clipped], name=clipped))
            stored = clipped
        gate = f"{source}/gate"
        self._pair("DequantizeLinear", stored, Steps(np.float32(float(steps.scale) / 6), 0), gate)
        made.CopyFrom(
            helper.make_node("Mul", [f"{source}/read", gate], list(node.output), name=node.name)
        )

    def _weigh(self, node: NodeProto, made: NodeProto) -> None:
        """Store a layer's weights and bias as integers."""
        graph = self.graph
        if node.input[1] not in graph.constants:
            return
        weight = graph.value(node.input[1]).astype(np.float32)
        found = self.scaling(node, weight)
        if found is None:
            return
        axis, scales = found
        bias = graph.value(node.input[2]).astype(np.float64) if len(node.input) > 2 else None
        if (gate := self.gated.get(node.output[0])) is not None:
            more = float(attribute(gate, "beta", 0.5)) / float(attribute(gate, "alpha", 0.2))
            bias = (np.zeros(len(scales)) if bias is None else bias) + more
        rows = np.abs(np.moveaxis(weight, axis, 0)).reshape(len(scales), -1).max(axis=1)
        if bias is not None and len(graph.readers[node.input[1]]) == 1:
            # The scale of an int32 bias is the product of both scales, which is too small for a row of tiny weights.
            least = np.abs(bias) / float(self.steps[node.input[0]].scale) / 2.0**24
            scales = np.where(rows > 0, np.maximum(scales, least), np.where(least > 0, least, 1))
            scales = scales.astype(np.float32)
        stored = as_int8(weight, scales, axis)
        made.input[1] = self._constant_pair(node.input[1], stored, scales, axis)
        if bias is None:
            return
        step = scales.astype(np.float64) * float(self.steps[node.input[0]].scale)
        whole = np.clip(np.round(bias / step), -(2**31), 2**31 - 1).astype(np.int32)
        read = self._constant_pair(f"{node.name}/bias", whole, step.astype(np.float32), 0)
        made.input[2:] = [read]

    def _constant_pair(
        self, name: str, stored: NDArray[Any], scales: NDArray[np.float32], axis: int
    ) -> str:
        """Store integers with a DequantizeLinear; several layers may share them."""
        if f"{name}/integers" not in self.graph.constants:
            self.nodes.append(self.graph.dequantizer(name, stored, scales.astype(np.float32), axis))
        return f"{name}/read"
