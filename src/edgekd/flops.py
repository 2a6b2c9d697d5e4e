"""How large a torch model is and how much it computes, by torch's own counter."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgekd.benchmark.accuracy import Predict
from edgekd.benchmark.counting import Counted


def count_torch(predict: Predict, module: nn.Module, size: int) -> Counted:
    """Parameters of `module`, and the multiply-accumulates of one answer to an image of `size` × `size` pixels.

    Args:
        predict: uint8 `[1, size, size, 3]` → scores; works with `module`.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(
        False
    )  # one fused operator, which the counter takes for no work at all
    try:
        with FlopCounterMode(display=False) as counter:
            predict(np.zeros((1, size, size, 3), dtype=np.uint8))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    # The counter counts a multiplication and an addition as two.
    return Counted(sum(one.numel() for one in module.parameters()), counter.get_total_flops() // 2)
