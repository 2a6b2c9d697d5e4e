"""Would TensorRT take this graph, and would it compute what the graph says? Asked without TensorRT and without a GPU.

The rules are those of TensorRT 11's explicit quantization, as its ONNX parser (onnx-tensorrt's
`QuantDequantLinearHelper`) and NVIDIA's guide "Explicit Quantization" state them. Most break the build of an engine.
Others are here because TensorRT goes on and computes something else: a uint8 zero point is read as int8 with a warning,
a missing one (uint8 by ONNX's default) without any, and either ruins the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.numpy_helper
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

OPSETS = range(9, 26)
"""What TensorRT 11's parser declares to support."""

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
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SCALE_TYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Finding:
    """One rule broken in one place."""

    node: str
    rule: str
    reason: str
    """A sentence."""

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


def findings(model: onnx.ModelProto) -> list[Finding]:
    """Every broken rule of `model`, in graph order within each rule; empty for a graph that TensorRT takes as meant."""
    graph = _Graph(model)
    return [finding for rule in _RULES for finding in rule(graph)]


def weight_axis(node: NodeProto, rank: int) -> int:
    """The axis of a weight's output channels, the only one along which TensorRT takes more than one scale."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if any(item.name == "transB" and item.i for item in node.attribute) else 1
    return rank - 1  # MatMul


class _Graph:
    """A model's main graph with what the rules ask of it at hand."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.inputs = {item.name: item.type.tensor_type.elem_type for item in model.graph.input}
        self.outputs = {item.name for item in model.graph.output}
        self.writer = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)
        self.constants: dict[str, NDArray[np.generic]] = {
            tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer
        }
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)

    def of(self, *ops: str) -> Iterator[NodeProto]:
        return (
            node for node in self.nodes if node.op_type in ops and node.domain in ("", "ai.onnx")
        )

    def written_by(self, name: str, op: str) -> NodeProto | None:
        node = self.writer.get(name)
        return node if node is not None and node.op_type == op else None

    def quantized_weight(self, name: str) -> bool:
        """True where `name` is a dequantized constant: an int8 one, or a float one that is quantized in the graph."""
        return self.origin(name) in self.constants

    def origin(self, name: str) -> str | None:
        """What a `DequantizeLinear` that writes `name` reads, through a `QuantizeLinear` in front; None without one."""
        dequantize = self.written_by(name, "DequantizeLinear")
        if dequantize is None:
            return None
        quantize = self.written_by(dequantize.input[0], "QuantizeLinear")
        source: str = (quantize if quantize is not None else dequantize).input[0]
        return source


def _operators(graph: _Graph) -> Iterator[Finding]:
    for entry in graph.model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version not in OPSETS:
            yield Finding(
                "opset",
                "opset",
                f"The graph uses opset {entry.version}; TensorRT 11 reads {OPSETS[0]} to {OPSETS[-1]}.",
            )
    for node in graph.nodes:
        if node.domain not in ("", "ai.onnx"):
            yield Finding(
                _name(node),
                "operator",
                f"TensorRT has no {node.op_type} of the domain {node.domain} without a plugin.",
            )
        elif node.op_type in ABSENT:
            yield Finding(_name(node), "operator", f"TensorRT's parser has no {node.op_type}.")
        elif node.op_type == "Cast" and any(
            item.name == "to" and item.i == TensorProto.DOUBLE for item in node.attribute
        ):
            yield Finding(
                _name(node),
                "double",
                "TensorRT computes no float64; the cast would end in float32.",
            )
    for name, value in graph.constants.items():
        if value.dtype == np.float64:
            yield Finding(
                name, "double", "TensorRT computes no float64; the constant would become float32."
            )


def _image(graph: _Graph) -> Iterator[Finding]:
    for name, kind in graph.inputs.items():
        for node in graph.readers[name]:
            if kind == TensorProto.UINT8 and node.op_type != "Cast":
                yield Finding(
                    _name(node),
                    "uint8-input",
                    f"The uint8 input {name} may feed nothing but a Cast, not {node.op_type}.",
                )


def _pairs(graph: _Graph) -> Iterator[Finding]:
    for node in graph.of("QuantizeLinear"):
        readers = graph.readers[node.output[0]]
        strangers = [reader.op_type for reader in readers if reader.op_type != "DequantizeLinear"]
        if node.output[0] in graph.outputs:
            strangers.append("an output of the model")
        if strangers or not readers:
            yield Finding(
                _name(node),
                "quantize-without-dequantize",
                f"Its int8 values go to {', '.join(strangers) or 'nothing'}; only DequantizeLinear may read them.",
            )
    for node in graph.of("DequantizeLinear"):
        name = node.input[0]
        if name not in graph.constants and graph.written_by(name, "QuantizeLinear") is None:
            yield Finding(
                _name(node),
                "dequantize-without-quantize",
                "It reads neither the output of a QuantizeLinear nor a constant; nothing says what its integers mean.",
            )


def _types(graph: _Graph) -> Iterator[Finding]:
    for node in graph.of("QuantizeLinear", "DequantizeLinear"):
        constant = graph.constants.get(node.input[0])
        wanted = _output_type(node)
        if len(node.input) > 2 and node.input[2]:
            zero = graph.constants.get(node.input[2])
            kind = str(zero.dtype) if zero is not None else "computed"
        elif node.op_type == "DequantizeLinear":
            kind = str(constant.dtype) if constant is not None else "int8"
        else:
            kind = wanted or "uint8"  # ONNX's own default
        if (
            constant is not None
            and node.op_type == "DequantizeLinear"
            and constant.dtype != np.int8
        ):
            kind = str(constant.dtype)
        if kind != "int8":
            yield Finding(
                _name(node),
                "type",
                f"It is quantized as {kind}; TensorRT reads only int8 here, and takes it for int8.",
            )


