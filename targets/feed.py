"""What a model file is fed: pixels as they are, normalised or in a frame (the device agent carries this file)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError

Feed = Callable[[NDArray[np.uint8]], NDArray[Any]]
"""RGB uint8 `[B, H, W, 3]` → what the file's one input takes."""


def as_pixels(images: NDArray[np.uint8]) -> NDArray[Any]:
    """Return the pixels as they are, for a file that normalises inside."""
    return images


def normalising(mean: Sequence[float], std: Sequence[float]) -> Feed:
    """Return RGB uint8 `[B, H, W, 3]` → float32 `[B, 3, H, W]`, `(value / 255 − mean) / std` of each channel.

    Args:
        mean, std: one per channel, on the 0–1 scale.
    """
    # Products and sums of the graph that normalises inside (export/graph.py), in the same float32.
    deviations, means = np.array(std, dtype=np.float64), np.array(mean, dtype=np.float64)
    scale = (1 / (255 * deviations)).astype(np.float32)  # [3]
    shift = (-means / deviations).astype(np.float32)  # [3]

    def feed(images: NDArray[np.uint8]) -> NDArray[Any]:
        batch, height, width, channels = images.shape
        planes = np.empty((batch, channels, height, width), dtype=np.float32)
        # Plane by plane: six times as fast as one product over a trailing axis of 3 and a transposed copy.
        for c in range(channels):
            np.multiply(images[..., c], scale[c], out=planes[:, c], dtype=np.float32)
            planes[:, c] += shift[c]
        return planes

    return feed


def framed(size: int, short: int) -> Feed:
    """Return what a file that resizes to `short` and crops to `size` is fed.

    Images of `size` × `size` count as resized and cropped already: in a frame of `short` × `short` they come out of the
    file's own resizing and cropping as they are. Others are fed as they are.
    """
    before = round((short - size) / 2)
    after = short - size - before

    def feed(images: NDArray[np.uint8]) -> NDArray[Any]:
        if images.shape[1:3] != (size, size):
            return images
        return np.pad(images, ((0, 0), (before, after), (before, after), (0, 0)))

    return feed


def resizes(taken: Mapping[str, Any]) -> bool:
    """Return whether a file takes pictures of any height and width, by its entry of `inputs` in `artifact.json`."""
    return taken["dtype"] == "uint8" and isinstance(taken["shape"][1], str)


def feed_of(taken: Mapping[str, Any], preprocess: Mapping[str, Any]) -> Feed:
    """Return the feed of an artifact by its entry of `inputs` and its `preprocess`; another dtype: `EdgekdError`."""
    dtype = taken["dtype"]
    if resizes(taken) and preprocess["resize"] == "crop":
        return framed(preprocess["size"], round(preprocess["size"] / preprocess["crop_pct"]))
    if dtype == "uint8":
        return as_pixels
    if dtype == "float32":
        return normalising(preprocess["mean"], preprocess["std"])
    raise EdgekdError(
        f"The artifact takes {dtype}, which is not fed here.", "Use the edgekd that wrote it."
    )
