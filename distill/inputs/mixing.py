"""Mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019) as functions of the step.

torchvision and timm draw once per batch from a global generator and pair the images of one process. Here the pairs are
drawn for the global batch, so that resumed runs and any number of processes mix the same images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_KEY = 2**33
"""Offset of the seeds, to differ from those of the samplers, which are up to 2³² + 2³¹."""


@dataclass(frozen=True)
class Mixing:
    """Mixing of the images of a batch.

    Args:
        mixup: α; the image's own share of every pixel is drawn from Beta(α, α). 0 turns it off.
        cutmix: α; the area of the partner's box is drawn from Beta(α, α). 0 turns it off. With both, each image uses
            one of them with equal probability.
        side: side of the views in pixels.
    """

    mixup: float
    cutmix: float
    side: int
    seed: int

    def draw(self, step: int, batch: int) -> tuple[NDArray[np.int64], Tensor]:
        """Draw the mixing of a global batch.

        Returns:
            The index of each image's partner (a permutation), int64 `[batch]`, and the share of the own image at every
            pixel, float32 `[batch, 1, S, S]` in 0–1.
        """
        rng = np.random.Generator(np.random.Philox(key=[self.seed + _KEY, step]))
        partners = rng.permutation(batch)
        weights = torch.ones(batch, 1, self.side, self.side)
        for row in range(batch):
            cut = rng.random() < (0.5 if self.mixup else 1.0) and bool(self.cutmix)
            alpha = self.cutmix if cut else self.mixup
            part = float(rng.beta(alpha, alpha))
            if cut:
                length = math.sqrt(1 - part) * self.side
                (top, bottom), (left, right) = (self._span(rng.random(), length) for _ in range(2))
                weights[row, :, top:bottom, left:right] = 0.0
            else:
                weights[row] = part
        return partners, weights

    def _span(self, centre: float, length: float) -> tuple[int, int]:
        """Return the pixel range of a span of `length` around `centre` (0–1), clipped to the image."""
        first, last = centre * self.side - length / 2, centre * self.side + length / 2
        return max(0, round(first)), min(self.side, round(last))
