"""Calibration: the ranges of a model's activations on calibration images.

There are at most two passes: one for the extremes, computed inside the graph, and one for a histogram per tensor, for
calibrators that clip outliers. Memory does not grow with the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
from numpy.typing import NDArray
from onnx import helper
from onnxruntime.quantization.calibrate import HistogramCollector

from edgekd.core.errors import EdgekdError
from edgekd.core.files import scratch_folder
from edgekd.core.machine import usable_cores
from edgekd.export.onnx.graphs import Graph, copied

Calibrator = Literal["minmax", "percentile", "entropy", "mse"]
Ranges = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Tensor name → smallest and largest value, float32 scalars."""
Means = dict[str, NDArray[np.float64]]
"""Tensor name → mean of each channel over images and places, float64 `[C]`."""

BINS = 4096
"""Bins of a histogram on each side of 0."""
PERCENTILE = 99.99
"""Share of the values in the range of `percentile`, in percent."""
_ENTROPY_BINS = 1024  # on both sides together; the cost of the search is quadratic in it
_ENTROPY_LEVELS = 128
_SHRINK, _TRIALS = 0.93, 80  # of a range, down to 0.3 % of it
_BATCH = 8
_WHOLE = 2
"""Batch size when all activations are outputs of the graph, which take more than 100 MB at 224 px."""


def check_calibration(calibration: NDArray[np.uint8]) -> None:
    """Raise an `EdgekdError` if there are no calibration images, or if all are equal."""
    if len(calibration) == 0:
        raise EdgekdError(
            "There are no calibration images.", "Give some of the training images, 200 or more."
        )
    alike = (calibration == calibration[0]).all()
    if alike and (len(calibration) > 1 or np.ptp(calibration[0]) == 0):
        raise EdgekdError(
            "All calibration images are alike, so the ranges of activations would be wrong.",
            "Give real and varied images, 200 or more.",
        )


def touched(graph: Graph, ops: Collection[str], in_float: Collection[str]) -> list[str]:
    """Return the float activations that enter or leave a node of the types `ops` that is not named `in_float`."""
    near = {
        name
        for node in graph.proto.node
        if node.op_type in ops and node.name not in in_float
        for name in (*node.input, *node.output)
    }
    return [name for name in float_activations(graph) if name in near]


def float_activations(graph: Graph) -> list[str]:
    """Return the outputs of nodes whose type is known to be float32, in graph order."""
    return [name for node in graph.proto.node for name in node.output if graph.is_float(name)]


