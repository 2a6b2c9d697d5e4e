"""INT8 for OpenVINO: NNCF rounds everything once, and what costs too much is taken back operation by operation.

An operation that is taken back is as if NNCF had left it alone: it reads unrounded inputs, the weights of the float
model, and its bias as it was before NNCF corrected it. That takes a second, where quantizing again takes half a minute.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import EdgekdError
from edgekd.export.calibrators import Calibrator
from edgekd.export.dialect import Dialect
from edgekd.export.ir import evaluator, read, reason, save
from edgekd.export.onnx import unprinted
from edgekd.export.units import Unit
from edgekd.targets.feed import Feed, as_pixels
from edgekd.targets.openvino_runtime import load_openvino

_WEIGHTED = ("Convolution", "GroupConvolution", "MatMul")
_BETWEEN = ("Reshape", "Convert")
"""What may lie between a layer and its constants."""


@dataclass(frozen=True)
class Rounded:
    """A model before and after NNCF; both take what `feed` gives."""

    full: Any
    model: Any
    images: int


def dialect(metadata: Mapping[str, str], feed: Feed = as_pixels, *, embeds: bool = False) -> Dialect[Rounded]:
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
        take_back(model, calibrated.full, keep)
        save(model, out, metadata, halved=True)
        return _described(model, calibrated.images)

    return Dialect(calibrate, write, units, rounding, functools.partial(evaluator, feed=feed), rest="fp16", timed=True)


def quantize(model: Any, calibration: NDArray[np.uint8], feed: Feed = as_pixels, *, embeds: bool = False) -> Rounded:
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
    _refuse_not_finite(model)
    in_float = _behind_last_layer(model) if embeds else []
    try:
        with unprinted():
            rounded = nncf.quantize(
                model.clone(),
                nncf.Dataset([calibration[i : i + 1] for i in range(len(calibration))], feed),
                preset=nncf.QuantizationPreset.MIXED,  # asymmetric activations: HardSwish goes below 0, by little
                target_device=nncf.TargetDevice.CPU,
                subset_size=len(calibration),
                # NNCF's own choice averages the extremes of the images and cuts off what gates rarely reach:
                # on the toy mobilenetv3 the logits' error was 25 times as large (docs/results.md).
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    activations_range_estimator_params=range_estimator.RangeEstimatorParametersSet.MINMAX
                ),
                ignored_scope=nncf.IgnoredScope(names=list(in_float), validate=False) if in_float else None,
            )
    except (RuntimeError, nncf.InternalError, nncf.ValidationError, nncf.UnsupportedModelError) as error:
        raise EdgekdError(f"NNCF {nncf.__version__} cannot quantize the student: {reason(error)}.") from error
    return Rounded(model, rounded, len(calibration))


def units(calibrated: Rounded) -> list[Unit]:
    """Every operation that reads something rounded to 8 bits, in graph order."""
    full = _by_name(calibrated.full)
    found, last = [], ""
    for node in calibrated.model.get_ordered_ops():
        name, kind = node.get_friendly_name(), node.get_type_name()
        if name not in full or not _rounded_inputs(node, full[name]):
            continue
        weighted = kind in _WEIGHTED
        if weighted:
            last = _module(full[name]) or name
        found.append(Unit(last if weighted else f"{kind} after {last}" if last else kind, (name,), weighted))
    return found


def rounding(calibrated: Rounded) -> dict[str, float]:
    """Weighted operation → squared error of its weights in int8 per output channel, relative to their squares."""
    errors = {}
    for node in calibrated.full.get_ordered_ops():
        if node.get_type_name() in _WEIGHTED and (constant := _constant(node.input_value(1))) is not None:
            rows = constant.data.reshape(constant.data.shape[0], -1).astype(np.float64)  # [channels, K]
            scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.finfo(np.float32).tiny) / 127
            lost = np.square(rows - np.round(rows / scale) * scale).sum()
            errors[node.get_friendly_name()] = float(lost / max(np.square(rows).sum(), np.finfo(np.float32).tiny))
    return errors


def take_back(model: Any, full: Any, keep: Collection[str]) -> None:
    """Let the operations named in `keep` compute in float again, in place.

    Args:
        model: by NNCF, from `full`; what both hold goes by the same names.
    """
    before, names = _by_name(full), set(keep)
    for node in model.get_ordered_ops():
        if node.get_friendly_name() not in names:
            continue
        original = before[node.get_friendly_name()]
        for place in _rounded_inputs(node, original):
            source = node.input_value(place)
            if source.get_node().get_type_name() == "FakeQuantize":
                node.input(place).replace_source_output(source.get_node().input_value(0))
            else:  # weights that NNCF has stored as integers
                node.input(place).replace_source_output(_copy(_constant(original.input_value(place))).output(0))
        for bias, as_it_was in _biases(node, before):
            for reader in bias.output(0).get_target_inputs():
                reader.replace_source_output(_copy(as_it_was).output(0))
    model.validate_nodes_and_infer_types()


def _described(model: Any, images: int) -> dict[str, Any]:
    nncf = _nncf()
    layers = _weighted(model)
    left = sorted(node.get_friendly_name() for node in layers if not _is_rounded(node.input_value(0)))
    return {
        "method": "NNCF post-training quantization for OpenVINO: activations uint8 per tensor over their whole "
        "range, weights int8 per channel, fast bias correction; weights of layers left in float are stored in 16 bits",
        "tool": f"nncf {nncf.__version__}",
        "calibration_images": images,
        "quantized_layers": len(layers) - len(left),
        "float_layers": left,
    }


def _rounded_inputs(node: Any, original: Any) -> list[int]:
    """Inputs of `node` that NNCF has rounded, or stored as integers, since `original`."""
    places = []
    for place in range(node.get_input_size()):
        was = _constant(original.input_value(place))
        stored = was is not None and _constant(node.input_value(place)) is None
        if _is_rounded(node.input_value(place)) or stored:
            places.append(place)
    return places


def _is_rounded(value: Any) -> bool:
    return bool(value.get_node().get_type_name() == "FakeQuantize")


def _biases(node: Any, before: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """The constant that is added to what `node` computes, and the one that was."""
    found = []
    for reader in node.output(0).get_target_inputs():
        adder = reader.get_node()
        if adder.get_type_name() != "Add" or adder.get_friendly_name() not in before:
            continue
        place = 1 - reader.get_index()
        now = _constant(adder.input_value(place))
        was = _constant(before[adder.get_friendly_name()].input_value(place))
        if now is not None and was is not None:
            found.append((now, was))
    return found


def _constant(value: Any) -> Any | None:
    """The constant that a value is, whatever shape it was brought to."""
    node = value.get_node()
    while node.get_type_name() in _BETWEEN:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" and node.data.dtype == np.float32 else None


def _copy(constant: Any) -> Any:
    return load_openvino().op.Constant(constant.data)


def _by_name(model: Any) -> dict[str, Any]:
    return {node.get_friendly_name(): node for node in model.get_ordered_ops()}


def _module(layer: Any) -> str:
    """`blocks.0.0.conv_pw`, after the weights that the ONNX file names."""
    constant = _constant(layer.input_value(1))
    module, _, kind = (constant.get_friendly_name() if constant is not None else "").rpartition(".")
    return str(module).removeprefix("backbone.") if kind == "weight" else ""


def _weighted(model: Any) -> list[Any]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() in _WEIGHTED]


def _behind_last_layer(model: Any) -> list[str]:
    """What makes an embedding's length 1, which NNCF would round to 8 bits as well."""
    nodes = list(model.get_ordered_ops())
    layers = {node.get_friendly_name() for node in _weighted(model)}
    last = max((place for place, node in enumerate(nodes) if node.get_friendly_name() in layers), default=-1)
    kinds = ("Constant", "Result", "Parameter")
    return [node.get_friendly_name() for node in nodes[last + 1 :] if node.get_type_name() not in kinds]


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
    with unprinted():
        import nncf

        nncf.set_log_level(40)
    return nncf
