"""The FP32 graph in the form that int8 kernels run fast, with the same outputs.

Means over height and width become GlobalAveragePool, which ONNX Runtime has in int8. Depthwise convolutions get zero
channels up to a multiple of 16: their int8 kernels work on 16 channels at a time, and others fall into code that is
several times slower. Padded channels are zero, or are read with zero weights, so the results stay the same.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto

from edgekd.export.onnx.graphs import Graph, attribute, replace_nodes, set_attribute

LANES = 16
"""Channels that one step of the depthwise int8 kernels takes."""
_SAME_CHANNELS = (
    "AveragePool",
    "Clip",
    "Elu",
    "Gelu",
    "GlobalAveragePool",
    "HardSigmoid",
    "HardSwish",
    "LeakyRelu",
    "MaxPool",
    "Relu",
    "Sigmoid",
)


def integer_form(model: onnx.ModelProto, *, padded: bool = True) -> onnx.ModelProto:
    """Return a copy of `model`, an FP32 file, in the form that int8 kernels run fast; `padded` with zero channels."""
    copy = _pooled(model)
    if padded and _pad_depthwise(copy):
        del copy.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(copy)


def can_be_padded(model: onnx.ModelProto) -> bool:
    """Return whether `integer_form` adds channels to `model`, an FP32 file."""
    return _pad_depthwise(_pooled(model))


def _pooled(original: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with shapes, whose means over height and width are GlobalAveragePool."""
    model = onnx.shape_inference.infer_shapes(original)
    graph, nodes = Graph(model), []
    for node in model.graph.node:
        nodes.append(node)
        axes_given = len(node.input) > 1 and node.input[1] in graph.constants
        if node.op_type != "ReduceMean" or not axes_given:
            continue
        rank = len(graph.shape(node.input[0]))
        axes = sorted(int(axis) % rank for axis in graph.value(node.input[1])) if rank == 4 else []
        if axes != [2, 3]:
            continue
        output, keeps = node.output[0], attribute(node, "keepdims", 1)
        node.op_type = "GlobalAveragePool"
        del node.input[1:]
        del node.attribute[:]
        if not keeps:
            node.output[0] = f"{output}/map"
            name = f"{node.name}/flat"
            nodes.append(onnx.helper.make_node("Flatten", [node.output[0]], [output], name=name))
    replace_nodes(model.graph, nodes)
    return model


def _pad_depthwise(model: onnx.ModelProto) -> bool:
    """Pad channels around depthwise convolutions to multiples of `LANES`, in place; return whether any were."""
    graph, group = Graph(model), _Groups()
    for name in (*graph.outputs, *(one.name for one in model.graph.input)):
        group.fix(name)
    for node in model.graph.node:
        _join(graph, node, group)
    wanted: dict[str, int] = {}
    for node in model.graph.node:
        if _is_depthwise(graph, node):
            channels = graph.shape(node.input[1])[0]
            root = group.root(node.input[0])
            if channels % LANES and not group.is_fixed(root):
                wanted[root] = -channels % LANES
    for node in model.graph.node:
        if node.op_type == "Conv":
            before, after = (
                wanted.get(group.root(name), 0) for name in (node.input[0], node.output[0])
            )
            _pad_conv(graph, node, before, after)
    return bool(wanted)


def _join(graph: Graph, node: NodeProto, group: _Groups) -> None:
    """Record which of a node's tensors have the same channels, and which cannot get more of them."""
    data = graph.activations(node)
    if node.op_type in _SAME_CHANNELS:
        group.join(node.input[0], node.output[0])
    elif node.op_type in ("Add", "Mul") and len(data) == 2 and _same_channels(graph, data):
        group.join(data[0], data[1])
        group.join(data[0], node.output[0])
    elif node.op_type == "Conv" and node.input[1] in graph.constants:
        shared = any(len(graph.readers[name]) > 1 for name in node.input[1:])
        depthwise = _is_depthwise(graph, node)
        if depthwise:
            group.join(node.input[0], node.output[0])
        if shared or not (depthwise or attribute(node, "group", 1) == 1):
            group.fix(node.input[0])
            group.fix(node.output[0])
    else:
        for name in (*data, *node.output):
            group.fix(name)


def _same_channels(graph: Graph, names: list[str]) -> bool:
    shapes = [graph.shape(name) for name in names]
    return all(len(shape) == 4 for shape in shapes) and shapes[0][1] == shapes[1][1] > 0


def _is_depthwise(graph: Graph, node: NodeProto) -> bool:
    if node.op_type != "Conv" or node.input[1] not in graph.constants:
        return False
    shape = graph.shape(node.input[1])
    return len(shape) == 4 and shape[1] == 1 and attribute(node, "group", 1) == shape[0] > 1


def _pad_conv(graph: Graph, node: NodeProto, before: int, after: int) -> None:
    """Give a convolution `before` more input channels and `after` more output channels, with zero weights."""
    if not before and not after:
        return
    depthwise = _is_depthwise(graph, node)
    weight = graph.value(node.input[1])
    width = [(0, after), (0, 0 if depthwise else before), (0, 0), (0, 0)]
    graph.set_value(node.input[1], np.pad(weight, width))
    if after and len(node.input) > 2:
        graph.set_value(node.input[2], np.pad(graph.value(node.input[2]), (0, after)))
    if depthwise:
        set_attribute(node, "group", weight.shape[0] + after)


class _Groups:
    """Tensors that share their channels: a union-find, where a group can be fixed."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}
        self._fixed: set[str] = set()

    def root(self, name: str) -> str:
        while (parent := self._parent.get(name, name)) != name:
            name = parent
        return name

    def join(self, one: str, other: str) -> None:
        a, b = self.root(one), self.root(other)
        if a != b:
            self._parent[a] = b
            if a in self._fixed:
                self._fixed.add(b)

    def fix(self, name: str) -> None:
        self._fixed.add(self.root(name))

    def is_fixed(self, name: str) -> bool:
        return self.root(name) in self._fixed
