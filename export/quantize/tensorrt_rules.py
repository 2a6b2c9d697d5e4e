"""Rules of TensorRT for ONNX graphs, checked without TensorRT and without a GPU.

The rules are those of TensorRT 11's explicit quantization, from its ONNX parser (onnx-tensorrt's
`QuantDequantLinearHelper`) and NVIDIA's guide "Explicit Quantization". If most of them are broken, the engine cannot be
built. For others, the results are wrong: a uint8 zero point is read as int8 with a warning, and a missing one (uint8 by
ONNX's default) without a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from edgekd.export.onnx.graphs import WEIGHTED_OPS, Graph, attribute, output_axis

OPSETS = range(9, 26)
"""Opsets that TensorRT 11's parser supports."""

# Operators of ONNX for which the parser of TensorRT-RTX 1.7 has no importer (`OnnxParser.supports_operator`).
_ABSENT = (
    "AffineGrid Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im "
    "Compress ConcatFromSequence ConvInteger CumProd DFT DeformConv Det DynamicQuantizeLinear ImageDecoder "
    "MatMulInteger MaxRoiPool MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional "
    "OptionalGetElement OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch SequenceAt "
    "SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap "
    "SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer StringSplit SwiGLU TfIdfVectorizer "
    "Unique"
)
ABSENT = frozenset(_ABSENT.split())
_SCALE_TYPES = ("float32", "float16", "bfloat16")
_ONNX = ("", "ai.onnx")


@dataclass(frozen=True)
class Finding:
    """A broken rule at a node."""

    node: str
    rule: str
    reason: str
    """A sentence."""

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


Broken = Iterator[tuple[NodeProto | str, str, str]]
"""Node or name, rule, reason."""


def findings(model: onnx.ModelProto) -> list[Finding]:
    """Return every broken rule of `model`, in graph order within each rule; empty for a legal model."""
    graph, found = _QdqGraph(model), []
    for rule in _RULES:
        for place, name, reason in rule(graph):
            if isinstance(place, NodeProto):
                place = place.name or f"{place.op_type} → {place.output[0]}"
            found.append(Finding(place, name, reason))
    return found


