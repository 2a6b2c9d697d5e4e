"""What INT8 takes or leaves as one: a layer or an addition, for ONNX Runtime with what follows it: activations, pools,
products.

Together the units hold every operation that INT8 changes, so a file whose units all stay in float is the FP32 file.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from edgekd.export.onnx_graph import WEIGHTED_OPS
from edgekd.export.quantize.onnxruntime import Calibrated
from edgekd.export.quantize.qdq import plan

_LEADING_OPS = (*WEIGHTED_OPS, "Add", "Concat")


@dataclass(frozen=True)
class Group:
    """Nodes that are quantized together or not at all."""

    name: str
    """For people: the module whose weights it holds, the addition after such a module, or the node's own name."""
    nodes: tuple[str, ...]
    """Names of its nodes, the one that leads first."""
    weighted: bool
    """Whether it is a convolution or a matrix product, and so has multiplications to save."""


def groups_of(calibrated: Calibrated) -> list[Group]:
    """Return every unit that INT8 for ONNX Runtime takes, in graph order; no node is in two of them."""
    taken = plan(calibrated.model, calibrated.in_float).taken
    units: list[tuple[onnx.NodeProto, list[str]]] = []
    after: dict[str, list[str]] = {}  # tensor → the nodes of the unit that computes it
    before: dict[str, list[str]] = {}  # tensor → the nodes of the first unit that reads it
    for node in taken.values():
        if node.op_type in _LEADING_OPS:
            units.append((node, nodes := [node.name]))
            before |= {name: nodes for name in node.input if name not in before}
    for node in taken.values():
        if node.op_type not in _LEADING_OPS:
            (nodes := after.get(node.input[0]) or before[node.input[0]]).append(node.name)
            before.setdefault(node.output[0], nodes)
        else:
            nodes = next(nodes for lead, nodes in units if lead is node)
        after[node.output[0]] = nodes
    names = names_of(calibrated.model, [node for node, _ in units])
    return [
        Group(names[node.name], tuple(nodes), node.op_type in WEIGHTED_OPS) for node, nodes in units
    ]


def names_of(model: onnx.ModelProto, leads: list[onnx.NodeProto]) -> dict[str, str]:
    """Leading node → what people call it."""
    constants = {tensor.name for tensor in model.graph.initializer}
    bias = {  # of a product of tokens, which is added apart
        name: constant
        for node in model.graph.node
        if node.op_type == "Add"
        for name, constant in (node.input[:2], node.input[1::-1])
        if constant in constants
    }
    names: dict[str, str] = {}
    modules: dict[str, str] = {}  # tensor → the module that computes it
    for node in leads:
        names[node.name] = node.name
        if node.op_type in WEIGHTED_OPS and node.input[1] in constants:
            module, _, kind = node.input[1].rpartition(".")
            if kind != "weight":
                module, _, kind = bias.get(node.output[0], "").rpartition(".")
            if kind in ("weight", "bias"):
                modules[node.output[0]] = names[node.name] = module.removeprefix("backbone.")
        elif sources := [modules[name] for name in node.input if name in modules]:
            names[node.name] = f"{node.op_type} after {sources[-1]}"
    return names
