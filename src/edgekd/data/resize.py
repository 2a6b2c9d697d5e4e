"""Image resizing for all measurements. Part of the device agent: only numpy and Pillow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def resize_rgb(
    image: Image.Image, *, size: int, resize: str, crop_pct: float, interpolation: str
) -> NDArray[np.uint8]:
    """Resize an RGB image to uint8 `[size, size, 3]`; the arguments are fields of `Preprocess`."""
    resampling = _RESAMPLING[interpolation]
    if resize == "squash":
        resized = image.resize((size, size), resampling)
    else:
        # torchvision's Resize truncates the long side, and its CenterCrop rounds the margin.
        short = round(size / crop_pct)
        width, height = (int(short * side / min(image.size)) for side in image.size)
        resized = image.resize((width, height), resampling)
        left, top = round((width - size) / 2), round((height - size) / 2)
        resized = resized.crop((left, top, left + size, top + size))
    return np.asarray(resized, dtype=np.uint8)
