"""INT8 and FP16 from an FP32 ONNX file.

INT8 is static Q/DQ for ONNX Runtime on CPU: activations uint8 per tensor over the range that a calibrator chose on the
calibration images, weights int8 per output channel, and biases corrected for the rounding of the weights (`bias.py`).
What stays in float costs accuracy when quantised and wins no time: the pixel normalisation, the first convolution, the
additions between tokens, and the logits.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
from numpy.typing import NDArray

from edgekd.export.onnx_graph import WEIGHTED_OPS, Graph, sorted_nodes
from edgekd.export.quantize import qdq
from edgekd.export.quantize.bias import Means, Scales, correct_biases, to_average
from edgekd.export.quantize.calibrators import PERCENTILE, Calibrator
from edgekd.export.quantize.integer_form import integer_form
from edgekd.export.quantize.ranges import (
    Ranges,
    check_calibration,
    clipped_ranges,
    observe,
    touched,
)

_STEM_CHANNELS, _STEM_WEIGHTS = 4, 8192
"""At most, of a first convolution that stays in float."""


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
    model = integer_form(onnx.load(fp32))
    check_calibration(calibration, model)
    in_float = float_nodes(model)
    extremes, means = observe(
        model, calibration, touched(model, qdq.INTEGER_OPS, in_float), to_average(model, in_float)
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
    model = onnx.ModelProto()
    model.CopyFrom(calibrated.model)  # changed in place
    in_float = {*calibrated.in_float, *keep}
    chosen = qdq.plan(model, in_float)
    corrected = correct_biases(model, calibrated.means, _scales_of(model, chosen.layers))
    qdq.quantize(model, calibrated.ranges, chosen, weight_grid)
    onnx.checker.check_model(model)
    onnx.save(model, out)
    return {
        "method": "ONNX Runtime static Q/DQ: activations uint8 per tensor, weights int8 per channel",
        **described(calibrated.calibrator, calibrated.images),
        "corrected_biases": corrected,
        "quantized_layers": len(chosen.layers),
        "float_layers": sorted(
            {n.name for n in model.graph.node if n.op_type in WEIGHTED_OPS} - {*chosen.layers}
        ),
    }


def to_fp16(fp32: Path, out: Path) -> None:
    """Write `fp32` with half-precision weights and arithmetic; the uint8 input and the float32 logits stay.

    Half the size. ONNX Runtime's CPU kernels convert to float32 and back, 3 to 4 times slower than FP32: the file is
    meant for engines that compute in half precision.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quiet_logging():
        model = sorted_nodes(convert_float_to_float16(onnx.load(fp32), keep_io_types=True))
    onnx.checker.check_model(model)
    onnx.save(model, out)


def float_nodes(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that stay in float.

    All before the first weighted layer; that layer where it is a small convolution of the image, which is two to three
    times faster in float than the int8 kernel with 3 channels; and additions and concatenations of anything but maps
    `[B, C, H, W]`: the bias behind a transformer's product, its stream of tokens. Rounding around those would keep
    ONNX Runtime from adding in float what its int8 product gives in float.
    """
    graph, nodes = Graph(model), list(model.graph.node)
    ahead = ahead_of_layers(graph)
    stem = nodes[len(ahead)] if len(ahead) < len(nodes) else None
    if stem is not None and stem.op_type == "Conv":
        shape = graph.shape(stem.input[1])
        if shape[1] <= _STEM_CHANNELS and np.prod(shape) <= _STEM_WEIGHTS:
            ahead.append(stem.name)
    return ahead + between_tokens(graph)


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


def weight_errors(model: onnx.ModelProto, grid: qdq.WeightGrid) -> dict[str, float]:
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


def _scales_of(model: onnx.ModelProto, layers: Collection[str]) -> Scales:
    """Return output axis and scales of every constant weight of `layers` by `weight_grid`."""
    graph, scales = Graph(model), {}
    for node in model.graph.node:
        if node.name in layers and node.input[1] in graph.constants:
            found = weight_grid(node, graph.value(node.input[1]))
            if found is not None:
                scales[node.input[1]] = found
    return scales


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    """The converters log advice at warning level; errors still come as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
