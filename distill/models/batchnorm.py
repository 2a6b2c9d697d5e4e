"""BatchNorm in training: statistics frozen and folded into convolutions.

With fixed statistics, BatchNorm is one factor and one offset per channel, so `bn(conv(x))` is a convolution with scaled
weights and a bias. Outputs and gradients are the same, without reading and writing every activation again. A
mobilenetv3 step at 128 px takes 0.78 of its time (docs/measurements.md). 1×1 convolutions of maps of a few pixels
(squeeze-and-excite, the layer after pooling) are computed as matrix products, since oneDNN takes up to six times as
long for the convolution. Modules and parameters are not changed, only the forward pass.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.layers.conv2d_same import conv2d_same
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.nn.functional import linear

from edgekd.distill.models.depthwise import depthwise_conv2d, is_depthwise

Fold = tuple[nn.Conv2d, nn.BatchNorm2d | None]
"""A convolution and the BatchNorm to fold into its weights, or None for a matrix product without BatchNorm."""
_FEW_PIXELS = 9
"""Pixels of a map up to which a matrix product is faster than oneDNN's 1×1 convolution, in either precision."""


def training_mode(model: nn.Module, *, frozen_bn: bool) -> None:
    """Set training mode; with `frozen_bn`, BatchNorm keeps its statistics, also in frozen parts."""
    model.train()
    if frozen_bn:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def find_folds(model: nn.Module, example: Tensor) -> list[Fold]:
    """Find the convolutions whose output one frozen BatchNorm reads, and nothing else, and matrix products.

    A forward pass of `example`, any input, shows which module reads which output. Returns none where folding would
    change the output.
    """
    made: dict[int, nn.Conv2d] = {}
    alive: list[Tensor] = []  # the id of a freed output could be reused
    calls: dict[nn.Module, int] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    matrices: list[nn.Conv2d] = []

    def after_conv(conv: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        calls[conv] = calls.get(conv, 0) + 1
        made[id(out)] = conv
        if _is_matrix(conv, inputs[0]):
            matrices.append(conv)
        alive.append(out)

    def before_norm(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[norm] = calls.get(norm, 0) + 1
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])], norm))  # type: ignore[arg-type]

    hooks = []
    for module in model.modules():
        if type(module) in (nn.Conv2d, Conv2dSame):
            hooks.append(module.register_forward_hook(after_conv))
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d) and _is_fixed(module):
            hooks.append(module.register_forward_pre_hook(before_norm))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            before = model(example)
    finally:
        for hook in hooks:
            hook.remove()
    folds: list[Fold] = [
        (conv, norm)
        for conv, norm in pairs
        if calls[conv] == calls[norm] == 1 and conv.padding_mode == "zeros"
    ]
    taken = {conv for conv, _ in folds}
    folds += [(conv, None) for conv in dict.fromkeys(matrices) if conv not in taken]
    # Another module may use the output of the convolution, between the two or after the BatchNorm.
    with torch.no_grad(), folded(folds):
        after = model(example)
    model.train(was_training)
    reach = float(before.abs().max())
    # Outputs of weights that are not finite cannot be compared; the loss of the first step stops such a run.
    same = math.isfinite(reach) and torch.allclose(before, after, rtol=1e-3, atol=1e-4 * reach)
    return folds if same else []


def _is_fixed(norm: Any) -> bool:
    return bool(norm.affine and norm.track_running_stats)


@contextlib.contextmanager
def folded(folds: list[Fold]) -> Iterator[None]:
    """Within the block, forward passes skip these BatchNorms and scale the weights of their convolutions instead.

    1×1 convolutions of small maps are computed as matrix products. The BatchNorms must be in eval mode. All four
    parameters get their gradients.
    """
    try:
        for conv, norm in folds:
            conv.__dict__["forward"] = _faster(conv, norm)
            if norm is not None:
                norm.__dict__["forward"] = _activated(norm)
        yield
    finally:
        for pair in folds:
            for module in pair:
                if module is not None:
                    module.__dict__.pop("forward", None)


def _faster(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> Callable[[Tensor], Tensor]:
    """Return the fastest implementation of the convolution with the BatchNorm's factors in its weights."""
    on_cpu = conv.weight.device.type == "cpu"

    def forward(x: Tensor) -> Tensor:
        weight, bias = conv.weight, conv.bias
        if norm is not None:
            assert norm.running_var is not None
            assert norm.running_mean is not None
            factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)  # [C]
            weight = weight * factor[:, None, None, None]
            mean = norm.running_mean if bias is None else norm.running_mean - bias
            bias = norm.bias - mean * factor
        if _is_matrix(conv, x):
            product: Tensor = linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias)
            return product.permute(0, 3, 1, 2)
        if on_cpu and is_depthwise(conv) and bias is not None:
            padding = (0, 0) if isinstance(conv.padding, str) else conv.padding
            if isinstance(conv, Conv2dSame):
                x, padding = pad_same(x, conv.kernel_size, conv.stride), (0, 0)
            return depthwise_conv2d(x, weight, bias, conv.stride, padding)
        if isinstance(conv, Conv2dSame):
            settings: Any = (conv.stride, conv.padding, conv.dilation, conv.groups)
            padded: Tensor = conv2d_same(x, weight, bias, *settings)
            return padded
        out: Tensor = conv._conv_forward(x, weight, bias)
        return out

    return forward


def _is_matrix(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return whether `conv` of `x` `[B, C, H, W]` is a matrix product, and faster as one because of few pixels."""
    plain = conv.kernel_size == conv.stride == (1, 1) and conv.padding in ("valid", "same", (0, 0))
    return plain and conv.groups == 1 and x.shape[2] * x.shape[3] <= _FEW_PIXELS


def _activated(norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    """Return the remaining parts of timm's BatchNorm: dropout and activation."""

    def forward(x: Tensor) -> Tensor:
        activated: Tensor = norm.act(norm.drop(x)) if isinstance(norm, BatchNormAct2d) else x
        return activated

    return forward