class _QdqGraph(Graph):
    """A graph with look-ups for Q/DQ pairs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self.opsets = [one.version for one in model.opset_import if one.domain in _ONNX]

    def of(self, *ops: str) -> Iterator[NodeProto]:
        return (node for node in self.proto.node if node.op_type in ops and node.domain in _ONNX)

    def pairs(self) -> Iterator[NodeProto]:
        return self.of("QuantizeLinear", "DequantizeLinear")

    def constant(self, name: str) -> NDArray[np.generic] | None:
        return self.value(name) if name in self.constants else None

    def written_by(self, name: str, op: str) -> NodeProto | None:
        node = self.writer.get(name)
        return node if node is not None and node.op_type == op else None

    def origin(self, name: str) -> str | None:
        """Return the source of a tensor that a `DequantizeLinear` writes, before its `QuantizeLinear`; else None."""
        dequantize = self.written_by(name, "DequantizeLinear")
        return None if dequantize is None else self.source(dequantize)

    def source(self, node: NodeProto) -> str:
        """Return the source of a `DequantizeLinear`, before its `QuantizeLinear` if there is one."""
        quantize = self.written_by(node.input[0], "QuantizeLinear")
        if node.op_type == "DequantizeLinear" and quantize is not None:
            node = quantize
        return str(node.input[0])


def _operators(graph: _QdqGraph) -> Broken:
    for version in graph.opsets:
        if version not in OPSETS:
            reads = f"TensorRT 11 reads {OPSETS[0]} to {OPSETS[-1]}."
            yield "opset", "opset", f"The graph uses opset {version}; {reads}"
    for node in graph.proto.node:
        if node.domain not in _ONNX:
            what = f"{node.op_type} of the domain {node.domain}"
            yield node, "operator", f"TensorRT has no {what} without a plugin."
        elif node.op_type in ABSENT:
            yield node, "operator", f"TensorRT's parser has no {node.op_type}."
        elif node.op_type == "Cast" and attribute(node, "to") == TensorProto.DOUBLE:
            yield node, "double", "TensorRT computes no float64; the cast would end in float32."
    for name, tensor in graph.constants.items():
        if tensor.data_type == TensorProto.DOUBLE:
            yield (
                name,
                "double",
                "TensorRT computes no float64; the constant would become float32.",
            )


def _image(graph: _QdqGraph) -> Broken:
    for image in graph.proto.input:
        for node in graph.readers[image.name]:
            if image.type.tensor_type.elem_type == TensorProto.UINT8 and node.op_type != "Cast":
                reason = f"The uint8 input {image.name} is read by {node.op_type}, but only Cast may read it."
                yield node, "uint8-input", reason


def _pairs(graph: _QdqGraph) -> Broken:
    for node in graph.of("QuantizeLinear"):
        readers = [reader.op_type for reader in graph.readers[node.output[0]]]
        others = [op for op in readers if op != "DequantizeLinear"]
        if node.output[0] in graph.outputs:
            others.append("an output of the model")
        if others or not readers:
            places = ", ".join(others) or "nothing"
            reason = f"Its int8 values go to {places}; only DequantizeLinear may read them."
            yield node, "quantize-without-dequantize", reason
    for node in graph.of("DequantizeLinear"):
        name = node.input[0]
        if name not in graph.constants and graph.written_by(name, "QuantizeLinear") is None:
            reason = (
                "It reads neither the output of a QuantizeLinear nor a constant, so the meaning of its integers is "
                "unknown."
            )
            yield node, "dequantize-without-quantize", reason


def _types(graph: _QdqGraph) -> Broken:
    for node in graph.pairs():
        dequantizes = node.op_type == "DequantizeLinear"
        stored = graph.constant(node.input[0]) if dequantizes else None
        if stored is not None and stored.dtype != np.int8:
            kind = str(stored.dtype)
        elif len(node.input) > 2 and node.input[2]:
            zero = graph.constant(node.input[2])
            kind = "computed" if zero is None else str(zero.dtype)
        elif dequantizes:
            kind = "int8"
        else:
            number = attribute(node, "output_dtype", 0) or TensorProto.UINT8  # ONNX's own default
            kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(number)).name
        if kind != "int8":
            reason = (
                f"It is quantized as {kind}; TensorRT reads only int8 here, and takes it for int8."
            )
            yield node, "type", reason


def _zero_points(graph: _QdqGraph) -> Broken:
    for node in graph.pairs():
        if len(node.input) < 3 or not node.input[2]:
            continue
        zero, scale = graph.constant(node.input[2]), graph.constant(node.input[1])
        if zero is None:
            yield node, "zero-point", "Its zero point is computed; it must be a constant 0."
        elif np.any(zero.astype(np.float64)):
            reason = "Its zero point is not 0; TensorRT quantizes symmetrically only."
            yield node, "zero-point", reason
        elif scale is not None and zero.size != scale.size:
            sizes = f"{scale.size} scales and {zero.size} zero points"
            yield node, "zero-point", f"It has {sizes}; the numbers must match."


def _scales(graph: _QdqGraph) -> Broken:
    for node in graph.pairs():
        scale = graph.constant(node.input[1])
        if scale is None:
            reason = "Its scale is computed; TensorRT needs it when the engine is built."
        elif str(scale.dtype) not in _SCALE_TYPES:
            reason = f"Its scale is {scale.dtype}; it must be a float of 32 or 16 bits."
        elif not np.isfinite(wide := scale.astype(np.float64)).all() or not (wide > 0).all():
            reason = "A scale is 0, negative or not finite; every scale must be above 0."
        elif scale.ndim > 1:
            reason = "Its scales form blocks; int8 takes one scale or one per output channel."
        else:
            continue
        yield node, "scale", reason


def _channels(graph: _QdqGraph) -> Broken:
    for node in graph.pairs():
        scale = graph.constant(node.input[1])
        if scale is None or scale.size == 1 or scale.ndim != 1:
            continue
        weight = graph.constant(graph.source(node))
        if weight is None:
            reason = "An activation has a scale per channel; only weights may."
            yield node, "per-channel-activation", reason
            continue
        axis = attribute(node, "axis", 1) % weight.ndim
        if weight.shape[axis] != scale.size:
            channels = f"the {weight.shape[axis]} channels of axis {axis}"
            yield node, "axis", f"It has {scale.size} scales for {channels}."
        if node.op_type == "QuantizeLinear":
            continue  # its DequantizeLinear is checked below
        for reader in graph.readers[node.output[0]]:
            if (
                reader.op_type in (*WEIGHTED_OPS, "ConvTranspose")
                and reader.input[1] == node.output[0]
            ):
                right = output_axis(reader, weight.ndim)
                if axis != right:
                    channels = f"the output channels of {reader.op_type} are axis {right}"
                    yield node, "axis", f"Its scales lie along axis {axis}; {channels}."


def _layers(graph: _QdqGraph) -> Broken:
    for node in graph.of(*WEIGHTED_OPS, "ConvTranspose"):
        if graph.origin(node.input[1]) in graph.constants and graph.origin(node.input[0]) is None:
            reason = f"The weights of this {node.op_type} are quantized and its input is not."
            yield node, "half-quantized", reason
        if len(node.input) > 2 and node.input[2]:
            bias = graph.constant(node.input[2])
            integer = bias is not None and np.issubdtype(bias.dtype, np.integer)
            if integer or graph.origin(node.input[2]) is not None:
                yield node, "bias", "Its bias is quantized; TensorRT adds the bias in float."
    for node in graph.of("Add"):
        if any(graph.origin(name) in graph.constants for name in node.input):
            yield node, "bias", "It adds a quantized constant; TensorRT adds a bias in float."


def _residuals(graph: _QdqGraph) -> Broken:
    for node in graph.of("Add"):
        quantized = {graph.origin(name) is not None for name in node.input}
        if len(quantized) == 2 and not any(name in graph.constants for name in node.input):
            reason = "One side of this Add is quantized and the other is not, so it runs in float."
            yield node, "residual", reason


_RULES: tuple[Callable[[_QdqGraph], Broken], ...] = (
    _operators,
    _image,
    _pairs,
    _types,
    _zero_points,
    _scales,
    _channels,
    _layers,
    _residuals,
)
