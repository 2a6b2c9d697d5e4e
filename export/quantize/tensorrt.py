"""INT8 for TensorRT: explicit Q/DQ in the one form that its strongly typed networks take.

Everything quantized is signed, symmetric and has zero point 0: weights per output channel, activations per tensor.
Biases stay float, and both sides of a residual addition are quantized. What is not quantized computes in half
precision: a strongly typed network runs every layer in the file's own type, so a float32 remainder would cost
more than INT8 gains, and TensorRT-RTX has no float32 matrix product for compute capability 7.5. Products of two
activations, as in attention, are not quantized.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper

from edgekd.core.errors import EdgekdError
from edgekd.core.predictor import Predictor
from edgekd.export.onnx.evaluate import onnx_evaluator
from edgekd.export.onnx.graphs import (
    WEIGHTED_OPS,
    Graph,
    as_int8,
    channel_rows,
    drop_unused,
    output_axis,
    sorted_nodes,
    to_half,
)
from edgekd.export.quantize.calibration import Ranges, float_activations, reach
from edgekd.export.quantize.onnx_scheme import (
    Calibrated,
    OnnxScheme,
    WeightScales,
    ahead_of_layers,
    between_tokens,
    group_names,
)
from edgekd.export.quantize.search import Group

_FLOOR = 2.0**-20  # of a scale: 16 float16 steps above 0, so that rounding moves it by 3 % at most
_HALF_MAX = 65504.0


class TensorRtInt8(OnnxScheme):
    """INT8 for TensorRT."""

    method = (
        "explicit Q/DQ for TensorRT: int8, symmetric, activations per tensor, weights per channel; "
        "the rest in fp16"
    )
    ops = (*WEIGHTED_OPS, "Add")
    symmetric = True
    rest = "fp16"

    def prepare(self, model: onnx.ModelProto) -> onnx.ModelProto:
        return onnx.shape_inference.infer_shapes(model)

    def float_nodes(self, graph: Graph) -> list[str]:
        """Return the normalisation, layers on 1 × 1 maps (squeeze-and-excite), and sums of tokens."""
        small = [
            node.name
            for node in graph.proto.node
            if node.op_type == "Conv" and graph.shape(node.input[0])[2:] == [1, 1]
        ]
        return ahead_of_layers(graph) + small + between_tokens(graph)

    def observed(self, graph: Graph, near: list[str]) -> list[str]:
        return float_activations(graph)

    def check_extremes(self, extremes: Ranges) -> None:
        for name, (low, high) in extremes.items():
            if reach(low, high) > _HALF_MAX:
                raise EdgekdError(
                    f"The activation {name} reaches {reach(low, high):.3g}, above the {_HALF_MAX:.0f} of half "
                    "precision.",
                    "Export with --fp32 for this target.",
                )

    def weight_scales(self, node: NodeProto, weight: NDArray[Any]) -> WeightScales:
        axis = output_axis(node, weight.ndim)
        return axis, int8_scales(np.abs(channel_rows(weight.astype(np.float32), axis)).max(axis=1))

    def quantized(
        self, model: onnx.ModelProto, calibrated: Calibrated, in_float: Collection[str]
    ) -> list[NodeProto]:
        """Return the layers and residual additions."""
        graph, ranges, chosen = Graph(model), calibrated.ranges, []
        for node in model.graph.node:
            if node.name in calibrated.in_float or node.name in in_float:
                continue
            if node.op_type in WEIGHTED_OPS:
                if node.input[1] in graph.constants and node.input[0] in ranges:
                    chosen.append(node)
            elif node.op_type == "Add" and all(name in ranges for name in node.input):
                # Two computed maps, one of them straight from a convolution.
                sources = [graph.writer.get(name) for name in node.input]
                if all(sources) and any(one and one.op_type == "Conv" for one in sources):
                    chosen.append(node)
        return chosen

    def insert_pairs(
        self, model: onnx.ModelProto, calibrated: Calibrated, in_float: Collection[str]
    ) -> onnx.ModelProto:
        """Return `model` in float16 with Q/DQ pairs around its weighted layers and residual additions.

        Other readers of a quantized activation read it from the same pair, but for the nodes `in_float` and for an
        addition of which one side alone is quantized: TensorRT would compute it in float.
        """
        half = to_half(model)
        del half.graph.value_info[:]  # they still name the old types
        graph = Graph(half)
        chosen = self.quantized(half, calibrated, in_float)
        inputs = {
            name
            for node in chosen
            for name in (node.input if node.op_type == "Add" else node.input[:1])
        }
        for name in sorted(inputs):
            largest = reach(*calibrated.ranges[name])
            _pair(graph, name, int8_scales(np.array([largest], np.float32))[0])
        for node in half.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") or node.name in in_float:
                continue
            rounded = [name in inputs for name in node.input]
            if node.op_type != "Add" or sum(rounded) != 1:
                for place, is_rounded in enumerate(rounded):
                    if is_rounded:
                        node.input[place] = f"{node.input[place]}/read"
        for node in chosen:
            if node.op_type in WEIGHTED_OPS:
                self._store_weight(graph, node)
        drop_unused(half)
        return sorted_nodes(half)

    def _store_weight(self, graph: Graph, node: NodeProto) -> None:
        """Let a layer read its weight as int8."""
        name = node.input[1]
        node.input[1] = f"{name}/read"
        if f"{name}/integers" in graph.constants:  # shared with a layer before
            return
        weight = graph.value(name).astype(np.float32)
        axis, scales = self.weight_scales(node, weight)
        integers = as_int8(weight, scales.astype(np.float32), axis)
        graph.proto.node.append(graph.dequantizer(name, integers, scales, axis))

    def groups(self, calibrated: Calibrated) -> list[Group]:
        """Return every layer and every addition, each a group of its own."""
        chosen = self.quantized(calibrated.model, calibrated, ())
        names = group_names(Graph(calibrated.model), chosen)
        return [
            Group(names[node.name], (node.name,), node.op_type in WEIGHTED_OPS) for node in chosen
        ]

    def open(self, path: Path) -> Predictor:
        return onnx_evaluator(path)


def int8_scales(largest: NDArray[np.float32]) -> NDArray[np.float16]:
    """Return `|x|max / 127` as float16, never below 2⁻²⁰: a scale of 0 is illegal, and its tensor is nearly 0."""
    return np.maximum(largest.astype(np.float64) / 127, _FLOOR).astype(np.float16)


def _pair(graph: Graph, name: str, scale: np.float16) -> None:
    stored, read = f"{name}/bytes", f"{name}/read"
    parts = [
        graph.add_constant(f"{stored}/scale", np.array(scale)),
        graph.add_constant(f"{stored}/zero", np.array(0, np.int8)),
    ]
    graph.proto.node.append(helper.make_node("QuantizeLinear", [name, *parts], [stored], stored))
    graph.proto.node.append(helper.make_node("DequantizeLinear", [stored, *parts], [read], read))
