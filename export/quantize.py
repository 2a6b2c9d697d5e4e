"""INT8 and FP16 from an FP32 ONNX file.

INT8 is static Q/DQ for ONNX Runtime on CPU: activations uint8 per tensor over the range that a calibrator chose on the
calibration images, weights int8 per output channel, and biases corrected for the rounding of the weights (`bias.py`).
What stays in float costs accuracy when quantised and wins no time: the pixel normalisation, the squeeze-and-excite
layers (1 × 1 maps), the additions between tokens, and the logits.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
from numpy.typing import NDArray

from edgekd.export.bias import Means, correct_biases, to_average
from edgekd.export.calibrators import PERCENTILE, Calibrator
from edgekd.export.ranges import Ranges, check_calibration, clipped_ranges, observe, touched

Grid = Callable[[onnx.NodeProto, NDArray[np.float32]], tuple[int, NDArray[Any]] | None]
"""Node and its float weight → the axis of its output channels and one scale for each; None where it stays float."""
# Element-wise multiplications and activations without an int8 kernel are absent on purpose: around them ONNX Runtime
# would convert to float and back, with an extra rounding step and no gain.
QUANTIZED_OPS = (
    "Conv",
    "Gemm",
    "MatMul",
    "Add",
    "Concat",
    "Relu",
    "Clip",
    "MaxPool",
    "AveragePool",
)
WEIGHTED_OPS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Calibrated:
    """An FP32 model and all that is known about it before anything is quantized."""

    model: onnx.ModelProto
    ranges: Ranges
    means: Means
    """Of the inputs of layers with a bias."""
    in_float: tuple[str, ...]
    """Nodes that stay in float whatever else is chosen."""
    images: int
    calibrator: Calibrator

    @property
    def layers(self) -> list[str]:
        """Names of the weighted layers that INT8 takes, in graph order."""
        skip = set(self.in_float)
        return [
            n.name
            for n in self.model.graph.node
            if n.op_type in WEIGHTED_OPS and n.name not in skip
        ]


def quantize_int8(
    fp32: Path, out: Path, calibration: NDArray[np.uint8], *, calibrator: Calibrator = "minmax"
) -> dict[str, Any]:
    """Write the INT8 file `out` of the FP32 file `fp32`.

    Args:
        calibration: RGB uint8 `[N, H, W, 3]`, prepared with the model's own preprocess.
        calibrator: how much of the activations' ranges is covered (`calibrators.py`).

    Returns:
        For `artifact.json`: method, number of images, what stayed float.

    Raises:
        EdgekdError: no or all-alike calibration images, wrong shape, or activations that are not finite.
    """
    return write_int8(calibrate(fp32, calibration, calibrator), out)


def calibrate(
    fp32: Path, calibration: NDArray[np.uint8], calibrator: Calibrator = "minmax"
) -> Calibrated:
    """Measure the activations' ranges; arguments and errors as `quantize_int8`."""
    model = onnx.shape_inference.infer_shapes(onnx.load(fp32))
    check_calibration(calibration, model)
    in_float = float_nodes(model)
    extremes, means = observe(
        model, calibration, touched(model, QUANTIZED_OPS, in_float), to_average(model, in_float)
    )
    ranges = clipped_ranges(model, calibration, extremes, calibrator, symmetric=False)
    return Calibrated(model, ranges, means, tuple(in_float), len(calibration), calibrator)


def described(calibrator: Calibrator, images: int) -> dict[str, Any]:
    """How ranges were chosen, for `artifact.json`."""
    percent = {"percentile": PERCENTILE} if calibrator == "percentile" else {}
    return {
        "tool": f"onnxruntime {onnxruntime.__version__}",
        "calibrator": calibrator,
        **percent,
        "calibration_images": images,
    }


def write_int8(calibrated: Calibrated, out: Path, *, keep: Collection[str] = ()) -> dict[str, Any]:
    """Write the INT8 file `out`.

    Args:
        keep: further nodes that stay in float.

    Returns:
        As `quantize_int8`.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    model = onnx.ModelProto()
    model.CopyFrom(calibrated.model)  # the quantizer works in place
    layers = [node.name for node in model.graph.node if node.op_type in WEIGHTED_OPS]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    in_float = {*calibrated.in_float, *keep}
    overrides = _weight_overrides(model, skip=in_float)
    scales = {
        name: (entries[0]["axis"], np.array([entry["scale"] for entry in entries]))
        for name, entries in overrides.items()
    }
    corrected = correct_biases(model, calibrated.means, scales)
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,  # weight_scales does better
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(
            CalibrationMethod.MinMax,
            {
                name: TensorData(lowest=low, highest=high)
                for name, (low, high) in calibrated.ranges.items()
            },
        ),
        nodes_to_quantize=[],  # every node
        nodes_to_exclude=sorted(in_float),
        op_types_to_quantize=list(QUANTIZED_OPS),
        extra_options={
            "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
            "TensorQuantOverrides": overrides,
        },
    )
    with _quiet_logging():
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    quantized = quantizer.model.model
    del quantized.metadata_props[:]
    onnx.helper.set_model_props(quantized, metadata)
    onnx.checker.check_model(quantized)
    onnx.save(quantized, out)
    return {
        "method": "ONNX Runtime static Q/DQ: activations uint8 per tensor, weights int8 per channel",
        **described(calibrated.calibrator, calibrated.images),
        "corrected_biases": corrected,
        "quantized_layers": len(set(layers) - in_float),
        "float_layers": sorted(set(layers) & in_float),
    }


def to_fp16(fp32: Path, out: Path) -> None:
    """Write `fp32` with half-precision weights and arithmetic; the uint8 input and the float32 logits stay.

    Half the size. ONNX Runtime's CPU kernels convert to float32 and back, 3 to 4 times slower than FP32: the file is
    meant for engines that compute in half precision.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quiet_logging():
        model = convert_float_to_float16(onnx.load(fp32), keep_io_types=True)
    onnx.checker.check_model(model)
    onnx.save(model, out)


