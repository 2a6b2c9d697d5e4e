"""INT8 for TensorRT from an FP32 ONNX file: explicit Q/DQ in the one form that its strongly typed networks take.

Everything quantized is signed, symmetric and has zero point 0: weights per output channel, activations per tensor, over
the range that a calibrator chose on the calibration images. Biases stay float, and both sides of a residual addition
are quantized. What is not quantized computes in half precision: a strongly typed network runs every layer in the type
that the file says, so a float32 remainder would cost more than INT8 gains, and TensorRT-RTX has no float32 matrix
product for compute capability 7.5. The pixel normalisation, the squeeze-and-excite layers and the logits are not
quantized (`float_nodes`), nor are products of two activations, as in attention.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError
from edgekd.export.onnx_graph import WEIGHTED_OPS, Graph, sorted_nodes
from edgekd.export.quantize import onnxruntime as quantize
from edgekd.export.quantize.bias import Scales, correct_biases, to_average
from edgekd.export.quantize.calibrators import Calibrator
from edgekd.export.quantize.groups import Group, names_of
from edgekd.export.quantize.ranges import (
    Ranges,
    check_calibration,
    clipped_ranges,
    float_activations,
    observe,
    touched,
)
from edgekd.export.tensorrt_rules import weight_axis

_FLOOR = 2.0**-20  # of a scale: 16 float16 steps above 0, so that rounding moves it by 3 % at most
_HALF_MAX = 65504.0


def quantize_trt(
    fp32: Path, out: Path, calibration: NDArray[np.uint8], *, calibrator: Calibrator = "minmax"
) -> dict[str, Any]:
    """Write the INT8 file `out` of the FP32 file `fp32`, for TensorRT.

    Args:
        calibration: RGB uint8 `[N, H, W, 3]`, prepared with the model's own preprocess.
        calibrator: how much of the activations' ranges is covered (`calibrators.py`).

    Returns:
        For `artifact.json`: method, number of images, what stayed float.

    Raises:
        EdgekdError: no or all-alike calibration images, wrong shape, or activations that are not finite or that half
            precision cannot hold.
    """
    return write_trt(calibrate_trt(fp32, calibration, calibrator), out)


def calibrate_trt(
    fp32: Path, calibration: NDArray[np.uint8], calibrator: Calibrator = "minmax"
) -> quantize.Calibrated:
    """Measure the ranges of what becomes INT8; arguments and errors as `quantize_trt`."""
    model = onnx.shape_inference.infer_shapes(onnx.load(fp32))
    check_calibration(calibration, model)
    in_float = set(float_nodes(model))
    extremes, means = observe(
        model, calibration, float_activations(model), to_average(model, in_float)
    )
    refuse_overflow(extremes)
    near = touched(model, (*WEIGHTED_OPS, "Add"), in_float)
    near_extremes = {name: extremes[name] for name in near}
    ranges = clipped_ranges(model, calibration, near_extremes, calibrator, symmetric=True)
    return quantize.Calibrated(model, ranges, means, tuple(in_float), len(calibration), calibrator)


def write_trt(
    calibrated: quantize.Calibrated, out: Path, *, keep: Collection[str] = ()
) -> dict[str, Any]:
    """Write the INT8 file `out` of what has been calibrated, all but the nodes `keep`; else as `quantize_trt`."""
    model, ranges, in_float = onnx.ModelProto(), calibrated.ranges, {*calibrated.in_float, *keep}
    model.CopyFrom(calibrated.model)  # its biases change in place
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    corrected = correct_biases(model, calibrated.means, _weight_scales(model, in_float))
    quantized = insert_pairs(to_half(model), ranges, in_float)
    read_unrounded(quantized, keep)
    del quantized.metadata_props[:]
    onnx.helper.set_model_props(quantized, metadata)
    onnx.checker.check_model(quantized, full_check=True)
    onnx.save(quantized, out)
    layers = [node.name for node in model.graph.node if node.op_type in WEIGHTED_OPS]
    weights = {
        node.output[0] for node in quantized.graph.node if node.op_type == "DequantizeLinear"
    }
    chosen = {
        node.name
        for node in quantized.graph.node
        if node.op_type in WEIGHTED_OPS and node.input[1] in weights
    }
    return {
        "method": "explicit Q/DQ for TensorRT: int8, symmetric, activations per tensor, weights per channel; "
        "the rest in fp16",
        **quantize.described(calibrated.calibrator, calibrated.images),
        "corrected_biases": corrected,
        "quantized_layers": len(chosen & set(layers)),
        "float_layers": sorted(set(layers) - chosen),
    }


def float_nodes(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that are not quantized: the normalisation, layers on 1 × 1 maps, sums of tokens."""
    graph = Graph(model)
    small = [
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and graph.shape(node.input[0])[2:] == [1, 1]
    ]
    return quantize.ahead_of_layers(graph) + small + quantize.between_tokens(graph)


