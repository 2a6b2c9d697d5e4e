"""INT8 for OpenVINO: NNCF quantizes the model once, and costly operations are reverted to float.

A reverted operation equals one ignored by NNCF: it has unquantized inputs, the weights of the float model, and its
original bias. Reverting takes about a second, while quantizing again takes half a minute.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError, optional
from edgekd.core.predictor import Predictor
from edgekd.export.onnx.write import quiet
from edgekd.export.openvino_ir import evaluator, read, save
from edgekd.export.quantize.calibration import Calibrator
from edgekd.export.quantize.search import Group, Scheme
from edgekd.targets.feed import Feed, as_pixels
from edgekd.targets.openvino import load_openvino, reason_of

_WEIGHTED = ("Convolution", "GroupConvolution", "MatMul")
_BETWEEN = ("Reshape", "Convert")
"""Operations between a layer and its constants."""
_MOVING = ("Gather", "Reshape", "Slice", "Split", "Squeeze", "StridedSlice", "Transpose",
           "Unsqueeze", "VariadicSplit")  # fmt: skip
"""Operations that only move values."""


@dataclass(frozen=True)
class Rounded:
    """A model before and after NNCF, with the same names."""

    full: Any
    model: Any
    images: int


class OpenVinoInt8(Scheme[Rounded]):
    """INT8 for OpenVINO; its files are IR, `.xml` with a `.bin` beside it.

    Args:
        metadata: for the files.
        feed: uint8 `[B, H, W, 3]` → the model's input.
        embeds: whether the model ends in an embedding, whose final normalisation stays in float.
    """

    rest = "fp16"

    def __init__(
        self, metadata: Mapping[str, str], feed: Feed = as_pixels, *, embeds: bool = False
    ) -> None:
        self.metadata, self.feed, self.embeds = metadata, feed, embeds

    def calibrate(
        self, fp32: Path, images: NDArray[np.uint8], calibrator: Calibrator = "minmax"
    ) -> Rounded:
        """Return NNCF's post-training quantization with fast bias correction; NNCF chooses the ranges.

        Images are processed one by one, so memory grows only by a few scalars per activation and image.
        """
        model = read(fp32)
        _refuse_not_finite(model)
        nncf = import_nncf()
        ranges = nncf.quantization.range_estimator.RangeEstimatorParametersSet
        attends = any(node.get_type_name() == "Softmax" for node in model.get_ordered_ops())
        behind = _behind_last_layer(model) if self.embeds else []
        advanced = nncf.AdvancedQuantizationParameters(
            # NNCF's default averages the extremes of the images and clips rare values of gates: on the toy mobilenetv3
            # the error of the logits was 25 times as large (docs/measurements.md).
            activations_range_estimator_params=ranges.MINMAX,
            # Smoothing would change weights, which could then not be reverted.
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
        )
        try:
            with quiet():
                rounded = nncf.quantize(
                    model.clone(),
                    nncf.Dataset([images[i : i + 1] for i in range(len(images))], self.feed),
                    # Asymmetric activations, since HardSwish is slightly negative.
                    preset=nncf.QuantizationPreset.MIXED,
                    target_device=nncf.TargetDevice.CPU,
                    # Keeps layer norms and the token stream in float: on a toy vit_tiny the error of the logits was 30
                    # to 200 times as large without it, and the file slower (docs/measurements.md).
                    model_type=nncf.ModelType.TRANSFORMER if attends else None,
                    subset_size=len(images),
                    advanced_parameters=advanced,
                    ignored_scope=nncf.IgnoredScope(names=behind, validate=False)
                    if behind
                    else None,
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
        return Rounded(model, rounded, len(images))

    def write(
        self, calibrated: Rounded, out: Path, *, in_float: Collection[str] = ()
    ) -> dict[str, Any]:
        model = calibrated.model.clone()
        revert_to_float(model, calibrated.full, in_float)
        save(model, out, self.metadata, halved=True)
        layers, left = _layers(model), layers_in_float(model)
        return {
            "method": "NNCF post-training quantization for OpenVINO: activations uint8 per tensor over their whole "
            "range, weights int8 per channel, fast bias correction; weights of layers left in float are stored in "
            "16 bits",
            "tool": f"nncf {import_nncf().__version__}",
            "calibration_images": calibrated.images,
            "quantized_layers": len(layers) - len(left),
            "float_layers": left,
        }

    def groups(self, calibrated: Rounded) -> list[Group]:
        """Return every operation with quantized inputs, with the operations that move these inputs."""
        full = _by_name(calibrated.full)
        found, last = [], ""
        for node in calibrated.model.get_ordered_ops():
            name, kind = node.get_friendly_name(), node.get_type_name()
            if name not in full or kind in (*_MOVING, "ShapeOf"):
                continue
            movers = _movers(node)
            if not movers and not _rounded_inputs(node, full[name]):
                continue
            module = _module(full[name]) if kind in _WEIGHTED else ""
            last = module or last
            label = module or (f"{kind} after {last}" if last else kind)
            found.append(Group(label, (name, *movers), kind in _WEIGHTED))
        return found

    def open(self, path: Path) -> Predictor:
        return evaluator(path, self.feed)


def revert_to_float(model: Any, full: Any, names: Collection[str]) -> None:
    """Revert the operations `names` of `model`, the quantized version of `full`, to float, in place."""
    before, wanted = _by_name(full), set(names)
    for node in model.get_ordered_ops():
        if node.get_friendly_name() not in wanted:
            continue
        original = before[node.get_friendly_name()]
        for place in _rounded_inputs(node, original):
            source = node.input_value(place)
            if _is_rounded(source):
                node.input(place).replace_source_output(source.get_node().input_value(0))
            else:  # weights stored as integers
                weight = _copy(_constant(original.input_value(place)))
                node.input(place).replace_source_output(weight.output(0))
        for bias, as_it_was in _biases(node, before):
            for reader in bias.output(0).get_target_inputs():
                reader.replace_source_output(_copy(as_it_was).output(0))
    model.validate_nodes_and_infer_types()


def layers_in_float(model: Any) -> list[str]:
    """Return the sorted names of the weighted operations without quantized inputs."""
    return sorted(
        node.get_friendly_name()
        for node in _layers(model)
        if not _is_rounded(node.input_value(0)) and not _movers(node)
    )


def import_nncf() -> Any:
    """Return the package `nncf`; it is `NotHere` where it is missing."""
    # This variable disables NNCF's usage statistics.
    os.environ.setdefault("NNCF_CI", "1")
    with quiet():
        nncf = optional("nncf", "openvino", "INT8 for OpenVINO")
        nncf.set_log_level(40)
    return nncf


def _refuse_not_finite(model: Any) -> None:
    """Raise an `EdgekdError` for diverged weights, for which NNCF computes NaN ranges without an error."""
    constants = [n for n in model.get_ordered_ops() if n.get_type_name() == "Constant"]
    if not all(np.isfinite(n.data).all() for n in constants if n.data.dtype == np.float32):
        raise EdgekdError(
            "The student's weights are not finite, so activations cannot be measured on the calibration images.",
            "Check the training run: its weights have probably diverged.",
        )


def _behind_last_layer(model: Any) -> list[str]:
    """Return the operations that normalise an embedding, which NNCF would also quantize."""
    behind: list[str] = []
    for node in model.get_ordered_ops():
        if node.get_type_name() in _WEIGHTED:
            behind = []
        elif node.get_type_name() not in ("Constant", "Result", "Parameter"):
            behind.append(node.get_friendly_name())
    return behind


def _layers(model: Any) -> list[Any]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() in _WEIGHTED]


def _by_name(model: Any) -> dict[str, Any]:
    return {node.get_friendly_name(): node for node in model.get_ordered_ops()}


def _rounded_inputs(node: Any, original: Any) -> list[int]:
    """Return the inputs of `node` that NNCF has quantized compared with `original`."""
    places = []
    for place in range(node.get_input_size()):
        was = _constant(original.input_value(place))
        stored = was is not None and _constant(node.input_value(place)) is None
        if _is_rounded(node.input_value(place)) or stored:
            places.append(place)
    return places


def _is_rounded(value: Any) -> bool:
    return bool(value.get_node().get_type_name() == "FakeQuantize")


def _movers(node: Any) -> list[str]:
    """Return the names of the moving operations between quantized values and `node`."""
    found = []
    for place in range(node.get_input_size()):
        source = node.input_value(place).get_node()
        while source.get_type_name() in _MOVING:
            if _is_rounded(source.input_value(0)):
                found.append(source.get_friendly_name())
            source = source.input_value(0).get_node()
    return found


def _added(node: Any) -> list[tuple[Any, int]]:
    """Return the additions of the output of `node`, each with the index of its other input."""
    readers = node.output(0).get_target_inputs()
    return [
        (reader.get_node(), 1 - reader.get_index())
        for reader in readers
        if reader.get_node().get_type_name() == "Add"
    ]


def _biases(node: Any, before: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Return the constants that are added to the output of `node`, each with its original."""
    found = []
    for adder, place in _added(node):
        original = before.get(adder.get_friendly_name())
        now = _constant(adder.input_value(place))
        was = None if original is None else _constant(original.input_value(place))
        if now is not None and was is not None:
            found.append((now, was))
    return found


def _constant(value: Any) -> Any | None:
    """Return the float32 constant behind a value, ignoring reshapes."""
    node = value.get_node()
    while node.get_type_name() in _BETWEEN:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" and node.data.dtype == np.float32 else None


def _copy(constant: Any) -> Any:
    return load_openvino().op.Constant(constant.data)


def _module(layer: Any) -> str:
    """Return `blocks.0.0.conv_pw`, after the weights' name in the ONNX file; of a product of tokens, after its bias."""
    added = [adder.input_value(place) for adder, place in _added(layer)]
    for value in (layer.input_value(1), *added):
        constant = _constant(value)
        name = constant.get_friendly_name() if constant is not None else ""
        module, _, kind = name.rpartition(".")
        if kind in ("weight", "bias"):
            return str(module).removeprefix("backbone.")
    return ""
