"""Parameters and multiply-accumulates of a torch model, counted by torch's own counter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edgekd.benchmark.measure.counting import Counted
from edgekd.core.predictor import Predictor


def count_torch(predict: Predictor, module: nn.Module, shape: tuple[int, int]) -> Counted:
    """Return parameters of `module`, and the multiply-accumulates of one prediction for an image of `shape` pixels.

    `predict` runs `module`: uint8 `[1, H, W, 3]` → scores.
    """
    parameters = sum(one.numel() for one in module.parameters())
    with _unfused_attention(), FlopCounterMode(display=False) as counter:
        predict(np.zeros((1, *shape, 3), dtype=np.uint8))
    return Counted(parameters, int(counter.get_total_flops()) // 2)  # two operations each


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
