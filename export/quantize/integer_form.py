"""The FP32 graph in the form that int8 kernels run fast, with the same outputs.

Means over height and width become GlobalAveragePool, which ONNX Runtime has in int8. Depthwise convolutions get zero
channels up to a multiple of 16: their int8 kernels work on 16 channels at a time, and others fall into code that is
several times slower. Padded channels are zero, or are read with zero weights, so the results stay the same.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto
from scipy.cluster.hierarchy import DisjointSet

from edgekd.export.onnx.graphs import Graph, attribute, replace_nodes, set_attribute

LANES = 16
"""Channels that one step of the depthwise int8 kernels takes."""
_SAME_CHANNELS = (
    "AveragePool", "Clip", "Elu", "Gelu", "GlobalAveragePool", "HardSigmoid", "HardSwish", "LeakyRelu", "MaxPool",
    "Relu", "Sigmoid",
)  # fmt: skip


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
    graph = Graph(model)
    pairs: list[tuple[str, str]] = []
    fixed = {*graph.outputs, *(one.name for one in model.graph.input)}
    for node in model.graph.node:
        joined, left = _same_channels(graph, node)
        pairs += [(joined[0], name) for name in joined[1:]]
        fixed.update(left)
    group = DisjointSet({*fixed, *(name for pair in pairs for name in pair)})
    for pair in pairs:
        group.merge(*pair)
    fixed = {group[name] for name in fixed}
    wanted: dict[str, int] = {}
    for node in model.graph.node:
        if _is_depthwise(graph, node) and group[node.input[0]] not in fixed:
            channels = graph.shape(node.input[1])[0]
            if channels % LANES:
                wanted[group[node.input[0]]] = -channels % LANES
    for node in model.graph.node:
        if node.op_type == "Conv":
            before, after = (
                wanted.get(group[name], 0) if name in group else 0
                for name in (node.input[0], node.output[0])
            )
            _pad_conv(graph, node, before, after)
    return bool(wanted)


def _same_channels(graph: Graph, node: NodeProto) -> tuple[list[str], list[str]]:
    """Return which of a node's tensors have the same channels, and which cannot get more of them."""
    data = graph.activations(node)
    if node.op_type in _SAME_CHANNELS:
        return [node.input[0], node.output[0]], []
    if node.op_type in ("Add", "Mul") and len(data) == 2:
        shapes = [graph.shape(name) for name in data]
        if all(len(shape) == 4 for shape in shapes) and shapes[0][1] == shapes[1][1] > 0:
            return [*data, node.output[0]], []
    if node.op_type != "Conv" or node.input[1] not in graph.constants:
        return [], [*data, *node.output]
    ends, depthwise = [node.input[0], node.output[0]], _is_depthwise(graph, node)
    shared = any(len(graph.readers[name]) > 1 for name in node.input[1:])
    fixed = shared or not (depthwise or attribute(node, "group", 1) == 1)
    return (ends if depthwise else []), (ends if fixed else [])


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
