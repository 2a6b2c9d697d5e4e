"""Parameters and multiply-accumulates of a torch model, counted by torch's own counter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from edgekd.benchmark.measure.counting import Counted
from edgekd.core.predictor import Predictor


def count_torch(predict: Predictor, module: nn.Module, shape: tuple[int, int]) -> Counted:
    """Return parameters of `module`, and the multiply-accumulates of one prediction for an image of `shape` pixels.

    Args:
        predict: uint8 `[1, H, W, 3]` → scores. It runs `module`.
        shape: height and width.

    Returns:
        The counts. `macs` is None on a torch version whose counter gives a wrong number for known layers.
    """
    parameters = sum(one.numel() for one in module.parameters())
    if not counter_is_right():
        return Counted(parameters, None)
    return Counted(parameters, _macs(lambda: predict(np.zeros((1, *shape, 3), dtype=np.uint8))))


@functools.cache
def counter_is_right() -> bool:
    """Return whether torch's counter gives the hand-computed numbers for the layers that students are made of."""
    tokens, image = torch.zeros(1, 16, 8), torch.zeros(1, 4, 6, 6)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    encoder = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True).eval()
    grouped, linear = nn.Conv2d(4, 8, 3, groups=2), nn.Linear(8, 5)
    heads = torch.zeros(1, 2, 16, 4)
    projections, products = 4 * 16 * 8 * 8, 2 * 16 * 16 * 8
    cases: tuple[tuple[Callable[[], object], int], ...] = (
        (lambda: attention(tokens, tokens, tokens, need_weights=False), projections + products),
        (lambda: encoder(tokens), projections + products + 2 * 16 * 8 * 32),
        (lambda: scaled_dot_product_attention(heads, heads, heads), products),
        (lambda: heads @ heads.transpose(-2, -1), 16 * 16 * 8),
        (lambda: grouped(image), 8 * 4 * 4 * 2 * 9),
        (lambda: linear(tokens), 16 * 8 * 5),
    )
    with torch.inference_mode():
        return all(_macs(run) == expected for run, expected in cases)


def _macs(run: Callable[[], object]) -> int:
    with _unfused_attention(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops()) // 2  # one multiply-accumulate is two operations


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Compute attention by plain matrix products: the counter has no formula for some fused kernels."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
