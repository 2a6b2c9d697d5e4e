"""Helpers for ONNX graphs: look-ups (producers, consumers, shapes, values, layers) and edits of whole files.

Input variants are made by editing the finished file, so calibration and searches are the same for files that take
floats or pictures of any size. In every precision the normalisation is in float, before the first layer and the first
rounding, so the removed part is the same for all.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.compose
import onnx.numpy_helper
import onnx.parser
import PIL
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from edgekd.core.errors import EdgekdError
from edgekd.core.preprocess import Preprocess

WEIGHTED_OPS = ("Conv", "Gemm", "MatMul")
_FILTERS = {
    "bilinear": 'mode = "linear", antialias = 1, exclude_outside = 1',
    "bicubic": 'mode = "cubic", antialias = 1, exclude_outside = 1, cubic_coeff_a = -0.5',
}
"""Attributes of Resize that correspond to Pillow's filters."""
_ROWS_FIRST = int(PIL.__version__.partition(".")[0]) >= 13
"""Whether Pillow resizes the vertical axis first if it shrinks by far more pixels."""
_NORMALISING = ("Cast", "Reshape", "Mul", "Add", "Transpose")


class Graph:
    """Maps over the current graph of `model`.

    Args:
        model: with inferred shapes, if shapes are needed.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.proto = model.graph
        self.constants = {tensor.name: tensor for tensor in self.proto.initializer}
        self.writer = {name: node for node in self.proto.node for name in node.output if name}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.proto.node:
            for name in node.input:
                if name:
                    self.readers[name].append(node)
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.outputs = {output.name for output in self.proto.output}
        self._infos = {
            info.name: info.type.tensor_type
            for info in (*self.proto.value_info, *self.proto.input, *self.proto.output)
        }

    def shape(self, name: str) -> list[int]:
        """Return a tensor's shape with 0 for free dimensions, or an empty list if it is unknown."""
        if name in self.constants:
            return list(self.constants[name].dims)
        info = self._infos.get(name)
        return [dim.dim_value for dim in info.shape.dim] if info is not None else []

    def is_float(self, name: str) -> bool:
        """Return whether a tensor is known to hold float32."""
        info = self._infos.get(name)
        return info is not None and info.elem_type == onnx.TensorProto.FLOAT

    def value(self, name: str) -> NDArray[Any]:
        """Return a constant's value."""
        value: NDArray[Any] = onnx.numpy_helper.to_array(self.constants[name])
        return value

    def set_value(self, name: str, value: NDArray[Any]) -> None:
        """Set a constant's value, shape and type."""
        self.constants[name].CopyFrom(onnx.numpy_helper.from_array(value, name))

    def add_constant(self, name: str, value: NDArray[Any]) -> str:
        """Add a constant if there is none of this name; return the name."""
        if name not in self.constants:
            self.proto.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
            self.constants[name] = self.proto.initializer[-1]
        return name

    def dequantizer(
        self, name: str, integers: NDArray[Any], scales: NDArray[Any], axis: int
    ) -> NodeProto:
        """Store integers with one scale per channel along `axis`; return the node that dequantizes them to
        `name/read`."""
        parts = {
            "integers": integers,
            "scales": scales,
            "zeros": np.zeros(len(scales), integers.dtype),
        }
        inputs = [self.add_constant(f"{name}/{part}", value) for part, value in parts.items()]
        read = f"{name}/read"
        return helper.make_node("DequantizeLinear", inputs, [read], read, axis=axis)

    def activations(self, node: NodeProto) -> list[str]:
        """Return the computed inputs of a node, in order."""
        return [name for name in node.input if name and name not in self.constants]

    def only_reader(self, name: str) -> NodeProto | None:
        """Return the only consumer of a tensor; None if there are several, or if it is an output."""
        found = self.readers.get(name, [])
        return found[0] if len(found) == 1 and name not in self.outputs else None

    def layers(self) -> Iterator[NodeProto]:
        """Yield the convolutions and matrix products with a constant weight, in graph order."""
        for node in self.proto.node:
            if node.op_type in WEIGHTED_OPS and node.input[1] in self.constants:
                yield node


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Return the value of a node's attribute."""
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def set_attribute(node: NodeProto, name: str, value: Any) -> None:
    """Set or replace a node's attribute."""
    for item in list(node.attribute):
        if item.name == name:
            node.attribute.remove(item)
    node.attribute.append(onnx.helper.make_attribute(name, value))


