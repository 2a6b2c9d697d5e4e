"""Bias correction: rounding a layer's weights shifts its outputs by a constant, which its bias takes back.

A depthwise kernel has nine weights per channel, so their rounding errors do not average out: every output of the
channel moves by the error's sum times the mean input. That mean is taken on the calibration images (M. Nagel et al.,
Data-Free Quantization through Weight Equalization and Bias Correction, 2019, who infer it).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
from numpy.typing import NDArray

Means = dict[str, NDArray[np.float64]]
"""Tensor name → mean of each channel over images and places, float64 `[C]`."""
Scales = Mapping[str, tuple[int, NDArray[np.floating[Any]]]]
"""Weight's name → its output axis, and the scale of each output channel's int8 weights."""

_BIASED_OPS = {"Conv": (0, 2, 3), "Gemm": (0,)}  # the axes of the input that a mean runs over


def to_average(model: onnx.ModelProto, in_float: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Inputs of the layers with a bias, other than those named `in_float`, and the axes their means run over."""
    computed = {name for node in model.graph.node for name in node.output}
    return {
        node.input[0]: _BIASED_OPS[node.op_type]
        for node in model.graph.node
        if _bias(node) and node.name not in in_float and node.input[0] in computed
    }


def correct_biases(model: onnx.ModelProto, means: Means, scales: Scales) -> int:
    """Add to each bias what rounding the weights takes away on average, in place.

    Args:
        scales: of the weights that will be rounded; other layers stay as they are.

    Returns:
        How many biases were corrected. One that several layers share stays, and so does a layer without bias.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    uses = [name for node in model.graph.node for name in node.input]
    corrected = 0
    for node in model.graph.node:
        bias = _bias(node)
        if (
            bias not in constants
            or uses.count(bias) > 1
            or node.input[0] not in means
            or node.input[1] not in scales
        ):
            continue
        axis, scale = scales[node.input[1]]
        weight = np.moveaxis(
            onnx.numpy_helper.to_array(constants[node.input[1]]).astype(np.float64), axis, 0
        )
        steps = scale.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
        lost = weight - steps * np.clip(np.round(weight / steps), -128, 127)
        lost = lost.reshape(*weight.shape[:2], -1).sum(axis=2)  # [outputs, inputs of a group]
        groups = next((item.i for item in node.attribute if item.name == "group"), 1)
        inputs = means[node.input[0]].reshape(groups, -1, 1)
        shift = (lost.reshape(groups, -1, lost.shape[1]) @ inputs).reshape(-1)  # [outputs]
        value = onnx.numpy_helper.to_array(constants[bias])
        constants[bias].CopyFrom(
            onnx.numpy_helper.from_array((value + shift).astype(value.dtype), bias)
        )
        corrected += 1
    return corrected


def _bias(node: onnx.NodeProto) -> str:
    """Name of a layer's bias, empty without one."""
    return node.input[2] if node.op_type in _BIASED_OPS and len(node.input) > 2 else ""
