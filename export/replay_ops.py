"""The ONNX operations of exported students in torch, with gradients: what a fake-quantized network is replayed with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.errors import EdgekdError

Attributes = Mapping[str, Any]
Inputs = Sequence[Tensor | None]


def unsupported(what: str) -> EdgekdError:
    """`what`, of this student, cannot be replayed in training."""
    return EdgekdError(
        f"Quantization-aware training does not know {what} of this student.",
        "Export it without --qat; --max-drop-id and --max-drop-ood keep layers in float instead.",
    )


def _ints(value: Tensor | None) -> list[int]:
    assert value is not None
    return [int(number) for number in value.reshape(-1)]


def _pads(
    x: Tensor, given: Attributes, *, dims: int, value: float
) -> tuple[Tensor, int | list[int]]:
    """`x` padded where the two sides differ, and the padding that torch's own operation may do."""
    pads = list(given.get("pads") or [0] * 2 * dims)
    first, last = pads[:dims], pads[dims:]
    if first == last:
        return x, first
    flat = [
        n
        for before, after in zip(reversed(first), reversed(last), strict=True)
        for n in (before, after)
    ]
    return F.pad(x, flat, value=value), [0] * dims


def _conv(inputs: Inputs, given: Attributes) -> Tensor:
    x, weight, bias = inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None
    assert x is not None
    assert weight is not None
    if weight.ndim != 4 or given.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise unsupported("a Conv that is not two-dimensional or pads by itself")
    x, padding = _pads(x, given, dims=2, value=0.0)
    strides, dilations = given.get("strides", [1, 1]), given.get("dilations", [1, 1])
    out: Tensor = F.conv2d(x, weight, bias, strides, padding, dilations, given.get("group", 1))
    return out


def _gemm(inputs: Inputs, given: Attributes) -> Tensor:
    a, b, c = inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None
    assert a is not None
    assert b is not None
    out: Tensor = (
        (a.T if given.get("transA") else a)
        @ (b.T if given.get("transB") else b)
        * given.get("alpha", 1.0)
    )
    return out if c is None else out + given.get("beta", 1.0) * c


def _pool(maximum: bool) -> Callable[[Inputs, Attributes], Tensor]:
    def pooled(inputs: Inputs, given: Attributes) -> Tensor:
        (x,) = inputs
        assert x is not None
        kernel, strides = given["kernel_shape"], given.get("strides", [1, 1])
        ceil = bool(given.get("ceil_mode", 0))
        if given.get("auto_pad", b"NOTSET") != b"NOTSET" or any(
            n != 1 for n in given.get("dilations", [1, 1])
        ):
            raise unsupported(
                f"a {'MaxPool' if maximum else 'AveragePool'} that is dilated or pads by itself"
            )
        if maximum:
            x, padding = _pads(x, given, dims=2, value=float("-inf"))
            return F.max_pool2d(x, kernel, strides, padding, ceil_mode=ceil)
        x, padding = _pads(x, given, dims=2, value=0.0)
        counted = bool(given.get("count_include_pad", 0)) or padding == [0, 0]
        return F.avg_pool2d(x, kernel, strides, padding, ceil_mode=ceil, count_include_pad=counted)

    return pooled


def _reduce_mean(inputs: Inputs, given: Attributes) -> Tensor:
    x = inputs[0]
    assert x is not None
    axes = _ints(inputs[1]) if len(inputs) > 1 else list(given.get("axes", range(x.ndim)))
    return x.mean(axes, keepdim=bool(given.get("keepdims", 1)))


def _reshape(inputs: Inputs, given: Attributes) -> Tensor:
    x, shape = inputs[0], _ints(inputs[1])
    assert x is not None
    if not given.get("allowzero", 0):
        shape = [x.shape[axis] if n == 0 else n for axis, n in enumerate(shape)]
    return x.reshape(shape)


