"""What NNCF has rounded, operation by operation: named, weighed, and taken back.

An operation that is taken back is as if NNCF had left it alone: it reads unrounded inputs, the weights of the float
model, and its bias as it was before NNCF corrected it. That takes a second, where quantizing again takes half a minute.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.export.quantize.groups import Group
from edgekd.targets.openvino import load_openvino

_WEIGHTED = ("Convolution", "GroupConvolution", "MatMul")
_BETWEEN = ("Reshape", "Convert")
"""What may lie between a layer and its constants."""
_MOVING = (
    "Gather",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "StridedSlice",
    "Transpose",
    "Unsqueeze",
    "VariadicSplit",
)
"""What computes nothing: 8 bits in, the same 8 bits out."""


@dataclass(frozen=True)
class Rounded:
    """A model before and after NNCF; both take what `feed` gives."""

    full: Any
    model: Any
    images: int


def units(calibrated: Rounded) -> list[Group]:
    """Every operation that computes with something rounded to 8 bits, in graph order, led by itself.

    With it go operations ahead of it that do no more than move what is rounded.
    """
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


def rounding(calibrated: Rounded) -> dict[str, float]:
    """Weighted operation → squared error of its weights in int8 per output channel, relative to their squares."""
    errors = {}
    for node in calibrated.full.get_ordered_ops():
        if (
            node.get_type_name() in _WEIGHTED
            and (constant := _constant(node.input_value(1))) is not None
        ):
            rows = _rows(node, constant.data).astype(np.float64)
            scale = (
                np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.finfo(np.float32).tiny) / 127
            )
            lost = np.square(rows - np.round(rows / scale) * scale).sum()
            errors[node.get_friendly_name()] = float(
                lost / max(np.square(rows).sum(), np.finfo(np.float32).tiny)
            )
    return errors


def revert_to_float(model: Any, full: Any, keep: Collection[str]) -> None:
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
                node.input(place).replace_source_output(
                    _copy(_constant(original.input_value(place))).output(0)
                )
        for bias, as_it_was in _biases(node, before):
            for reader in bias.output(0).get_target_inputs():
                reader.replace_source_output(_copy(as_it_was).output(0))
    model.validate_nodes_and_infer_types()


def weighted(model: Any) -> list[Any]:
    """Convolutions and matrix products, in graph order."""
    return [node for node in model.get_ordered_ops() if node.get_type_name() in _WEIGHTED]


def in_float(model: Any) -> list[str]:
    """Names of the weighted operations that read nothing rounded, sorted."""
    nodes = weighted(model)
    return sorted(
        n.get_friendly_name() for n in nodes if not _is_rounded(n.input_value(0)) and not _movers(n)
    )


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


def _movers(node: Any) -> list[str]:
    """Names of the operations that bring `node` what is rounded, the ones that read it first-hand."""
    found = []
    for place in range(node.get_input_size()):
        source = node.input_value(place).get_node()
        while source.get_type_name() in _MOVING:
            if _is_rounded(source.input_value(0)):
                found.append(source.get_friendly_name())
            source = source.input_value(0).get_node()
    return found


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
    """`blocks.0.0.conv_pw`, after the weights that the ONNX file names; of a product of tokens, after its bias."""
    added = [
        reader.get_node().input_value(1 - reader.get_index())
        for reader in layer.output(0).get_target_inputs()
        if reader.get_node().get_type_name() == "Add"
    ]
    for value in (layer.input_value(1), *added):
        constant = _constant(value)
        module, _, kind = (constant.get_friendly_name() if constant is not None else "").rpartition(
            "."
        )
        if kind in ("weight", "bias"):
            return str(module).removeprefix("backbone.")
    return ""


def _rows(layer: Any, weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """The weights of each output channel, float32 `[channels, K]`."""
    if layer.get_type_name() == "MatMul":
        return weight if layer.get_attributes()["transpose_b"] else weight.T
    return weight.reshape(layer.get_output_partial_shape(0)[1].get_length(), -1)
