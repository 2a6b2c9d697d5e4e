"""What runs a model, whoever it is: a function from images to answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Evaluate = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""uint8 `[B, H, W, 3]` → logits float32 `[B, C]`, or unit embeddings `[B, D]`."""
_BATCH = 16


def in_batches(evaluate: Evaluate, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What `evaluate` says about any number of images, at least one."""
    return np.concatenate(
        [evaluate(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)]
    )
