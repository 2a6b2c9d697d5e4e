"""INT8 for OpenVINO: NNCF rounds everything once, and what costs too much is taken back operation by operation."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError, first_line
from edgekd.export.onnx import unprinted
from edgekd.export.openvino_ir import evaluator, read, save
from edgekd.export.quantize.calibrators import Calibrator
from edgekd.export.quantize.openvino_groups import (
    Rounded,
    in_float,
    revert_to_float,
    rounding,
    units,
    weighted,
)
from edgekd.export.quantize.scheme import Scheme
from edgekd.targets.feed import Feed, as_pixels
from edgekd.targets.openvino import reason_of


def scheme(
    metadata: Mapping[str, str], feed: Feed = as_pixels, *, embeds: bool = False
) -> Scheme[Rounded]:
    """How INT8 for OpenVINO is written; its files are IR, `.xml` with a `.bin` beside it.

    Args:
        metadata: for the files.
        feed: uint8 `[B, H, W, 3]` → the model's input.
        embeds: whether what comes behind the last layer makes an embedding's length 1, and so stays in float.
    """

    def calibrate(fp32: Path, calibration: NDArray[np.uint8], _: Calibrator) -> Rounded:
        return quantize(read(fp32), calibration, feed, embeds=embeds)

    def write(calibrated: Rounded, out: Path, *, keep: Collection[str] = ()) -> dict[str, Any]:
        model = calibrated.model.clone()
        revert_to_float(model, calibrated.full, keep)
        save(model, out, metadata, halved=True)
        return _described(model, calibrated.images)

    return Scheme(
        calibrate,
        write,
        units,
        rounding,
        functools.partial(evaluator, feed=feed),
        rest="fp16",
        timed=True,
    )


def quantize(
    model: Any, calibration: NDArray[np.uint8], feed: Feed = as_pixels, *, embeds: bool = False
) -> Rounded:
    """NNCF's post-training quantization of an OpenVINO model, with fast bias correction.

    Image by image, so memory does not grow with their number beyond a few scalars per activation.

    Args:
        calibration: RGB uint8 `[N, H, W, 3]`, prepared with the model's own preprocess.
        feed: uint8 `[B, H, W, 3]` → the model's input.
        embeds: whether what comes behind the last layer stays in float.

    Raises:
        EdgekdError: NNCF refuses the model, or it computes values that are not finite.
    """
    nncf = _nncf()
    range_estimator = nncf.quantization.range_estimator
    unsmoothed = nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
    attends = any(node.get_type_name() == "Softmax" for node in model.get_ordered_ops())
    _refuse_not_finite(model)
    behind = _behind_last_layer(model) if embeds else []
    try:
        with unprinted():
            rounded = nncf.quantize(
                model.clone(),
                nncf.Dataset([calibration[i : i + 1] for i in range(len(calibration))], feed),
                preset=nncf.QuantizationPreset.MIXED,  # asymmetric activations: HardSwish goes below 0, by little
                target_device=nncf.TargetDevice.CPU,
                # Leaves layer norms and the stream of tokens in float: on a toy vit_tiny the logits' error was 30 to
                # 200 times as large without it, and the file slower (docs/measurements.md).
                model_type=nncf.ModelType.TRANSFORMER if attends else None,
                subset_size=len(calibration),
                # NNCF's own choice averages the extremes of the images and cuts off what gates rarely reach:
                # on the toy mobilenetv3 the logits' error was 25 times as large (docs/measurements.md).
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    activations_range_estimator_params=range_estimator.RangeEstimatorParametersSet.MINMAX,
                    smooth_quant_alphas=unsmoothed,  # it changes weights, which could then not be taken back
                ),
                ignored_scope=nncf.IgnoredScope(names=behind, validate=False) if behind else None,
            )
    except (
        RuntimeError,
        nncf.InternalError,
        nncf.ValidationError,
        nncf.UnsupportedModelError,
    ) as error:
        raise EdgekdError(
            f"NNCF {nncf.__version__} cannot quantize the student: {reason_of(error)}."
        ) from error
    return Rounded(model, rounded, len(calibration))


def _described(model: Any, images: int) -> dict[str, Any]:
    nncf = _nncf()
    left = in_float(model)
    return {
        "method": "NNCF post-training quantization for OpenVINO: activations uint8 per tensor over their whole "
        "range, weights int8 per channel, fast bias correction; weights of layers left in float are stored in 16 bits",
        "tool": f"nncf {nncf.__version__}",
        "calibration_images": images,
        "quantized_layers": len(weighted(model)) - len(left),
        "float_layers": left,
    }


def _behind_last_layer(model: Any) -> list[str]:
    """What makes an embedding's length 1, which NNCF would round to 8 bits as well."""
    nodes = list(model.get_ordered_ops())
    layers = {node.get_friendly_name() for node in weighted(model)}
    last = max(
        (place for place, node in enumerate(nodes) if node.get_friendly_name() in layers),
        default=-1,
    )
    kinds = ("Constant", "Result", "Parameter")
    return [
        node.get_friendly_name() for node in nodes[last + 1 :] if node.get_type_name() not in kinds
    ]


def _refuse_not_finite(model: Any) -> None:
    """Diverged weights would give ranges of NaN, and NNCF goes on without a word."""
    constants = [n for n in model.get_ordered_ops() if n.get_type_name() == "Constant"]
    if not all(np.isfinite(n.data).all() for n in constants if n.data.dtype == np.float32):
        raise EdgekdError(
            "The student's weights are not finite, so nothing can be measured on the calibration images.",
            "Check the training run: its weights have probably diverged.",
        )


def _nncf() -> Any:
    # NNCF reports its use to a server of its makers unless it is told that nobody is there to ask.
    os.environ.setdefault("NNCF_CI", "1")
    try:
        with unprinted():
            import nncf

            nncf.set_log_level(40)
    except ImportError as error:
        raise EdgekdError(
            f"INT8 for OpenVINO needs the package nncf, which cannot be imported ({first_line(error)}).",
            'Install it: pip install "edgekd[openvino]".',
        ) from error
    return nncf