def _slice(inputs: Inputs, given: Attributes) -> Tensor:
    x, starts, ends = inputs[0], _ints(inputs[1]), _ints(inputs[2])
    assert x is not None
    axes = (
        _ints(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else list(range(len(starts)))
    )
    steps = _ints(inputs[4]) if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    if any(step < 1 for step in steps):
        raise unsupported("a Slice that runs backwards")
    index: list[slice] = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = slice(
            *slice(start, end, step).indices(x.shape[axis])
        )  # "to the end" is more than torch takes
    return x[tuple(index)]


def _split(inputs: Inputs, given: Attributes) -> tuple[Tensor, ...]:
    x = inputs[0]
    assert x is not None
    axis = given.get("axis", 0)
    if len(inputs) > 1:
        return torch.split(x, _ints(inputs[1]), dim=axis)
    return torch.chunk(x, given["num_outputs"], dim=axis)


def _gather(inputs: Inputs, given: Attributes) -> Tensor:
    x, index = inputs
    assert x is not None
    assert index is not None
    axis = given.get("axis", 0) % x.ndim
    picked = x.index_select(axis, index.reshape(-1))
    return picked.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _unsqueeze(inputs: Inputs, given: Attributes) -> Tensor:
    x, axes = inputs[0], _ints(inputs[1])
    assert x is not None
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(inputs: Inputs, given: Attributes) -> Tensor:
    x = inputs[0]
    assert x is not None
    return x.squeeze(tuple(_ints(inputs[1]))) if len(inputs) > 1 else x.squeeze()


def _clip(inputs: Inputs, given: Attributes) -> Tensor:
    x, low, high = (*inputs, None, None)[:3]
    assert x is not None
    return x.clamp(None if low is None else float(low), None if high is None else float(high))


def _layer_norm(inputs: Inputs, given: Attributes) -> Tensor:
    x, weight, bias = (*inputs, None)[:3]
    assert x is not None
    return F.layer_norm(
        x, x.shape[given.get("axis", -1) :], weight, bias, given.get("epsilon", 1e-5)
    )


def _of_one(function: Callable[[Tensor], Tensor]) -> Callable[[Inputs, Attributes], Tensor]:
    return lambda inputs, given: function(_first(inputs))


def _of_two(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs, Attributes], Tensor]:
    return lambda inputs, given: function(_first(inputs), _first(inputs[1:]))


def _first(inputs: Inputs) -> Tensor:
    value = inputs[0]
    assert value is not None
    return value


OPS: dict[str, Callable[[Inputs, Attributes], Tensor | tuple[Tensor, ...]]] = {
    "Add": _of_two(torch.add),
    "AveragePool": _pool(False),
    "Clip": _clip,
    "Concat": lambda inputs, given: torch.cat(
        [part for part in inputs if part is not None], given["axis"]
    ),
    "Conv": _conv,
    "Div": _of_two(torch.div),
    "Erf": _of_one(torch.erf),
    "Expand": lambda inputs, given: _first(inputs).expand(
        np.broadcast_shapes(_first(inputs).shape, tuple(_ints(inputs[1])))
    ),
    "Flatten": lambda inputs, given: _first(inputs).flatten(given.get("axis", 1)),
    "Gather": _gather,
    "Gelu": lambda inputs, given: F.gelu(
        _first(inputs), approximate=given.get("approximate", b"none").decode()
    ),
    "Gemm": _gemm,
    "GlobalAveragePool": _of_one(lambda x: x.mean((2, 3), keepdim=True)),
    "HardSigmoid": lambda inputs, given: (
        _first(inputs) * given.get("alpha", 0.2) + given.get("beta", 0.5)
    ).clamp(0, 1),
    "HardSwish": _of_one(F.hardswish),
    "Identity": _of_one(lambda x: x),
    "LayerNormalization": _layer_norm,
    "MatMul": _of_two(torch.matmul),
    "MaxPool": _pool(True),
    "Mul": _of_two(torch.mul),
    "ReduceMean": _reduce_mean,
    "Relu": _of_one(torch.relu),
    "Reshape": _reshape,
    "Shape": lambda inputs, given: torch.tensor(
        _first(inputs).shape[given.get("start", 0) : given.get("end")]
    ),
    "Sigmoid": _of_one(torch.sigmoid),
    "Slice": _slice,
    "Softmax": lambda inputs, given: _first(inputs).softmax(given.get("axis", -1)),
    "Split": _split,
    "Sqrt": _of_one(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _of_two(torch.sub),
    "Tanh": _of_one(torch.tanh),
    "Transpose": lambda inputs, given: _first(inputs).permute(given["perm"]),
    "Unsqueeze": _unsqueeze,
}
"""ONNX operation → what it computes of its inputs and attributes."""