def output_axis(node: NodeProto, rank: int) -> int:
    """Return the axis of a weight's output channels."""
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return {"Conv": 0, "ConvTranspose": 1}.get(node.op_type, rank - 1)


def channel_rows(weight: NDArray[Any], axis: int) -> NDArray[Any]:
    """Return a weight as `[channels, K]`, its output channels along `axis`."""
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def as_int8(weight: NDArray[Any], scales: NDArray[Any], axis: int) -> NDArray[np.int8]:
    """Quantize a weight to -127…127 with one scale per channel along `axis`."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    steps = np.round(weight / scales.reshape(shape))
    return np.asarray(np.clip(steps, -127, 127), dtype=np.int8)


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[NodeProto]) -> None:
    """Replace the nodes of a graph by `nodes`, which may include existing ones."""
    taken = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(taken)


def rename_input(nodes: Iterable[NodeProto], old: str, new: str) -> None:
    """Rename the input tensor `old` of all nodes to `new`."""
    for node in nodes:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new


def drop_unused(model: onnx.ModelProto) -> None:
    """Remove unused constants, in place."""
    used = {name for node in model.graph.node for name in node.input}
    used |= {output.name for output in model.graph.output}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)


def sorted_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Sort the nodes of `model` topologically, in place, and return it."""
    from onnxruntime.quantization.onnx_model import ONNXModel

    wrapped = ONNXModel(model)
    wrapped.topological_sort()
    result: onnx.ModelProto = wrapped.model
    return result


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of `model` that computes in float16 between its uint8 input and its float32 output.

    It has half the size. ONNX Runtime's CPU kernels convert to float32 and back, 3 to 4 times slower than FP32, so the
    file is for engines that compute in half precision.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # warnings about numbers that round to 0
    try:
        half = convert_float_to_float16(copied(model), keep_io_types=True)
    finally:
        logging.disable(before)
    return sorted_nodes(half)  # the conversion puts the casts around a node in float at the end


def rewrite(source: Path, out: Path, edit: Callable[[onnx.ModelProto], onnx.ModelProto]) -> None:
    """Write an edited ONNX file to `out`, which may be `source`, after ONNX's check."""
    model = edit(onnx.load(source))
    onnx.checker.check_model(model)
    onnx.save(model, out)


def with_resize(model: onnx.ModelProto, preprocess: Preprocess) -> onnx.ModelProto:
    """Return a copy of `model` (uint8 `[batch, size, size, 3]`) that first resizes as `data.resize` does.

    ONNX Runtime's antialiased Resize of uint8 has Pillow's filters and its fixed-point sums: one axis at a time it
    gives Pillow's bytes, but for a rare step of 1 (bicubic) or a few of them (bilinear). Pillow 13 takes the vertical
    axis first where it loses more than twice as many pixels as the other, earlier releases never; the graph follows the
    Pillow that exports. Other interpolations are an `EdgekdError`.
    """
    if preprocess.interpolation not in _FILTERS:
        raise EdgekdError(
            f"The student resizes by {preprocess.interpolation}, which has no exact counterpart in ONNX.",
            "Leave out --resize-in-graph.",
        )
    made = copied(model)
    graph = made.graph
    image = graph.input[0].name
    front = onnx.parser.parse_graph(_resize_text(preprocess))
    front = onnx.compose.add_prefix_graph(front, "edgekd/resize/")
    picture, done = front.input[0].name, front.output[0].name
    rename_input(graph.node, image, done)
    rename_input(front.node, picture, image)
    replace_nodes(graph, [*front.node, *graph.node])
    graph.initializer.extend(front.initializer)
    graph.input[0].CopyFrom(front.input[0])
    graph.input[0].name = image
    return made