def refuse_overflow(ranges: Ranges) -> None:
    """Refuse activations that half precision cannot hold, by the name of the tensor."""
    for name, (low, high) in ranges.items():
        if max(abs(float(low)), abs(float(high))) > _HALF_MAX:
            raise EdgekdError(
                f"The activation {name} reaches {max(abs(float(low)), abs(float(high))):.3g}, above the "
                f"{_HALF_MAX:.0f} of half precision.",
                "Export with --fp32 for this target.",
            )


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` that computes in float16, between its uint8 input and its float32 logits."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # advice about numbers that round to 0
    try:
        half = convert_float_to_float16(copy, keep_io_types=True)
    finally:
        logging.disable(before)
    del half.graph.value_info[:]  # they still name the old types
    half = sorted_nodes(half)
    return onnx.shape_inference.infer_shapes(half)


def groups_trt(calibrated: quantize.Calibrated) -> list[Group]:
    """Every layer and every addition that INT8 for TensorRT takes, each a unit of its own, in graph order."""
    model = calibrated.model
    chosen = [node for node, _ in _rounded(model, calibrated.ranges, set(calibrated.in_float))]
    names = names_of(model, chosen)
    return [Group(names[node.name], (node.name,), node.op_type in WEIGHTED_OPS) for node in chosen]


def read_unrounded(model: onnx.ModelProto, keep: Collection[str]) -> None:
    """Let nodes in float read what their neighbours read in INT8 as it was before, in place.

    Those are the nodes named `keep`, and every addition with one side in INT8 only because of a neighbour: TensorRT
    would compute it in float, and `trt_rules` refuses it.
    """
    writer = {name: node for node in model.graph.node for name in node.output}

    def before(name: str) -> str:
        dequantize = writer.get(name)
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            return name
        source = writer.get(dequantize.input[0])
        return (
            source.input[0] if source is not None and source.op_type == "QuantizeLinear" else name
        )

    for node in model.graph.node:
        plain = [before(name) for name in node.input]
        one_sided = (
            node.op_type == "Add"
            and sum(a != b for a, b in zip(plain, node.input, strict=True)) == 1
        )
        if node.name in keep or one_sided:
            node.input[:] = plain


def insert_pairs(model: onnx.ModelProto, ranges: Ranges, in_float: set[str]) -> onnx.ModelProto:
    """`model`, of float16, with Q/DQ pairs around its weighted layers and residual additions.

    Args:
        ranges: extremes of each activation, by tensor name.
        in_float: names of nodes to leave alone.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    scales = _weight_scales(model, in_float)
    nodes, overrides = [], {}
    for node, activations in _rounded(model, ranges, in_float):
        if node.op_type in WEIGHTED_OPS:
            axis, weight_scales = scales[node.input[1]]
            overrides[node.input[1]] = [
                {"axis": axis, "scale": scale, "zero_point": np.int8(0)} for scale in weight_scales
            ]
        nodes.append(node.name)
        for name in activations:
            # Given explicitly: ONNX Runtime's own rule turns a scale below float16's normal numbers into 1.
            low, high = ranges[name]
            scale = int8_scales(np.maximum(np.abs(low), np.abs(high)).reshape(1))[0]
            overrides[name] = [{"scale": np.array(scale), "zero_point": np.array(0, np.int8)}]
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8,
        tensors_range=TensorsData(
            CalibrationMethod.MinMax,
            {
                name: TensorData(lowest=low.astype(np.float16), highest=high.astype(np.float16))
                for name, (low, high) in ranges.items()
            },
        ),
        nodes_to_quantize=nodes or [""],  # an empty list would mean every node
        nodes_to_exclude=[],
        op_types_to_quantize=[*WEIGHTED_OPS, "Add"],
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": [*WEIGHTED_OPS, "Add"],
            "TensorQuantOverrides": overrides,
        },
    )
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        quantizer.quantize_model()
    finally:
        logging.disable(before)
    quantizer.model.topological_sort()
    result: onnx.ModelProto = quantizer.model.model
    return result


def weight_grid(
    node: onnx.NodeProto, weight: NDArray[np.float32]
) -> tuple[int, NDArray[np.float16]]:
    """The axis of a layer's output channels and the scale of each."""
    axis = weight_axis(node, weight.ndim)
    rows = np.abs(np.moveaxis(weight, axis, 0)).reshape(weight.shape[axis], -1)
    return axis, int8_scales(rows.max(axis=1))


def _weight_scales(model: onnx.ModelProto, in_float: set[str]) -> Scales:
    """Output axis and scales of every constant weight that `insert_pairs` quantizes."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    return {
        node.input[1]: weight_grid(
            node, onnx.numpy_helper.to_array(constants[node.input[1]]).astype(np.float32)
        )
        for node in model.graph.node
        if node.op_type in WEIGHTED_OPS and node.name not in in_float and node.input[1] in constants
    }


def int8_scales(largest: NDArray[np.float32]) -> NDArray[np.float16]:
    """`|x|max / 127` as float16, never below 2⁻²⁰: a scale of 0 is illegal, and what it would describe is nearly 0."""
    return np.maximum(largest.astype(np.float64) / 127, _FLOOR).astype(np.float16)


def _rounded(
    model: onnx.ModelProto, ranges: Ranges, in_float: Collection[str]
) -> Iterator[tuple[onnx.NodeProto, list[str]]]:
    """The layers and additions that become INT8, each with the activations that it reads rounded."""
    constants = {tensor.name for tensor in model.graph.initializer}
    writer = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.name in in_float:
            continue
        if node.op_type in WEIGHTED_OPS and node.input[1] in constants and node.input[0] in ranges:
            yield node, [node.input[0]]
        elif (
            node.op_type == "Add"
            and _is_residual(node, writer)
            and all(name in ranges for name in node.input)
        ):
            yield node, list(node.input)


def _is_residual(node: onnx.NodeProto, writer: dict[str, onnx.NodeProto]) -> bool:
    """An addition of two computed maps, one of them straight from a convolution."""
    sources = [writer.get(name) for name in node.input]
    return all(sources) and any(
        source is not None and source.op_type == "Conv" for source in sources
    )
