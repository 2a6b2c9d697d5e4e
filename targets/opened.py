"""A model file, open in its runtime, whichever it is (the device agent carries this file)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import EdgekdError
from edgekd.targets.placement import Placement

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""RGB uint8 `[B, H, W, 3]` → the file's own output, float32 `[B, …]`."""
Ask = Callable[[], Optional[Placement]]  # noqa: UP045  `Placement | None` is no expression in Python 3.9
"""Asks the runtime which nodes run where; None from runtimes that do not tell."""


@dataclass(frozen=True)
class Opened:
    """A model file in its runtime."""

    run: Run
    provider: str
    """What executes the graph, in the runtime's own words."""
    threads: int
    """Threads within one operator; operators run one after the other."""
    load_ms: float
    """Reading and preparing the model."""
    placement: Ask = lambda: None
    """May open the model once more."""
    largest_batch: int | None = None
    """Images that one call of `run` takes at most; None takes any number."""


def in_pieces(run: Run, images: NDArray[np.uint8], largest: int | None) -> NDArray[np.float32]:
    """What `run` answers for `images` `[B, H, W, 3]`, with at most `largest` of them in a call."""
    if largest is None or len(images) <= largest:
        return run(images)
    return np.concatenate(
        [run(images[start : start + largest]) for start in range(0, len(images), largest)]
    )


def refuse_batch(batch: int, largest: int | None) -> None:
    """Refuse to take the time of a batch that would be run in pieces."""
    if largest is not None and batch > largest:
        images = "one image" if largest == 1 else f"{largest} images"
        raise EdgekdError(
            f"The file is made for {images} at a time, not for {batch}.", "Ask for smaller batches."
        )