def _resize_text(preprocess: Preprocess) -> str:
    """Return the graph from `resize_picture` to `resize_done` in ONNX's text format; sizes are int64 `[1]`."""
    size, crop = preprocess.size, preprocess.resize == "crop"
    how = _FILTERS[preprocess.interpolation] + ', coordinate_transformation_mode = "half_pixel"'
    rows = "Div (short_h, least)" if crop else "Identity (short)"
    columns = "Div (short_w, least)" if crop else "Identity (short)"
    early = "Where (rows_first, w, columns)" if _ROWS_FIRST else "Identity (columns)"
    text = f"""
pixels (uint8[batch, height, width, 3] picture) => (uint8[batch, {size}, {size}, 3] done)
<int64[1] short = {{{round(size / preprocess.crop_pct) if crop else size}}}, int64[1] size = {{{size}}},
 int64[1] zero = {{0}}, int64[1] two = {{2}}, int64[2] axes = {{1, 2}}, int64[4] shape = {{0, {size}, {size}, 3}}>
{{
  h = Shape <start = 1, end = 2> (picture)
  w = Shape <start = 2, end = 3> (picture)
  least = Min (h, w)
  short_h = Mul (short, h)
  short_w = Mul (short, w)
  rows = {rows}
  columns = {columns}
  less_h = Sub (h, rows)
  less_w = Sub (w, columns)
  twice_w = Mul (two, less_w)
  limit = Max (zero, twice_w)
  rows_first = Greater (less_h, limit)
  early = {early}
  a = Resize <axes = [2], {how}> (picture, , , early)
  b = Resize <axes = [1], {how}> (a, , , rows)
  c = Resize <axes = [2], {how}> (b, , , columns)
  over_h = Sub (rows, size)
  over_w = Sub (columns, size)
  half_h = Div (over_h, two)
  half_w = Div (over_w, two)
  odd_h = Mod (half_h, two)
  odd_w = Mod (half_w, two)
  up_h = Add (over_h, odd_h)
  up_w = Add (over_w, odd_w)
  top = Div (up_h, two)
  left = Div (up_w, two)
  bottom = Add (top, size)
  right = Add (left, size)
  starts = Concat <axis = 0> (top, left)
  ends = Concat <axis = 0> (bottom, right)
  cropped = Slice (c, starts, ends, axes)
  done = Reshape (cropped, shape)
}}"""
    return text


def with_float_input(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of `model` (uint8 `[batch, H, W, 3]`) that takes the float32 input of its first layer instead.

    A graph that does anything else with its pixels is an `EdgekdError`.
    """
    cut = copied(model)
    graph = cut.graph
    image = graph.input[0].name
    path, kind = _normalisation(Graph(cut), image)
    gone = {image, *(node.output[0] for node in path)}
    planes = path[-1].output[0]
    batch, height, width, _ = graph.input[0].type.tensor_type.shape.dim
    first = helper.make_tensor_value_info(image, TensorProto.FLOAT, [None, 3, None, None])
    for place, dim in zip((0, 2, 3), (batch, height, width), strict=True):
        first.type.tensor_type.shape.dim[place].CopyFrom(dim)
    graph.input[0].CopyFrom(first)
    for node in path:
        graph.node.remove(node)
    if kind == TensorProto.FLOAT16:
        graph.node.insert(0, helper.make_node("Cast", [image], [planes], "edgekd/to_half", to=kind))
        gone.remove(planes)
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in gone - {image}:
                if name != planes and not _reads_batch(node):
                    raise _unknown(node)
                node.input[place] = image
    drop_unused(cut)
    for info in [info for info in graph.value_info if info.name in gone]:
        graph.value_info.remove(info)
    return cut


def _normalisation(graph: Graph, image: str) -> tuple[list[NodeProto], int]:
    """Return the nodes from the pixels to the normalised planes, and the type of the planes."""
    path: list[NodeProto] = []
    name, kind = image, TensorProto.UINT8
    while not path or path[-1].op_type != "Transpose":
        readers = [node for node in graph.readers[name] if not _reads_batch(node)]
        if len(readers) != 1 or readers[0].op_type not in _NORMALISING:
            raise _unknown(readers[0] if readers else graph.proto.node[0])
        [node] = readers
        if node.op_type == "Cast":
            kind = attribute(node, "to")
        path.append(node)
        name = node.output[0]
    if list(attribute(path[-1], "perm", [])) != [0, 3, 1, 2]:
        raise _unknown(path[-1])
    return path, kind


def _reads_batch(node: NodeProto) -> bool:
    """Return whether a node reads the batch size, which the normalisation does not change."""
    first_axis = attribute(node, "start", 0) == 0 and attribute(node, "end") == 1
    return bool(node.op_type == "Shape" and first_axis)


def _unknown(node: NodeProto) -> EdgekdError:
    return EdgekdError(
        f"The normalisation cannot be removed from this graph because of the {node.op_type} {node.name}.",
        "Leave out --input float.",
    )
