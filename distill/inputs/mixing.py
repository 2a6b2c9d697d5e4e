"""Mixed images: mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019), as a function of the step.

The classes of the same name in torchvision and timm draw from a global generator, once a batch, and pair the images of
one process. Here the pairs are those of the global batch, so a resumed run and any number of processes see the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_KEY = 2**33
"""Keeps these numbers apart from the samplers', whose keys are seeds up to 2³² + 2³¹."""


@dataclass(frozen=True)
class Mixing:
    """Which images of a batch are mixed, and how.

    Args:
        mixup: α; a part from Beta(α, α) of every pixel is the image's own. 0 for none.
        cutmix: α; a box of a part from Beta(α, α) of the area is the other image's. 0 for none. With both, each image
            takes one of them, drawn evenly.
        side: of the views in pixels.
    """

    mixup: float
    cutmix: float
    side: int
    seed: int

    def draw(self, step: int, batch: int) -> tuple[NDArray[np.int64], Tensor]:
        """Draw for all images of a global batch.

        Returns:
            The place of each image's partner, a permutation, int64 `[batch]`; and the part of the own image at every
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
        """Return first and last pixel of a span of `length` about `centre` (0–1), cut off at the image's edge."""
        first, last = centre * self.side - length / 2, centre * self.side + length / 2
        return max(0, round(first)), min(self.side, round(last))
