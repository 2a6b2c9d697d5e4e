"""What each operation of a MIL program computes, in float32, by Apple's specification of the operation.

Only the operations that our students are made of. Each function takes the operation's named inputs (tensors, and
constants as Python or numpy values) and gives its output, or a tuple of outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Given = Mapping[str, Any]


def _tensor(given: Given, name: str = "x") -> Tensor:
    value: Tensor = given[name]
    return value


def _ints(value: Any) -> list[int]:
    return [int(item) for item in np.atleast_1d(value)]


def _flat_padding(pads: Sequence[int]) -> list[int]:
    """MIL's begin and end per axis, first axis first → torch's, last axis first."""
    return [pads[2 * axis + end] for axis in reversed(range(len(pads) // 2)) for end in (0, 1)]


def _window_padding(
    given: Given, size: Sequence[int], kernel: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """Begin and end of the two image axes, by `pad_type`."""
    kind = given.get("pad_type", "valid")
    if kind == "custom":
        return _ints(given["pad"])
    if kind == "valid":
        return [0, 0, 0, 0]
    pads = []
    for n, k, stride, dilation in zip(
        size, kernel, _ints(given.get("strides", [1, 1])), dilations, strict=True
    ):
        total = max((-(-n // stride) - 1) * stride + dilation * (k - 1) + 1 - n, 0)
        less = total // 2
        pads += [less, total - less] if kind == "same" else [total - less, less]
    return pads


def _conv(given: Given) -> Tensor:
    x, weight = _tensor(given), _tensor(given, "weight")
    dilations = _ints(given.get("dilations", [1, 1]))
    pads = _window_padding(given, x.shape[2:], weight.shape[2:], dilations)
    if pads[0] == pads[1] and pads[2] == pads[3]:
        padding = (pads[0], pads[2])
    else:
        x, padding = F.pad(x, _flat_padding(pads)), (0, 0)
    strides, groups = _ints(given.get("strides", [1, 1])), int(given.get("groups", 1))
    return F.conv2d(x, weight, given.get("bias"), strides, padding, dilations, groups)


def _max_pool(given: Given) -> Tensor:
    x, kernel = _tensor(given), _ints(given["kernel_sizes"])
    pads = _window_padding(given, x.shape[2:], kernel, [1, 1])
    x = F.pad(x, _flat_padding(pads), value=float("-inf"))
    return F.max_pool2d(
        x,
        kernel,
        _ints(given.get("strides", [1, 1])),
        ceil_mode=bool(given.get("ceil_mode", False)),
    )


def _avg_pool(given: Given) -> Tensor:
    x, kernel = _tensor(given), _ints(given["kernel_sizes"])
    pads, strides = (
        _window_padding(given, x.shape[2:], kernel, [1, 1]),
        _ints(given.get("strides", [1, 1])),
    )
    total = F.avg_pool2d(F.pad(x, _flat_padding(pads)), kernel, strides)
    if not given.get("exclude_padding_from_average", False):
        return total
    return total / F.avg_pool2d(F.pad(torch.ones_like(x), _flat_padding(pads)), kernel, strides)


def _linear(given: Given) -> Tensor:
    return F.linear(given["x"], given["weight"], given.get("bias"))


def _matmul(given: Given) -> Tensor:
    x, y = _tensor(given), _tensor(given, "y")
    x = x.transpose(-1, -2) if given.get("transpose_x", False) else x
    return x @ (y.transpose(-1, -2) if given.get("transpose_y", False) else y)


def _attention(given: Given) -> Tensor:
    query, key, value = (
        _tensor(given, name) for name in ("query", "key", "value")
    )  # [B, heads, N, d]
    scores: Tensor = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if given.get("attn_mask") is not None:
        scores = scores + _tensor(given, "attn_mask")
    weighted: Tensor = scores.softmax(-1) @ value
    return weighted


def _layer_norm(given: Given) -> Tensor:
    x, axes = _tensor(given), _ints(given["axes"])
    centred = x - x.mean(axes, keepdim=True)
    y = (
        centred
        / (centred.square().mean(axes, keepdim=True) + float(given.get("epsilon", 1e-5))).sqrt()
    )
    return _scaled(y, given)


def _batch_norm(given: Given) -> Tensor:
    x = _tensor(given)
    shape = [1, -1] + [1] * (x.ndim - 2)
    deviation = (given["variance"] + float(given.get("epsilon", 1e-5))).sqrt().reshape(shape)
    y = (x - given["mean"].reshape(shape)) / deviation
    return _scaled(
        y, {name: given[name].reshape(shape) for name in ("gamma", "beta") if name in given}
    )


def _scaled(y: Tensor, given: Given) -> Tensor:
    y = y * given["gamma"] if given.get("gamma") is not None else y
    return y + given["beta"] if given.get("beta") is not None else y


def _gelu(given: Given) -> Tensor:
    x, mode = _tensor(given), given.get("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def _reshape(given: Given) -> Tensor:
    x, shape = _tensor(given), _ints(given["shape"])
    return x.reshape([x.shape[axis] if n == 0 else n for axis, n in enumerate(shape)])


def _squeeze(given: Given) -> Tensor:
    x = _tensor(given)
    return x.squeeze(tuple(_ints(given["axes"]))) if given.get("axes") is not None else x.squeeze()


def _expand_dims(given: Given) -> Tensor:
    x, axes = _tensor(given), _ints(given["axes"])
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _split(given: Given) -> tuple[Tensor, ...]:
    x, axis = _tensor(given), int(given["axis"])
    if given.get("split_sizes") is not None:
        return tuple(torch.split(x, _ints(given["split_sizes"]), axis))
    return tuple(x.chunk(int(given["num_splits"]), axis))


def _slice_by_index(given: Given) -> Tensor:
    x = _tensor(given)
    begin, end = _ints(given["begin"]), _ints(given["end"])
    no = [False] * x.ndim
    begin_mask, end_mask, squeeze = (
        given.get(f"{name}_mask", no) for name in ("begin", "end", "squeeze")
    )
    strides = _ints(given.get("stride", [1] * x.ndim))
    index: list[Any] = []
    for axis in range(x.ndim):
        if squeeze[axis]:
            index.append(begin[axis])
        else:
            low = None if begin_mask[axis] else begin[axis]
            index.append(slice(low, None if end_mask[axis] else end[axis], strides[axis]))
    return x[tuple(index)]


def _pad(given: Given) -> Tensor:
    mode = {"constant": "constant", "reflect": "reflect", "replicate": "replicate"}[
        given.get("mode", "constant")
    ]
    pads = _flat_padding(_ints(given["pad"]))
    return F.pad(
        given["x"], pads, mode, float(given.get("constant_val", 0)) if mode == "constant" else None
    )


def _concat(given: Given) -> Tensor:
    if given.get("interleave", False):
        raise NotImplementedError("interleaved concat")
    return torch.cat(tuple(given["values"]), int(given["axis"]))


def _cast(given: Given) -> Tensor:
    x, wanted = _tensor(given), given["dtype"]
    return (
        x.trunc() if wanted.startswith(("int", "uint")) else x
    )  # numbers stay in float32; rounding comes after


def _per_channel(value: Any, like: Tensor, axis: Any) -> Tensor:
    numbers = (
        value.float()
        if isinstance(value, Tensor)
        else torch.as_tensor(np.asarray(value, dtype=np.float32))
    )
    shape = [1] * like.ndim
    if numbers.ndim:
        shape[int(axis)] = -1
    return numbers.reshape(shape)


def _quantize(given: Given) -> Tensor:
    x, axis = _tensor(given, "input"), given.get("axis", 0)
    low, high = (-128, 127) if given["output_dtype"] == "int8" else (0, 255)
    zero = _per_channel(given.get("zero_point", 0), x, axis)
    return (torch.round(x / _per_channel(given["scale"], x, axis)) + zero).clamp(low, high)


def _dequantize(given: Given) -> Tensor:
    x, axis = _tensor(given, "input"), given.get("axis", 0)
    return (x - _per_channel(given.get("zero_point", 0), x, axis)) * _per_channel(
        given["scale"], x, axis
    )


def _reduce(function: Callable[..., Tensor]) -> Callable[[Given], Tensor]:
    def reduced(given: Given) -> Tensor:
        x = _tensor(given)
        axes = _ints(given["axes"]) if given.get("axes") is not None else list(range(x.ndim))
        return function(x, axes, keepdim=bool(given.get("keep_dims", False)))

    return reduced


def _of_x(function: Callable[[Tensor], Tensor]) -> Callable[[Given], Tensor]:
    return lambda given: function(given["x"])


def _of_both(function: Callable[[Any, Any], Tensor]) -> Callable[[Given], Tensor]:
    return lambda given: function(given["x"], given["y"])


OPS: dict[str, Callable[[Given], Tensor | tuple[Tensor, ...]]] = {
    "add": _of_both(lambda x, y: x + y),
    "avg_pool": _avg_pool,
    "batch_norm": _batch_norm,
    "cast": _cast,
    "clip": lambda given: given["x"].clamp(float(given["alpha"]), float(given["beta"])),
    "concat": _concat,
    "conv": _conv,
    "dequantize": _dequantize,
    "expand_dims": _expand_dims,
    "gelu": _gelu,
    "identity": _of_x(lambda x: x),
    "layer_norm": _layer_norm,
    "linear": _linear,
    "matmul": _matmul,
    "max_pool": _max_pool,
    "mul": _of_both(lambda x, y: x * y),
    "pad": _pad,
    "pow": _of_both(lambda x, y: x**y),
    "quantize": _quantize,
    "real_div": _of_both(lambda x, y: x / y),
    "reduce_l2_norm": _reduce(
        lambda x, axes, keepdim: torch.linalg.vector_norm(x, dim=axes, keepdim=keepdim)
    ),
    "reduce_mean": _reduce(torch.mean),
    "reduce_sum": _reduce(torch.sum),
    "relu": _of_x(torch.relu),
    "relu6": _of_x(F.relu6),
    "reshape": _reshape,
    "scaled_dot_product_attention": _attention,
    "sigmoid": _of_x(torch.sigmoid),
    "sigmoid_hard": lambda given: (given["x"] * float(given["alpha"]) + float(given["beta"])).clamp(
        0, 1
    ),
    "silu": _of_x(F.silu),
    "slice_by_index": _slice_by_index,
    "softmax": lambda given: given["x"].softmax(int(given.get("axis", -1))),
    "split": _split,
    "sqrt": _of_x(torch.sqrt),
    "square": _of_x(torch.square),
    "squeeze": _squeeze,
    "sub": _of_both(lambda x, y: x - y),
    "thresholded_relu": lambda given: torch.where(
        given["x"] >= float(given["alpha"]), given["x"], 0.0
    ),
    "transpose": lambda given: given["x"].permute(_ints(given["perm"])),
}
"""MIL operation → what it computes."""
