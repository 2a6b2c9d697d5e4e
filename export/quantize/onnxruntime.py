"""INT8 for ONNX Runtime on CPU: static Q/DQ, activations uint8 per tensor, weights int8 per output channel.

What stays in float costs accuracy when quantized and saves no time: the pixel normalisation, the first convolution, the
additions between tokens, and the logits. Biases are corrected for the rounding of the weights.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto

from edgekd.core.predictor import Predictor
from edgekd.export.onnx.evaluate import runtime_evaluator
from edgekd.export.onnx.graphs import WEIGHTED_OPS, Graph, channel_rows, output_axis
from edgekd.export.quantize import qdq
from edgekd.export.quantize.integer_form import integer_form
from edgekd.export.quantize.onnx_scheme import (
    Calibrated,
    OnnxScheme,
    WeightScales,
    ahead_of_layers,
    between_tokens,
    group_names,
)
from edgekd.export.quantize.search import Group

_STEM_CHANNELS, _STEM_WEIGHTS = 4, 8192
"""At most, of a first convolution that stays in float."""
_LEADING_OPS = (*WEIGHTED_OPS, "Add", "Concat")
Pairs = Literal["none", "neighbours", "any"]


class OnnxRuntimeInt8(OnnxScheme):
    """INT8 for ONNX Runtime; `padded` as for `integer_form`."""

    method = "ONNX Runtime static Q/DQ: activations uint8 per tensor, weights int8 per channel"
    ops = qdq.INTEGER_OPS
    symmetric = False
    rest = "fp32"

    def __init__(self, *, padded: bool = True) -> None:
        self.padded = padded

    def prepare(self, model: onnx.ModelProto) -> onnx.ModelProto:
        return integer_form(model, padded=self.padded)

    def float_nodes(self, graph: Graph) -> list[str]:
        """Return what is named above, and the first layer where it is a small convolution of the image.

        That is two to three times faster in float than the int8 kernel with 3 channels. Rounding around additions of
        tokens would keep ONNX Runtime from adding in float what its int8 product gives in float.
        """
        ahead, nodes = ahead_of_layers(graph), graph.proto.node
        stem = nodes[len(ahead)] if len(ahead) < len(nodes) else None
        if stem is not None and stem.op_type == "Conv":
            shape = graph.shape(stem.input[1])
            if shape[1] <= _STEM_CHANNELS and np.prod(shape) <= _STEM_WEIGHTS:
                ahead.append(stem.name)
        return ahead + between_tokens(graph)

    def weight_scales(self, node: NodeProto, weight: NDArray[Any]) -> WeightScales | None:
        pairs: Pairs = "neighbours"
        if node.op_type == "Conv":
            if int(np.prod(weight.shape[2:])) > 1:
                pairs = "none" if weight.shape[1] == 1 else "any"
        elif weight.ndim != 2:
            return None
        axis = output_axis(node, weight.ndim)
        return axis, safe_scales(channel_rows(weight, axis), pairs=pairs)

    def quantized(
        self, model: onnx.ModelProto, calibrated: Calibrated, in_float: Collection[str]
    ) -> list[NodeProto]:
        return list(qdq.plan(model, {*calibrated.in_float, *in_float}).taken.values())

    def insert_pairs(
        self, model: onnx.ModelProto, calibrated: Calibrated, in_float: Collection[str]
    ) -> onnx.ModelProto:
        chosen = qdq.plan(model, {*calibrated.in_float, *in_float})
        qdq.quantize(model, calibrated.ranges, chosen, self.weight_scales)
        return model

    def groups(self, calibrated: Calibrated) -> list[Group]:
        """Return layers and additions, each with the activations, pools and products behind it."""
        taken = self.quantized(calibrated.model, calibrated, ())
        groups: list[tuple[NodeProto, list[str]]] = []
        after: dict[str, list[str]] = {}  # tensor → the nodes of the group that computes it
        before: dict[str, list[str]] = {}  # tensor → the nodes of the first group that reads it
        for node in taken:
            if node.op_type in _LEADING_OPS:
                groups.append((node, nodes := [node.name]))
                before |= {name: nodes for name in node.input if name not in before}
        for node in taken:
            if node.op_type not in _LEADING_OPS:
                (nodes := after.get(node.input[0]) or before[node.input[0]]).append(node.name)
                before.setdefault(node.output[0], nodes)
            else:
                nodes = next(nodes for lead, nodes in groups if lead is node)
            after[node.output[0]] = nodes
        names = group_names(Graph(calibrated.model), [node for node, _ in groups])
        return [
            Group(names[node.name], tuple(nodes), node.op_type in WEIGHTED_OPS)
            for node, nodes in groups
        ]

    def open(self, path: Path) -> Predictor:
        return runtime_evaluator(path)


def safe_scales(rows: NDArray[np.float32], *, pairs: Pairs) -> NDArray[np.float32]:
    """Return the scale of each output channel's int8 weights, so that no pair of products overflows 16 bits.

    Processors without VNNI add two u8 × s8 products in 16 bits, saturating: 255 · |a + b| must stay below 32768, or
    the model is ruined there without a word. Reducing all weights to 7 bits guarantees that and costs accuracy
    everywhere; this widens only the channels where two weights of one sign meet. Opposite signs cannot overflow.

    Args:
        rows: float32 `[channels, K]`, in the order in which the products are summed.
        pairs: which weights of a row can meet: none (a depthwise kernel works in 32 bits), neighbours 2j and
            2j + 1 (`K` runs over input channels only), or any two (the order depends on the memory layout).

    Returns:
        float32 `[channels]`, above 0; the integer weights are `round(row / scale)`.
    """
    scale = np.abs(rows).max(axis=1) / 127
    if pairs == "any":
        ordered = np.partition(rows, (0, 1, -2, -1), axis=1) if rows.shape[1] > 2 else np.sort(rows)
        sums = [ordered[:, :2].sum(axis=1), ordered[:, -2:].sum(axis=1)]
        meeting = np.abs(np.stack(sums, axis=1))
    else:
        even = rows if rows.shape[1] % 2 == 0 else np.pad(rows, ((0, 0), (0, 1)))
        meeting = np.abs(even[:, 0::2] + even[:, 1::2])
    if pairs != "none":  # rounding may add 1, and 255 · 128 = 32640 still fits
        scale = np.maximum(scale, meeting.max(axis=1) / 127)
    return np.where(scale > 0, scale, 1).astype(np.float32)