def observe(
    model: onnx.ModelProto,
    calibration: NDArray[np.uint8],
    tensors: Sequence[str],
    averaged: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> tuple[Ranges, Means]:
    """Return the smallest and the largest value of each tensor over the images, and means.

    Means are computed for the tensors in `averaged`, over the axes given there. NaN and infinity are an `EdgekdError`.
    """
    probe = copied(model)
    graph = probe.graph
    wanted = []

    def reduce(op: str, inputs: list[str], shape: list[int] | None) -> None:
        # Last in the graph, after all the tensors exist.
        wanted.append(f"{inputs[0]}/{op}")
        graph.node.append(helper.make_node(op, inputs, wanted[-1:], keepdims=0))
        graph.output.append(
            helper.make_tensor_value_info(wanted[-1], onnx.TensorProto.FLOAT, shape)
        )

    for op in ("ReduceMin", "ReduceMax"):
        for name in tensors:
            reduce(op, [name], [])
    for name, axes in averaged.items():
        over = onnx.numpy_helper.from_array(np.array(axes, np.int64), f"{name}/axes")
        graph.initializer.append(over)
        reduce("ReduceMean", [name, over.name], None)
    count = len(tensors)
    lows, highs = np.full(count, np.inf, np.float32), np.full(count, -np.inf, np.float32)
    means: Means = {}
    for number, values in enumerate(_run(probe, wanted, calibration, _BATCH)):
        extremes = np.array(values[: 2 * count], dtype=np.float32)
        share = min(_BATCH, len(calibration) - number * _BATCH) / len(calibration)
        for name, mean_of_batch in zip(averaged, values[2 * count :], strict=True):
            means[name] = means.get(name, 0) + share * mean_of_batch.astype(np.float64)
        lows = np.minimum(lows, extremes[:count])  # np.minimum keeps NaN, for the check below
        highs = np.maximum(highs, extremes[count:])
    ranges = {name: (lows[index], highs[index]) for index, name in enumerate(tensors)}
    refuse_infinite(ranges)
    return ranges, means


def refuse_infinite(ranges: Ranges) -> None:
    """Raise an `EdgekdError` unless both ends of every range are finite."""
    if not all(np.isfinite(ends).all() for ends in ranges.values()):
        raise EdgekdError(
            "The model computes values that are not finite on the calibration images.",
            "Check the training run: its weights have probably diverged.",
        )


def lost_by_rounding(
    weight: NDArray[Any], scales: NDArray[Any], means: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the average shift of each output of a layer by rounding its weights, float64 `[O]`.

    Args:
        weight: `[O, I, …]`; for a grouped layer, I are the inputs of one group.
        scales: `[O]`, the scale of the weights of each output.
        means: `[I · groups]`, the mean of each input.
    """
    outputs, groups = len(weight), len(means) // weight.shape[1]
    rows = weight.astype(np.float64).reshape(outputs, weight.shape[1], -1)
    steps = scales.astype(np.float64).reshape(-1, 1, 1)
    lost = (rows - steps * np.clip(np.round(rows / steps), -128, 127)).sum(axis=2)  # [O, I]
    shift = lost.reshape(groups, -1, lost.shape[1]) @ means.reshape(groups, -1, 1)
    lost_by_output: NDArray[np.float64] = shift.reshape(outputs)
    return lost_by_output


def narrowed(
    counts: Mapping[str, NDArray[np.int64]], extremes: Ranges, calibrator: str, *, symmetric: bool
) -> Ranges:
    """Return `extremes` narrowed by a calibrator other than `minmax`, with the histograms of `counted`."""
    ranges: Ranges = {}
    for name, seen in counts.items():
        low, high = extremes[name]
        if seen.any():
            found = METHODS[calibrator](seen, reach(low, high), symmetric)
            # The histogram is symmetric about 0 and the tensor seldom is, so clip to the extremes.
            low = np.asarray(max(float(low), found[0]), np.float32)
            high = np.asarray(min(float(high), found[1]), np.float32)
        ranges[name] = (low, high)
    return ranges


def histograms(
    model: onnx.ModelProto, calibration: NDArray[np.uint8], extremes: Ranges
) -> dict[str, NDArray[np.int64]]:
    """Return the histograms of `counted` for the tensors of an ONNX file."""
    whole = copied(model)
    present = {output.name for output in whole.graph.output}
    for name in extremes:
        if name not in present:
            whole.graph.output.append(helper.make_empty_tensor_value_info(name))
    values = _run(whole, list(extremes), calibration, _WHOLE)
    return counted((dict(zip(extremes, some, strict=True)) for some in values), extremes)


def counted(
    values: Iterable[Mapping[str, NDArray[np.float32]]], extremes: Ranges
) -> dict[str, NDArray[np.int64]]:
    """Return tensor name → int64 `[2 · BINS]`: its values over the images, in equal bins over −reach to reach.

    Args:
        values: of all tensors by name, batch by batch.
    """
    counts = {name: np.zeros(2 * BINS, dtype=np.int64) for name in extremes}
    for some in values:
        for name, value in some.items():
            if (limit := reach(*extremes[name])) > 0:
                scaled = np.floor(value.reshape(-1) * np.float32(BINS / limit))
                # The largest value may differ in the last digit from the first pass, and would then be outside.
                places = np.clip(scaled.astype(np.intp) + BINS, 0, 2 * BINS - 1)
                counts[name] += np.bincount(places, minlength=2 * BINS)
    return counts


def reach(low: NDArray[np.float32], high: NDArray[np.float32]) -> float:
    """Return the larger absolute value of two extremes."""
    return max(abs(float(low)), abs(float(high)))


def percentile(counts: NDArray[np.int64], reach: float, symmetric: bool) -> tuple[float, float]:
    """Return the range of `PERCENTILE` of the values, clipped equally at both ends, or of the absolute values.

    Args:
        counts: int64 `[2 · BINS]` over −reach to reach.

    Returns:
        Minimum and maximum of the range, interpolated within a bin.
    """
    cut = 1 - PERCENTILE / 100
    if symmetric:
        high = _quantile(counts[BINS:] + counts[BINS - 1 :: -1], 1 - cut) * reach
        return -high, high
    low, high = (2 * _quantile(counts, share) - 1 for share in (cut / 2, 1 - cut / 2))
    return low * reach, high * reach


def entropy(counts: NDArray[np.int64], reach: float, symmetric: bool) -> tuple[float, float]:
    """Return the symmetric range with the smallest loss of information, as in ONNX Runtime and TensorRT.

    It minimises the Kullback-Leibler divergence between the clipped histogram and its quantized version (S. Migacz,
    8-bit inference with TensorRT, GTC 2017). Arguments and result as for `percentile`.
    """
    coarse = counts.reshape(_ENTROPY_BINS, -1).sum(axis=1)
    edges = np.linspace(-reach, reach, _ENTROPY_BINS + 1)
    search = HistogramCollector("entropy", symmetric, _ENTROPY_BINS, _ENTROPY_LEVELS, None, None)
    low, high = search.get_entropy_threshold((coarse, edges, edges[0], edges[-1]), _ENTROPY_LEVELS)
    return float(low), float(high)


def mse(counts: NDArray[np.int64], reach: float, symmetric: bool) -> tuple[float, float]:
    """Return the range with the smallest mean squared error of rounding and clipping.

    Asymmetric ranges are searched one end at a time, twice. Arguments and result as for `percentile`.
    """
    taken = np.flatnonzero(counts)
    values, weights = ((taken + 0.5) / BINS - 1) * reach, counts[taken].astype(np.float64)

    def error(low: float, high: float) -> float:
        return rounding_error(values, weights, low, high, symmetric=symmetric)

    shares = _SHRINK ** np.arange(_TRIALS)
    if symmetric:
        best = float(min(reach * shares, key=lambda end: error(-end, end)))
        return -best, best
    low, high = min(float(values[0]), 0.0), max(float(values[-1]), 0.0)
    lows, highs = low * shares, high * shares
    for _ in range(2):
        high = min(highs, key=lambda end: error(low, end))
        low = min(lows, key=lambda end: error(end, high))
    return float(low), float(high)


def rounding_error(
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
    low: float,
    high: float,
    *,
    symmetric: bool,
) -> float:
    """Return the sum of `weights · (value − dequantized value)²` for symmetric int8 or for uint8 with a zero point."""
    step = (high / 127 if symmetric else (high - low) / 255) or 1.0
    least = -128 if symmetric else -round(-low / step)
    covered = np.clip(np.round(values / step), least, least + 255) * step
    return float(weights @ np.square(values - covered))


METHODS: dict[str, Callable[[NDArray[np.int64], float, bool], tuple[float, float]]] = {
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}
"""All calibrators except `minmax`, which needs no histogram."""


def _quantile(counts: NDArray[np.int64], share: float) -> float:
    """Return the `share` quantile of the counts as a position in 0–1 of the histogram's width."""
    below = np.concatenate([[0], np.cumsum(counts)])
    place = np.searchsorted(below, share * below[-1], side="left")
    bin_ = max(int(place) - 1, 0)
    inside = (share * below[-1] - below[bin_]) / max(int(counts[bin_]), 1)
    return float((bin_ + min(max(inside, 0.0), 1.0)) / len(counts))


def _run(
    model: onnx.ModelProto, wanted: list[str], calibration: NDArray[np.uint8], batch: int
) -> Iterator[list[NDArray[np.float32]]]:
    """Yield the tensors `wanted` of `model`, batch by batch."""
    options = onnxruntime.SessionOptions()
    # Use all cores without spinning, since spinning threads are slow on a busy machine.
    options.intra_op_num_threads = usable_cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    with scratch_folder() as folder:
        path = folder / "probe.onnx"
        onnx.save(model, path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for start in range(0, len(calibration), batch):
            images = np.ascontiguousarray(calibration[start : start + batch])
            yield session.run(wanted, {model.graph.input[0].name: images})
