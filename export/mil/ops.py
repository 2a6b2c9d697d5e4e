"""Operations of MIL programs in float32, by Apple's specification.

They cover the operations of our students. The parameters of a function are the operation's inputs, with the names and
defaults of the specification: tensors, and constants as Python or numpy values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_ONES = (1, 1)


def _ints(value: Any) -> list[int]:
    return [int(item) for item in np.atleast_1d(value)]


def _flat_padding(pads: Sequence[int]) -> list[int]:
    """Convert MIL's begin and end per axis (first axis first) to torch's (last axis first)."""
    return [pads[2 * axis + end] for axis in reversed(range(len(pads) // 2)) for end in (0, 1)]


def _window_padding(
    x: Tensor, kernel: Sequence[int], strides: Any, pad_type: str, pad: Any, dilations: Any = _ONES
) -> list[int]:
    """Return begin and end padding of the two image axes for `pad_type`."""
    if pad_type == "custom":
        return _ints(pad)
    if pad_type == "valid":
        return [0, 0, 0, 0]
    pads = []
    windows = zip(x.shape[2:], kernel, _ints(strides), _ints(dilations), strict=True)
    for n, k, stride, dilation in windows:
        total = max((-(-n // stride) - 1) * stride + dilation * (k - 1) + 1 - n, 0)
        less = total // 2
        pads += [less, total - less] if pad_type == "same" else [total - less, less]
    return pads


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Any = _ONES,
    pad_type: str = "valid",
    pad: Any = (),
    dilations: Any = _ONES,
    groups: int = 1,
) -> Tensor:
    pads = _window_padding(x, weight.shape[2:], strides, pad_type, pad, dilations)
    padding = (pads[0], pads[2])
    if pads[0] != pads[1] or pads[2] != pads[3]:
        x, padding = F.pad(x, _flat_padding(pads)), (0, 0)
    return F.conv2d(x, weight, bias, _ints(strides), padding, _ints(dilations), int(groups))


def max_pool(
    x: Tensor,
    kernel_sizes: Any,
    strides: Any = _ONES,
    pad_type: str = "valid",
    pad: Any = (),
    ceil_mode: bool = False,
) -> Tensor:
    kernel = _ints(kernel_sizes)
    pads = _flat_padding(_window_padding(x, kernel, strides, pad_type, pad))
    x = F.pad(x, pads, value=float("-inf"))
    return F.max_pool2d(x, kernel, _ints(strides), ceil_mode=bool(ceil_mode))


def avg_pool(
    x: Tensor,
    kernel_sizes: Any,
    strides: Any = _ONES,
    pad_type: str = "valid",
    pad: Any = (),
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    if ceil_mode:
        raise NotImplementedError("ceil_mode of avg_pool")
    kernel = _ints(kernel_sizes)
    pads = _flat_padding(_window_padding(x, kernel, strides, pad_type, pad))

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(values, pads), kernel, _ints(strides))

    return mean(x) / mean(torch.ones_like(x)) if exclude_padding_from_average else mean(x)


def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    x = x.transpose(-1, -2) if transpose_x else x
    return x @ (y.transpose(-1, -2) if transpose_y else y)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:  # [B, heads, N, d]; torch's function has no rule for vmap
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    weights: Tensor = (scores if attn_mask is None else scores + attn_mask).softmax(-1)
    return weights @ value


def layer_norm(
    x: Tensor, axes: Any, gamma: Any = None, beta: Any = None, epsilon: float = 1e-5
) -> Tensor:
    centred = x - x.mean(_ints(axes), keepdim=True)
    variance = centred.square().mean(_ints(axes), keepdim=True)
    y = centred / (variance + epsilon).sqrt()
    y = y if gamma is None else y * gamma
    return y if beta is None else y + beta


def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    y: Tensor = F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")
    return y


def reshape(x: Tensor, shape: Any) -> Tensor:
    return x.reshape([x.shape[axis] if n == 0 else n for axis, n in enumerate(_ints(shape))])


def squeeze(x: Tensor, axes: Any = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(_ints(axes)))


def expand_dims(x: Tensor, axes: Any) -> Tensor:
    axes = _ints(axes)
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Any = None
) -> tuple[Tensor, ...]:
    if split_sizes is not None:
        return tuple(torch.split(x, _ints(split_sizes), int(axis)))
    return tuple(x.chunk(int(num_splits or 1), int(axis)))


def slice_by_index(
    x: Tensor,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Tensor:
    no = [False] * x.ndim
    starts, ends, steps = (
        _ints(begin),
        _ints(end),
        _ints([1] * x.ndim if stride is None else stride),
    )
    from_start, to_end, single = (
        no if mask is None else mask for mask in (begin_mask, end_mask, squeeze_mask)
    )
    index: list[Any] = []
    for axis in range(x.ndim):
        low = None if from_start[axis] else starts[axis]
        high = None if to_end[axis] else ends[axis]
        index.append(starts[axis] if single[axis] else slice(low, high, steps[axis]))
    return x[tuple(index)]


def pad(x: Tensor, pad: Any, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    if mode not in ("constant", "reflect", "replicate"):
        raise NotImplementedError(f"padding by {mode}")
    return F.pad(x, _flat_padding(_ints(pad)), mode, constant_val if mode == "constant" else None)


def concat(values: Sequence[Tensor], axis: int, interleave: bool = False) -> Tensor:
    if interleave:
        raise NotImplementedError("interleaved concat")
    return torch.cat(tuple(values), int(axis))


def cast(x: Tensor, dtype: str) -> Tensor:
    """Return the numbers in float32; the evaluator rounds them to the declared type."""
    return x.trunc() if dtype.startswith(("int", "uint")) else x


def quantize(
    input: Tensor, scale: Any, output_dtype: str, zero_point: Any = 0, axis: int = 0
) -> Tensor:
    low, high = (-128, 127) if output_dtype == "int8" else (0, 255)
    zero = _per_channel(zero_point, input, axis)
    return (torch.round(input / _per_channel(scale, input, axis)) + zero).clamp(low, high)


def dequantize(input: Tensor, scale: Any, zero_point: Any = 0, axis: int = 0) -> Tensor:
    return (input - _per_channel(zero_point, input, axis)) * _per_channel(scale, input, axis)


def _per_channel(value: Any, like: Tensor, axis: int) -> Tensor:
    numbers = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value, np.float32))
    shape = [1] * like.ndim
    if numbers.ndim:
        shape[int(axis)] = -1
    return numbers.float().reshape(shape)


def _reduce(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduced(x: Tensor, axes: Any = None, keep_dims: bool = False) -> Tensor:
        over = list(range(x.ndim)) if axes is None else _ints(axes)
        return function(x, dim=over, keepdim=bool(keep_dims))

    return reduced


OPS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "add": lambda x, y: x + y,
    "avg_pool": avg_pool,
    "batch_norm": lambda x, mean, variance, gamma=None, beta=None, epsilon=1e-5: F.batch_norm(
        x, mean, variance, gamma, beta, eps=epsilon
    ),
    "cast": cast,
    "clip": lambda x, alpha, beta: x.clamp(float(alpha), float(beta)),
    "concat": concat,
    "conv": conv,
    "dequantize": dequantize,
    "expand_dims": expand_dims,
    "gelu": gelu,
    "identity": lambda x: x,
    "layer_norm": layer_norm,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": matmul,
    "max_pool": max_pool,
    "maximum": lambda x, y: torch.maximum(x, torch.as_tensor(y, dtype=x.dtype)),
    "mul": lambda x, y: x * y,
    "pad": pad,
    "pow": lambda x, y: x**y,
    "quantize": quantize,
    "real_div": lambda x, y: x / y,
    "reduce_l2_norm": _reduce(torch.linalg.vector_norm),
    "reduce_mean": _reduce(torch.mean),
    "reduce_sum": _reduce(torch.sum),
    "relu": lambda x: x.relu(),
    "relu6": lambda x: F.relu6(x),
    "reshape": reshape,
    "scaled_dot_product_attention": attention,
    "sigmoid": lambda x: x.sigmoid(),
    "sigmoid_hard": lambda x, alpha=0.2, beta=0.5: (x * float(alpha) + float(beta)).clamp(0, 1),
    "silu": lambda x: F.silu(x),
    "slice_by_index": slice_by_index,
    "softmax": lambda x, axis=-1: x.softmax(int(axis)),
    "split": split,
    "sqrt": lambda x: x.sqrt(),
    "square": lambda x: x.square(),
    "squeeze": squeeze,
    "sub": lambda x, y: x - y,
    "thresholded_relu": lambda x, alpha=1.0: torch.where(x >= float(alpha), x, 0.0),
    "tile": lambda x, reps: x.repeat(_ints(reps)),
    "transpose": lambda x, perm: x.permute(_ints(perm)),
    "upsample_nearest_neighbor": lambda x, scale_factor_height=1, scale_factor_width=1: (
        F.interpolate(
            x, scale_factor=(float(scale_factor_height), float(scale_factor_width)), mode="nearest"
        )
    ),
}
"""MIL operation → its implementation."""
