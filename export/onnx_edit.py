"""Edits of a finished ONNX file: half precision, and an input that other programs normalise.

The finished file is changed, not the network: up to the last step pixels go in, so calibration, searches and training
are the same for both inputs. In every precision the normalisation stays in float, ahead of the first layer and of the
first rounding, so what is cut off is the same for all.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, helper

from edgekd.core.errors import EdgekdError
from edgekd.export.onnx_graph import Graph, attribute, copied, drop_unused, to_half

_NORMALISING = ("Cast", "Reshape", "Mul", "Add", "Transpose")


def to_fp16(fp32: Path, out: Path) -> None:
    """Write `fp32` with half-precision weights and arithmetic; the uint8 input and the float32 logits stay.

    Half the size. ONNX Runtime's CPU kernels convert to float32 and back, 3 to 4 times slower than FP32: the file is
    meant for engines that compute in half precision.
    """
    model = to_half(onnx.load(fp32))
    onnx.checker.check_model(model)
    onnx.save(model, out)


def take_floats(path: Path) -> None:
    """Make the ONNX file at `path` take float32 `[batch, 3, H, W]`, normalised; in place, as `with_float_input`."""
    model = with_float_input(onnx.load(path))
    onnx.checker.check_model(model)
    onnx.save(model, path)


def with_float_input(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of `model`, which takes uint8 `[batch, H, W, 3]`, that takes its first layer's input, as float32.

    Raises:
        EdgekdError: a graph that does anything else with its pixels.
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
    """Return the nodes from the pixels to the planes, and the planes' type."""
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
    """Return whether a node reads the size of the first axis, the same before and after the normalisation."""
    first_axis = attribute(node, "start", 0) == 0 and attribute(node, "end") == 1
    return bool(node.op_type == "Shape" and first_axis)


def _unknown(node: NodeProto) -> EdgekdError:
    return EdgekdError(
        f"The normalisation cannot be taken out of this graph: {node.op_type} {node.name} is not what follows pixels.",
        "Leave out --input float.",
    )
