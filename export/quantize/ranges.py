"""The ranges of a model's activations on calibration images: what INT8 spreads its 256 steps over.

Two passes at most: the extremes, taken inside the graph, and for the calibrators that clip (`calibrators.py`) one
histogram per tensor. Memory does not grow with the number of images.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError
from edgekd.core.files import scratch_folder
from edgekd.export.quantize.bias import Means
from edgekd.export.quantize.calibrators import BINS, METHODS

Ranges = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Tensor name → smallest and largest value, float32 scalars."""

_BATCH = 8
_WHOLE = 2
"""Images at a time where every activation leaves the graph: 100 MB of them and more at 224 px."""


def check_calibration(calibration: NDArray[np.uint8], model: onnx.ModelProto) -> None:
    """Refuse calibration images that cannot calibrate `model`."""
    wanted = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim][1:]
    if calibration.dtype != np.uint8 or list(calibration.shape[1:]) != wanted:
        raise EdgekdError(
            f"The calibration images are {calibration.dtype} {list(calibration.shape)}, the model takes uint8 "
            f"[N, {', '.join(map(str, wanted))}].",
            "Prepare them with the model's own preprocess.",
        )
    if len(calibration) == 0:
        raise EdgekdError(
            "There are no calibration images.", "Give some of the training images, 200 or more."
        )
    if (calibration == calibration[0]).all() and (
        len(calibration) > 1 or np.ptp(calibration[0]) == 0
    ):
        raise EdgekdError(
            "All calibration images are alike, so the activations' ranges would be wrong.",
            "Give real and varied images, 200 or more.",
        )


