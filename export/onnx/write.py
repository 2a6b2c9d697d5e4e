"""Write the deployable graph as one ONNX file with a dynamic batch, and without traces of the local machine."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from edgekd.core.errors import EdgekdError, first_line

OPSET = 20
"""The newest opset supported by the quantizers of ONNX Runtime and NNCF."""
_MAX_BYTES = 2_000_000_000  # protobuf refuses 2 GiB; graph and metadata need some room


class _GlobalMean(nn.Module):
    """Replacement of `AdaptiveAvgPool2d(1)`, which exports as ten shape computations and a Gather."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)  # [B, d, 1, 1]


def export_onnx(
    model: nn.Module, path: Path, *, size: int, metadata: dict[str, str], output: str = "logits"
) -> None:
    """Write `model` to `path`: input `image` uint8 `[batch, size, size, 3]`, output float32 `[batch, …]`.

    `metadata` becomes the file's only `metadata_props`: the exporter's own would carry source paths. An operator
    without ONNX counterpart, and a model beyond ONNX's 2 GB, are an `EdgekdError`.
    """
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if n_bytes > _MAX_BYTES:
        raise EdgekdError(
            f"The model has {n_bytes / 1e9:.1f} GB of weights, but an ONNX file can have at most 2 GB.",
            "Choose a smaller student.",
        )
    plain = _with_plain_pooling(copy.deepcopy(model).cpu().eval())
    inputs = {"image": torch.zeros(2, size, size, 3, dtype=torch.uint8)}
    try:
        proto = to_proto(plain, inputs, output)
    except EdgekdError:
        # Attention within windows: torch's fused attention needs a fixed batch size.
        if not _unfuse_attention(plain):
            raise
        proto = to_proto(plain, inputs, output)
    sizes_from_floats(proto)
    save_checked(proto, path, metadata)


def to_proto(model: nn.Module, inputs: Mapping[str, Tensor], output: str) -> onnx.ModelProto:
    """Return the ONNX graph of `model`, in eval mode, with a free batch and without traces of this machine.

    `inputs` are examples by name, in the order of the model's arguments. An operator without ONNX counterpart is an
    `EdgekdError`.
    """
    try:
        with quiet():
            program = torch.onnx.export(
                model,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=[output],
                dynamic_shapes=({0: "batch"},) * len(inputs),
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise EdgekdError(
            f"The student cannot be written as ONNX: {_cause(error)}",
            "Choose another student, or one built from common layers.",
        ) from error
    assert program is not None  # None only for the legacy exporter
    proto: onnx.ModelProto = program.model_proto
    strip_metadata(proto)
    return proto


def save_checked(proto: onnx.ModelProto, path: Path, metadata: dict[str, str]) -> None:
    """Write a graph that ONNX's checker accepts, with `metadata` as its `metadata_props`."""
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def _unfuse_attention(model: nn.Module) -> bool:
    """Disable fused attention in timm's layers, in place; return whether there were any."""
    fused: list[Any] = [
        module for module in model.modules() if getattr(module, "fused_attn", False)
    ]
    for module in fused:
        setattr(module, "fused_attn", False)  # noqa: B010 - nn.Module declares no such attribute
    return bool(fused)


def sizes_from_floats(proto: onnx.ModelProto) -> None:
    """Read the batch size from the float copy of the image instead of the uint8 input, in place.

    The graph of a transformer reads the batch size to repeat the class token. TensorRT allows a uint8 input to feed
    only a Cast.
    """
    graph = proto.graph
    image = graph.input[0].name
    cast = next(
        (node for node in graph.node if node.op_type == "Cast" and node.input[0] == image), None
    )
    if cast is None:
        return
    for node in graph.node:
        if node.op_type == "Shape" and node.input[0] == image:
            node.input[0] = cast.output[0]
    # It depends only on the input, so it can be moved before all its consumers.
    first = onnx.NodeProto()
    first.CopyFrom(cast)
    graph.node.remove(cast)
    graph.node.insert(0, first)


def strip_metadata(proto: onnx.ModelProto) -> None:
    """Remove every `metadata_props` and `doc_string` of a model, in place, since they have local paths."""
    holders: list[Any] = [proto, *proto.functions]
    for graph in (proto.graph, *proto.functions):
        holders += [*graph.node, *graph.value_info]
    graph = proto.graph
    for holder in (graph, *holders, *graph.input, *graph.output, *graph.initializer):
        del holder.metadata_props[:]
        holder.ClearField("doc_string")


def _with_plain_pooling(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size in (1, (1, 1)):
                setattr(parent, name, _GlobalMean())
    return model


def _cause(error: Exception) -> str:
    """Return the innermost cause in one line, since the exporter's message is very long."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return f"{first_line(cause)}."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the exporter's output, logs and warnings, but not its exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