def _output_type(node: NodeProto) -> str | None:
    """The attribute `output_dtype` of opset 21 and later as a numpy name."""
    for item in node.attribute:
        if item.name == "output_dtype" and item.i:
            name: str = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(item.i)).name
            return name
    return None


def _zero_points(graph: _Graph) -> Iterator[Finding]:
    for node in graph.of("QuantizeLinear", "DequantizeLinear"):
        if len(node.input) < 3 or not node.input[2]:
            continue
        zero, scale = graph.constants.get(node.input[2]), graph.constants.get(node.input[1])
        if zero is None:
            yield Finding(
                _name(node), "zero-point", "Its zero point is computed; it must be a constant 0."
            )
        elif np.any(zero.astype(np.float64)):
            yield Finding(
                _name(node),
                "zero-point",
                "Its zero point is not 0; TensorRT quantizes symmetrically only.",
            )
        elif scale is not None and zero.size != scale.size:
            yield Finding(
                _name(node),
                "zero-point",
                f"It has {scale.size} scales and {zero.size} zero points; the numbers must match.",
            )


def _scales(graph: _Graph) -> Iterator[Finding]:
    for node in graph.of("QuantizeLinear", "DequantizeLinear"):
        scale = graph.constants.get(node.input[1])
        if scale is None:
            yield Finding(
                _name(node),
                "scale",
                "Its scale is computed; TensorRT needs it when the engine is built.",
            )
        elif str(scale.dtype) not in _SCALE_TYPES:
            yield Finding(
                _name(node),
                "scale",
                f"Its scale is {scale.dtype}; it must be a float of 32 or 16 bits.",
            )
        elif not (
            np.isfinite(scale.astype(np.float64)).all() and (scale.astype(np.float64) > 0).all()
        ):
            yield Finding(
                _name(node),
                "scale",
                "A scale is 0, negative or not finite; every scale must be above 0.",
            )
        elif scale.ndim > 1:
            yield Finding(
                _name(node),
                "scale",
                "Its scales form blocks; int8 takes one scale or one per output channel.",
            )


def _channels(graph: _Graph) -> Iterator[Finding]:
    for node in graph.of("QuantizeLinear", "DequantizeLinear"):
        scale = graph.constants.get(node.input[1])
        if scale is None or scale.size == 1 or scale.ndim != 1:
            continue
        source = node.input[0]
        if node.op_type == "DequantizeLinear":
            quantize = graph.written_by(source, "QuantizeLinear")
            source = quantize.input[0] if quantize is not None else source
        weight = graph.constants.get(source)
        if weight is None:
            yield Finding(
                _name(node),
                "per-channel-activation",
                "An activation has a scale per channel; only weights may.",
            )
            continue
        axis = next((item.i for item in node.attribute if item.name == "axis"), 1) % weight.ndim
        if weight.shape[axis] != scale.size:
            yield Finding(
                _name(node),
                "axis",
                f"It has {scale.size} scales for the {weight.shape[axis]} channels of axis {axis}.",
            )
        if node.op_type == "QuantizeLinear":
            continue  # its DequantizeLinear is asked below
        for reader in graph.readers[node.output[0]]:
            if reader.op_type in _WEIGHTED and reader.input[1] == node.output[0]:
                right = weight_axis(reader, weight.ndim)
                if axis != right:
                    yield Finding(
                        _name(node),
                        "axis",
                        f"Its scales lie along axis {axis}; the output channels of {reader.op_type} are axis {right}.",
                    )


def _layers(graph: _Graph) -> Iterator[Finding]:
    for node in graph.of(*_WEIGHTED):
        if graph.quantized_weight(node.input[1]) and graph.origin(node.input[0]) is None:
            yield Finding(
                _name(node),
                "half-quantized",
                f"The weights of this {node.op_type} are quantized and its input is not.",
            )
        if len(node.input) > 2 and node.input[2]:
            bias = graph.constants.get(node.input[2])
            integer = bias is not None and np.issubdtype(bias.dtype, np.integer)
            if integer or graph.origin(node.input[2]) is not None:
                yield Finding(
                    _name(node), "bias", "Its bias is quantized; TensorRT adds the bias in float."
                )
    for node in graph.of("Add"):
        if any(graph.quantized_weight(name) for name in node.input):
            yield Finding(
                _name(node), "bias", "It adds a quantized constant; TensorRT adds a bias in float."
            )


def _residuals(graph: _Graph) -> Iterator[Finding]:
    for node in graph.of("Add"):
        quantized = [graph.origin(name) is not None for name in node.input]
        if len(set(quantized)) == 2 and not any(name in graph.constants for name in node.input):
            yield Finding(
                _name(node),
                "residual",
                "One side of this Add is quantized and the other is not, so it runs in float.",
            )


def _name(node: NodeProto) -> str:
    return node.name or f"{node.op_type} → {node.output[0]}"


_RULES: tuple[Callable[[_Graph], Iterator[Finding]], ...] = (
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