def float_activations(model: onnx.ModelProto) -> list[str]:
    """Outputs of nodes whose type is known to be float32, in graph order."""
    known = {
        info.name
        for info in [*model.graph.value_info, *model.graph.output]
        if info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    return [name for node in model.graph.node for name in node.output if name in known]


def touched(model: onnx.ModelProto, ops: Collection[str], in_float: Collection[str]) -> list[str]:
    """Float activations that enter or leave a node of the types `ops`, other than the nodes named `in_float`."""
    near = {
        name
        for node in model.graph.node
        if node.op_type in ops and node.name not in in_float
        for name in (*node.input, *node.output)
    }
    return [name for name in float_activations(model) if name in near]


def observe(
    model: onnx.ModelProto,
    calibration: NDArray[np.uint8],
    tensors: Sequence[str],
    averaged: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> tuple[Ranges, Means]:
    """Smallest and largest value of each of the tensors over the images, and means.

    Args:
        averaged: tensors whose means are wanted too, and the axes they run over.

    Raises:
        EdgekdError: an activation is NaN or infinite.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    for name in tensors:
        for op in ("ReduceMin", "ReduceMax"):
            # Probes go last: every tensor they read exists by then, so the node order stays valid.
            probe.graph.node.append(onnx.helper.make_node(op, [name], [f"{name}/{op}"], keepdims=0))
            probe.graph.output.append(
                onnx.helper.make_tensor_value_info(f"{name}/{op}", onnx.TensorProto.FLOAT, [])
            )
    for name, axes in averaged.items():
        probe.graph.initializer.append(
            onnx.numpy_helper.from_array(np.array(axes, np.int64), f"{name}/axes")
        )
        mean = f"{name}/ReduceMean"
        probe.graph.node.append(
            onnx.helper.make_node("ReduceMean", [name, f"{name}/axes"], [mean], keepdims=0)
        )
        probe.graph.output.append(
            onnx.helper.make_tensor_value_info(mean, onnx.TensorProto.FLOAT, None)
        )
    wanted = [f"{name}/{op}" for op in ("ReduceMin", "ReduceMax") for name in tensors]
    wanted += [f"{name}/ReduceMean" for name in averaged]
    lows = np.full(len(tensors), np.inf, dtype=np.float32)
    highs = np.full(len(tensors), -np.inf, dtype=np.float32)
    means: Means = {}
    for number, values in enumerate(_run(probe, wanted, calibration, _BATCH)):
        extremes = np.array(values[: 2 * len(tensors)], dtype=np.float32)
        share = min(_BATCH, len(calibration) - number * _BATCH) / len(calibration)
        for name, mean_of_batch in zip(averaged, values[2 * len(tensors) :], strict=True):
            means[name] = means.get(name, 0) + share * mean_of_batch.astype(np.float64)
        lows = np.minimum(
            lows, extremes[: len(tensors)]
        )  # np.minimum keeps NaN, which the check below wants
        highs = np.maximum(highs, extremes[len(tensors) :])
    broken = ~(np.isfinite(lows) & np.isfinite(highs))
    if broken.any():
        raise EdgekdError(
            "The model computes values that are not finite on the calibration images.",
            "Check the training run: its weights have probably diverged.",
        )
    return {name: (lows[index], highs[index]) for index, name in enumerate(tensors)}, means


def clipped_ranges(
    model: onnx.ModelProto,
    calibration: NDArray[np.uint8],
    extremes: Ranges,
    calibrator: str,
    *,
    symmetric: bool,
) -> Ranges:
    """`extremes` as `calibrator` narrows them, from one more look at the images; `minmax` leaves them as they are.

    Args:
        calibrator: one of `calibrators.CALIBRATORS`.
        symmetric: whether the file will spread its steps evenly to both sides of 0.
    """
    if calibrator == "minmax":
        return extremes
    narrow, narrowed = METHODS[calibrator], {}
    for name, counts in histograms(model, calibration, extremes).items():
        low, high = extremes[name]
        found = narrow(counts, reach(low, high), symmetric) if counts.any() else (low, high)
        # The histogram is symmetric about 0, the tensor seldom is: never wider than what was seen.
        narrowed[name] = (np.float32(max(low, found[0])), np.float32(min(high, found[1])))
    return {name: (np.asarray(low), np.asarray(high)) for name, (low, high) in narrowed.items()}


def histograms(
    model: onnx.ModelProto, calibration: NDArray[np.uint8], extremes: Ranges
) -> dict[str, NDArray[np.int64]]:
    """How often each tensor takes which value over the images.

    Returns:
        Tensor name → int64 `[2 · BINS]`, equal bins over −reach to reach, its largest absolute value.
    """
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    present = {output.name for output in whole.graph.output}
    for name in extremes:
        if name not in present:
            whole.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    counts = {name: np.zeros(2 * BINS, dtype=np.int64) for name in extremes}
    for values in _run(whole, list(extremes), calibration, _WHOLE):
        for name, value in zip(extremes, values, strict=True):
            if (limit := reach(*extremes[name])) > 0:
                places = (
                    np.floor(value.reshape(-1) * np.float32(BINS / limit)).astype(np.intp) + BINS
                )
                # The largest value, and a last digit that differs from the first pass, would fall outside.
                counts[name] += np.bincount(np.clip(places, 0, 2 * BINS - 1), minlength=2 * BINS)
    return counts


def reach(low: NDArray[np.float32], high: NDArray[np.float32]) -> float:
    """The largest absolute value between two extremes."""
    return max(abs(float(low)), abs(float(high)))


def _run(
    model: onnx.ModelProto, wanted: list[str], calibration: NDArray[np.uint8], batch: int
) -> Iterator[list[NDArray[np.float32]]]:
    """The tensors `wanted` of `model`, batch by batch."""
    with scratch_folder() as folder:
        path = folder / "probe.onnx"
        onnx.save(model, path)
        session = onnxruntime.InferenceSession(
            path, _session_options(), providers=["CPUExecutionProvider"]
        )
        for start in range(0, len(calibration), batch):
            images = np.ascontiguousarray(calibration[start : start + batch])
            yield session.run(wanted, {model.graph.input[0].name: images})


def _session_options() -> onnxruntime.SessionOptions:
    """Every core, but no spinning: with a busy neighbour, waiting threads that spin cost minutes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    )
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options
