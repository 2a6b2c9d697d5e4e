"""Base of the INT8 schemes for ONNX files: calibration, bias correction, errors and names of layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto

from edgekd.export.onnx.graphs import WEIGHTED_OPS, Graph, copied
from edgekd.export.quantize.calibration import (
    PERCENTILE,
    Calibrator,
    Means,
    Ranges,
    check_calibration,
    histograms,
    lost_by_rounding,
    narrowed,
    observe,
    touched,
)
from edgekd.export.quantize.search import Scheme

WeightScales = tuple[int, NDArray[Any]]
"""The axis of a weight's output channels, and the scale of each."""
_BIASED_OPS = {"Conv": (0, 2, 3), "Gemm": (0,)}  # the axes of the input that a mean runs over


@dataclass(frozen=True)
class Calibrated:
    """A calibrated FP32 model."""

    model: onnx.ModelProto
    ranges: Ranges
    means: Means
    """Means of the inputs of layers with a bias."""
    in_float: tuple[str, ...]
    """Nodes that always stay in float."""
    images: int
    calibrator: Calibrator


class OnnxScheme(Scheme[Calibrated]):
    """INT8 as Q/DQ pairs in an ONNX file."""

    method: ClassVar[str]
    ops: ClassVar[tuple[str, ...]]
    """Types of the nodes whose inputs and outputs are quantized."""
    symmetric: ClassVar[bool]
    """Whether activations are quantized symmetrically."""

    @abstractmethod
    def prepare(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return the FP32 model rewritten for quantization, with inferred shapes."""

    @abstractmethod
    def float_nodes(self, graph: Graph) -> list[str]:
        """Return the names of the nodes that always stay in float."""

    @abstractmethod
    def weight_scales(self, node: NodeProto, weight: NDArray[Any]) -> WeightScales | None:
        """Return the scales of a layer's weight; None if it stays in float."""

    @abstractmethod
    def quantized(
        self, model: onnx.ModelProto, calibrated: Calibrated, in_float: Collection[str]
    ) -> list[NodeProto]:
        """Return the nodes of `model` to quantize if the nodes `in_float` stay in float, in graph order."""

    @abstractmethod
    def insert_pairs(
        self, model: onnx.ModelProto, calibrated: Calibrated, in_float: Collection[str]
    ) -> onnx.ModelProto:
        """Return `model`, possibly changed in place, with Q/DQ pairs."""

    def observed(self, graph: Graph, near: list[str]) -> list[str]:
        """Return the activations to measure, including the quantized ones, `near`."""
        return near

    def check_extremes(self, extremes: Ranges) -> None:
        """Raise an `EdgekdError` for activations outside the range of the file's types."""

    def calibrate(
        self, fp32: Path, images: NDArray[np.uint8], calibrator: Calibrator = "minmax"
    ) -> Calibrated:
        model = self.prepare(onnx.load(fp32))
        check_calibration(images)
        graph = Graph(model)
        in_float = self.float_nodes(graph)
        near = touched(graph, self.ops, in_float)
        averaged = averaged_inputs(graph, in_float)
        extremes, means = observe(model, images, self.observed(graph, near), averaged)
        self.check_extremes(extremes)
        ranges = {name: extremes[name] for name in near}
        if calibrator != "minmax":
            counts = histograms(model, images, ranges)
            ranges = narrowed(counts, ranges, calibrator, symmetric=self.symmetric)
        return Calibrated(model, ranges, means, tuple(in_float), len(images), calibrator)

    def write(
        self, calibrated: Calibrated, out: Path, *, in_float: Collection[str] = ()
    ) -> dict[str, Any]:
        model = copied(calibrated.model)
        graph = Graph(model)
        chosen = self.quantized(model, calibrated, in_float)
        layers = {node.name for node in chosen if node.op_type in WEIGHTED_OPS}
        scales = {
            node.input[1]: found
            for node in graph.layers()
            if node.name in layers
            and (found := self.weight_scales(node, graph.value(node.input[1]))) is not None
        }
        corrected = correct_biases(graph, calibrated.means, scales)
        weighted = {node.name for node in model.graph.node if node.op_type in WEIGHTED_OPS}
        quantized = self.insert_pairs(model, calibrated, in_float)
        onnx.checker.check_model(quantized)
        onnx.save(quantized, out)
        percent = {"percentile": PERCENTILE} if calibrated.calibrator == "percentile" else {}
        return {
            "method": self.method,
            "tool": f"onnxruntime {onnxruntime.__version__}",
            "calibrator": calibrated.calibrator,
            **percent,
            "calibration_images": calibrated.images,
            "corrected_biases": corrected,
            "quantized_layers": len(layers),
            "float_layers": sorted(weighted - layers),
        }


def averaged_inputs(graph: Graph, in_float: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return the inputs of the layers with a bias that are not named `in_float`, and the axes of their means."""
    return {
        node.input[0]: _BIASED_OPS[node.op_type]
        for node in graph.proto.node
        if _bias(node) and node.name not in in_float and node.input[0] in graph.writer
    }


def correct_biases(graph: Graph, means: Means, scales: Mapping[str, WeightScales]) -> int:
    """Correct each bias for the average shift of rounding the weights, in place; return the number of biases.

    A depthwise kernel has only nine weights per channel, so their rounding errors do not average out: every output of
    the channel shifts by the sum of the errors times the mean input. The mean is measured on the calibration images; M.
    Nagel et al. (Data-Free Quantization through Weight Equalization and Bias Correction, 2019) infer it from BatchNorm.
    A bias shared by several layers is not changed.
    """
    corrected = 0
    for node in graph.proto.node:
        bias = _bias(node)
        if bias not in graph.constants or len(graph.readers[bias]) > 1:
            continue
        if node.input[0] not in means or node.input[1] not in scales:
            continue
        axis, scale = scales[node.input[1]]
        weight = np.moveaxis(graph.value(node.input[1]), axis, 0)
        shift = lost_by_rounding(weight, scale, means[node.input[0]])
        value = graph.value(bias)
        graph.set_value(bias, (value + shift).astype(value.dtype))
        corrected += 1
    return corrected


def _bias(node: NodeProto) -> str:
    """Return the name of a layer's bias, empty without one."""
    return node.input[2] if node.op_type in _BIASED_OPS and len(node.input) > 2 else ""


def ahead_of_layers(graph: Graph) -> list[str]:
    """Return the names of the nodes before the first weighted layer: the normalisation of the pixels."""
    names = []
    for node in graph.proto.node:
        if node.op_type in WEIGHTED_OPS:
            break
        names.append(node.name)
    return names


def between_tokens(graph: Graph) -> list[str]:
    """Return the names of the additions and concatenations of anything but maps `[B, C, H, W]`."""
    return [
        node.name
        for node in graph.proto.node
        if node.op_type in ("Add", "Concat")
        and any(len(graph.shape(name)) != 4 for name in node.input)
    ]


def group_names(graph: Graph, leads: Collection[NodeProto]) -> dict[str, str]:
    """Return leading node → readable name."""
    bias = {  # of a product of tokens, which is added apart
        name: constant
        for node in graph.proto.node
        if node.op_type == "Add"
        for name, constant in (node.input[:2], node.input[1::-1])
        if constant in graph.constants
    }
    names: dict[str, str] = {}
    modules: dict[str, str] = {}  # tensor → the module that computes it
    for node in leads:
        names[node.name] = node.name
        if node.op_type in WEIGHTED_OPS and node.input[1] in graph.constants:
            module, _, kind = node.input[1].rpartition(".")
            if kind != "weight":
                module, _, kind = bias.get(node.output[0], "").rpartition(".")
            if kind in ("weight", "bias"):
                modules[node.output[0]] = names[node.name] = module.removeprefix("backbone.")
        elif sources := [modules[name] for name in node.input if name in modules]:
            names[node.name] = f"{node.op_type} after {sources[-1]}"
    return names