def float_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that stay in float.

    All before the first weighted layer; layers on 1 × 1 maps; and additions and concatenations of anything but maps
    `[B, C, H, W]`: the bias behind a transformer's product, its stream of tokens. Rounding around those would keep
    ONNX Runtime from adding in float what its int8 product gives in float.
    """
    shapes = {
        info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in model.graph.value_info
    }
    nodes = list(model.graph.node)
    first = next((index for index, node in enumerate(nodes) if node.op_type in WEIGHTED_OPS), 0)
    small = [
        node.name
        for node in nodes
        if node.op_type == "Conv" and shapes.get(node.input[0], [])[2:] == [1, 1]
    ]
    tokens = [
        node.name
        for node in nodes[first:]
        if node.op_type in ("Add", "Concat")
        and any(len(shapes.get(name, [])) != 4 for name in node.input)
    ]
    return [node.name for node in nodes[:first]] + small + tokens


def weight_scales(
    rows: NDArray[np.float32], *, pairs: Literal["none", "neighbours", "any"]
) -> NDArray[np.float32]:
    """Scale of each output channel's int8 weights, so that no pair of products overflows 16 bits.

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
        meeting = np.abs(
            np.stack([ordered[:, :2].sum(axis=1), ordered[:, -2:].sum(axis=1)], axis=1)
        )
    else:
        even = rows if rows.shape[1] % 2 == 0 else np.pad(rows, ((0, 0), (0, 1)))
        meeting = np.abs(even[:, 0::2] + even[:, 1::2])
    if pairs != "none":
        scale = np.maximum(
            scale, meeting.max(axis=1) / 127
        )  # rounding may add 1, and 255 · 128 = 32640 still fits
    return np.where(scale > 0, scale, 1).astype(np.float32)


def weight_errors(model: onnx.ModelProto, grid: Grid) -> dict[str, float]:
    """Weighted layer → squared error that int8 on `grid` makes in its weights, relative to their squares."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    errors = {}
    for node in model.graph.node:
        if node.op_type not in WEIGHTED_OPS or node.input[1] not in constants:
            continue
        weight = onnx.numpy_helper.to_array(constants[node.input[1]])
        if (chosen := grid(node, weight)) is not None:
            axis, scale = chosen[0], chosen[1].astype(np.float64)
            rows = np.moveaxis(weight, axis, 0)
            rows = rows.reshape(len(rows), -1)  # [channels, K]
            lost = rows - np.round(rows / scale[:, None]) * scale[:, None]
            errors[node.name] = float(
                np.square(lost).sum() / max(np.square(rows).sum(), np.finfo(np.float32).tiny)
            )
    return errors


def weight_grid(
    node: onnx.NodeProto, weight: NDArray[np.float32]
) -> tuple[int, NDArray[np.float32]] | None:
    """The axis of a layer's output channels and the scale of each; None for a weight that stays in float."""
    pairs: Literal["none", "neighbours", "any"] = "neighbours"
    if node.op_type == "Conv":
        axis, taps = 0, int(np.prod(weight.shape[2:]))
        if taps > 1:
            pairs = "none" if weight.shape[1] == 1 else "any"
    elif weight.ndim != 2:
        return None
    else:
        axis = 0 if any(item.name == "transB" and item.i for item in node.attribute) else 1
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    return axis, weight_scales(rows, pairs=pairs)


def _weight_overrides(model: onnx.ModelProto, *, skip: set[str]) -> dict[str, list[dict[str, Any]]]:
    """ONNX Runtime's `TensorQuantOverrides` that carry `weight_grid` for every constant weight."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    overrides = {}
    for node in model.graph.node:
        if node.op_type not in WEIGHTED_OPS or node.name in skip or node.input[1] not in constants:
            continue
        grid = weight_grid(node, onnx.numpy_helper.to_array(constants[node.input[1]]))
        if grid is not None:
            axis, scales = grid
            overrides[node.input[1]] = [
                {"axis": axis, "scale": scale, "zero_point": np.int8(0)} for scale in scales
            ]
    return overrides


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    """The converters log advice at warning level; errors still come as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
