"""The class vectors inside an ONNX graph for a while: for searches that need to see logits."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.numpy_helper

from edgekd.targets.bank import ClassBank

_NODE, _VECTORS, _LOGITS = "edgekd/classes", "edgekd/class_vectors", "logits"


def with_classes(model: onnx.ModelProto, bank: ClassBank) -> onnx.ModelProto:
    """A copy of `model`, whose output is an embedding, that goes on to the logits of `bank`.

    The product is an `Einsum`, which no quantizer touches: the classes stay in float, as beside the file.
    """
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    graph = whole.graph
    [embedding] = [output.name for output in graph.output]
    scaled = np.float32(bank.logit_scale) * bank.vectors
    graph.initializer.append(onnx.numpy_helper.from_array(scaled, _VECTORS))
    graph.node.append(onnx.helper.make_node("Einsum", [embedding, _VECTORS], [_LOGITS], _NODE, equation="bd,cd->bc"))
    graph.value_info.append(graph.output.pop())
    graph.output.append(onnx.helper.make_tensor_value_info(_LOGITS, onnx.TensorProto.FLOAT, ["batch", len(scaled)]))
    return whole


def without_classes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of what became of `with_classes`, ending in the embedding again."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    graph = bare.graph
    [node] = [node for node in graph.node if node.name == _NODE]
    [vectors] = [tensor for tensor in graph.initializer if tensor.name == _VECTORS]
    [embedding] = [info for info in graph.value_info if info.name == node.input[0]]
    del graph.output[:]
    graph.output.append(embedding)
    graph.node.remove(node)
    graph.initializer.remove(vectors)
    graph.value_info.remove(embedding)
    return bare
