"""An ONNX file whose normalisation is left to the program that feeds it: float32 planes in, in place of pixels.

The finished file is changed, not the network: up to the last step pixels go in, so calibration, searches and training
know of no second kind of input. In every precision the normalisation stays in float, ahead of the first layer and of
the first rounding, so what is cut off is the same for all.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from edgekd.core.errors import EdgekdError

_NORMALISING = ("Cast", "Reshape", "Mul", "Add")


def take_floats(path: Path) -> None:
    """Make the ONNX file at `path` take float32 `[batch, 3, H, W]`, normalised; in place, as `with_float_input`."""
    model = with_float_input(onnx.load(path))
    onnx.checker.check_model(model)
    onnx.save(model, path)


def with_float_input(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model`, which takes uint8 `[batch, H, W, 3]`, that takes what its first layer takes, as float32.

    Raises:
        EdgekdError: a graph that does anything else with its pixels.
    """
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    graph = cut.graph
    image = graph.input[0].name
    path, kind = _normalisation(graph, image)
    gone = {image, *(node.output[0] for node in path)}
    planes = path[-1].output[0]
    batch, height, width, _ = graph.input[0].type.tensor_type.shape.dim
    first = onnx.helper.make_tensor_value_info(image, onnx.TensorProto.FLOAT, [None, 3, None, None])
    for place, dim in zip((0, 2, 3), (batch, height, width), strict=True):
        first.type.tensor_type.shape.dim[place].CopyFrom(dim)
    graph.input[0].CopyFrom(first)
    for node in path:
        graph.node.remove(node)
    if kind == onnx.TensorProto.FLOAT16:
        graph.node.insert(
            0, onnx.helper.make_node("Cast", [image], [planes], "edgekd/to_half", to=kind)
        )
        gone.remove(planes)
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in gone - {image}:
                if name != planes and not _asks_for_batch(node):
                    raise _unknown(node)
                node.input[place] = image
    read = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)
    for info in [info for info in graph.value_info if info.name in gone]:
        graph.value_info.remove(info)
    return cut


def _normalisation(graph: onnx.GraphProto, image: str) -> tuple[list[onnx.NodeProto], int]:
    """The nodes from the pixels to the planes, and the planes' type."""
    path: list[onnx.NodeProto] = []
    name, kind = image, onnx.TensorProto.UINT8
    while not path or path[-1].op_type != "Transpose":
        readers = [node for node in graph.node if name in node.input and not _asks_for_batch(node)]
        if len(readers) != 1 or readers[0].op_type not in (*_NORMALISING, "Transpose"):
            raise _unknown(readers[0] if readers else graph.node[0])
        [node] = readers
        if node.op_type == "Cast":
            kind = next(item.i for item in node.attribute if item.name == "to")
        path.append(node)
        name = node.output[0]
    order = next((list(item.ints) for item in path[-1].attribute if item.name == "perm"), [])
    if order != [0, 3, 1, 2]:
        raise _unknown(path[-1])
    return path, kind


def _asks_for_batch(node: onnx.NodeProto) -> bool:
    """Whether a node reads the size of the first axis, which is the same before and after the normalisation."""
    if node.op_type != "Shape":
        return False
    given = {item.name: item.i for item in node.attribute}
    return given.get("start", 0) == 0 and given.get("end") == 1


def _unknown(node: onnx.NodeProto) -> EdgekdError:
    return EdgekdError(
        f"The normalisation cannot be taken out of this graph: {node.op_type} {node.name} is not what follows pixels.",
        "Leave out --input float.",
    )
