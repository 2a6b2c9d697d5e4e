"""The interface of every model: teacher, torch student, exported file (part of the device agent)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Predictor = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""RGB uint8 `[B, H, W, 3]` → float32 logits `[B, C]`, or unit vectors `[B, D]` if the output is an embedding."""


def in_batches(
    predict: Predictor, images: NDArray[np.uint8], most: int | None = 16
) -> NDArray[np.float32]:
    """Return `predict` of images `[B, H, W, 3]`, B ≥ 1, with at most `most` images per call (None: all)."""
    if most is None or len(images) <= most:
        return predict(images)
    return np.concatenate(
        [predict(images[start : start + most]) for start in range(0, len(images), most)]
    )
