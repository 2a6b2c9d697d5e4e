"""Depthwise convolutions whose backward pass is fast on a CPU.

oneDNN has a fast weight gradient for depthwise kernels up to 3×3. For larger kernels, and for strided ones in bfloat16,
it uses a reference implementation that is about twenty times slower. Here the gradient of a larger kernel is composed
from those of its 3×3 parts, and strided ones are computed in float32. The reference is slowest for strided kernels with
few output pixels, for which the output gradient is expanded to that of a kernel without stride. The gradients are the
same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

Pair = tuple[int, ...]
_PART = 3
"""Side of the kernels for which oneDNN is fast."""
_FEW = 4
"""Output pixels up to which the gradient of a strided kernel is expanded."""


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Return whether `conv` has one undilated square kernel per channel, of at least 3×3."""
    return (
        not isinstance(conv.padding, str)
        and conv.groups == conv.in_channels == conv.out_channels > 1
        and tuple(conv.dilation) == (1, 1)
        and conv.kernel_size[0] == conv.kernel_size[1] >= _PART
    )


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, stride: Pair, padding: Pair
) -> Tensor:
    """Compute `conv2d` with one kernel per channel, float `[B, C, H, W]` and `[C, 1, k, k]`, in autocast's dtype."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    out: Tensor = _Depthwise.apply(x, weight, bias, stride, padding)
    return out


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        stride: Pair,
        padding: Pair,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return conv2d(x, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dtype, strided = x.dtype, tuple(ctx.stride) != (1, 1)
        out = grads[0].contiguous(memory_format=torch.channels_last)
        if strided and dtype == torch.bfloat16:
            x, weight, out = x.float(), weight.float(), out.float()
        wants_x = ctx.needs_input_grad[0]
        few = strided and out.shape[2] * out.shape[3] <= _FEW
        if weight.shape[-1] == _PART or (strided and not few):
            found = _gradients(ctx.stride, out, x, weight, ctx.padding, (wants_x, True, True))
        else:
            only_x = (wants_x, False, False)
            of_x, _, _ = _gradients(ctx.stride, out, x, weight, ctx.padding, only_x)
            if few:
                out = _spread(ctx, out, x, weight)
            found = (of_x, _weight_gradient(ctx, out, x, weight), out.sum(dim=(0, 2, 3)))
        of_x, of_weight, of_bias = (part if part is None else part.to(dtype) for part in found)
        return of_x, of_weight, of_bias, None, None


def _gradients(
    stride: Pair,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    padding: Pair,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of input, weight and bias as computed by torch."""
    channels = len(weight)
    found: tuple[Tensor | None, Tensor | None, Tensor | None]
    found = torch.ops.aten.convolution_backward(
        out, x, weight, [channels], stride, padding, (1, 1), False, (0, 0), channels, wanted
    )
    return found


def _spread(ctx: Any, out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return the output gradient of the kernel without its stride, zero at the skipped pixels."""
    side, (high, wide), (down, right) = weight.shape[-1], ctx.padding, ctx.stride
    rows, columns = x.shape[2] + 2 * high - side + 1, x.shape[3] + 2 * wide - side + 1
    whole = out.new_zeros(*out.shape[:2], rows, columns).to(memory_format=torch.channels_last)
    whole[:, :, ::down, ::right] = out
    return whole


def _weight_gradient(ctx: Any, out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient `[C, 1, k, k]` of an unstrided kernel from its 3×3 parts, each over its window of the
    input."""
    side, (high, wide) = weight.shape[-1], ctx.padding
    padded = pad(x, [wide, wide, high, high])
    whole, part = torch.empty_like(weight), weight.new_empty(len(weight), 1, _PART, _PART)
    rows, columns = out.shape[2] + _PART - 1, out.shape[3] + _PART - 1
    starts = (*range(0, side - _PART, _PART), side - _PART)
    for top in starts:
        for left in starts:
            window = padded[:, :, top : top + rows, left : left + columns]
            window = window.contiguous(memory_format=torch.channels_last)
            _, found, _ = _gradients((1, 1), out, window, part, (0, 0), (False, True, False))
            assert found is not None
            whole[:, :, top : top + _PART, left : left + _PART] = found
    return whole
