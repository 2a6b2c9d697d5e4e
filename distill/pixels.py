"""Decode once: a data set's images as one uint8 array on disk, squash-resized to the side a model needs.

Training reads every image many times; decoding a JPEG costs about as much as a small student's forward pass. The
array is shared between runs, made under a lock, and renamed into place when complete.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from edgekd.core.console import say, warn
from edgekd.core.errors import EdgekdError
from edgekd.core.files import cache_folder, replacing, short_hash
from edgekd.core.readers import map_array
from edgekd.data.image_set import ImageSet, JoinedReader

MAX_BYTES = 8 * 2**30
"""Beyond this an image set is decoded on the fly instead (8 GiB: about 100,000 images at 160 px)."""


@dataclass(frozen=True)
class PixelStore:
    """Random access to squash-resized images.

    `array` is uint8 `[N, side, side, 3]` mapped from disk, or None when images are decoded on the fly. `parts` are the
    stores of the sets that joined images consist of; each set is decoded once, whatever it is joined with.
    """

    images: ImageSet
    side: int
    array: NDArray[np.uint8] | None
    parts: tuple[PixelStore, ...] = ()

    def batch(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return uint8 `[len(indices), side, side, 3]`."""
        if self.parts:
            pixels = np.empty((len(indices), self.side, self.side, 3), dtype=np.uint8)
            first = 0
            for part in self.parts:
                own = (indices >= first) & (indices < first + len(part.images))
                if own.any():
                    pixels[own] = part.batch(indices[own] - first)
                first += len(part.images)
            return pixels
        if self.array is not None:
            return self.array[indices]
        with ThreadPoolExecutor() as pool:
            return np.stack(
                list(pool.map(lambda i: squashed(self.images, int(i), self.side), indices))
            )


def squashed(images: ImageSet, index: int, side: int) -> NDArray[np.uint8]:
    """Image `index` as uint8 `[side, side, 3]`, antialiased, whatever its aspect ratio."""
    return np.asarray(
        images.read(index, draft=2 * side).resize((side, side), Image.Resampling.BICUBIC)
    )


def store_side(size: int) -> int:
    """Side to store for views of `size` pixels: the smallest crop (70 % of the area) is then hardly enlarged."""
    return round(size * 1.2)


def open_store(images: ImageSet, side: int, *, max_bytes: int = MAX_BYTES) -> PixelStore:
    """Open the stored pixels of `images`, decoding them first if nobody has.

    Raises:
        EdgekdError: the cache folder cannot be written or the disk is full.
    """
    if isinstance(images.reader, JoinedReader):
        parts = tuple(open_store(part, side, max_bytes=max_bytes) for part in images.reader.parts)
        return PixelStore(images, side, None, parts)
    shape = (len(images), side, side, 3)
    if int(np.prod(shape)) > max_bytes:
        return PixelStore(images, side, None)
    folder = cache_folder("pixels")
    path = folder / f"{short_hash('pixels-1', str(side), *images.keys)}-{side}px.npy"
    with FileLock(str(path) + ".lock"):
        if path.exists():
            try:
                return PixelStore(images, side, map_array(path, "stored pixels", shape, np.uint8))
            except EdgekdError as error:
                warn(f"{error.message} They are decoded again.")
        _decode_all(images, path, shape)
    return PixelStore(images, side, map_array(path, "stored pixels", shape, np.uint8))


def _decode_all(images: ImageSet, path: Path, shape: tuple[int, int, int, int]) -> None:
    say(
        f"decoding {shape[0]:,} images to {shape[1]} px once ({np.prod(shape) / 2**20:,.0f} MiB in {path.parent})"
    )
    block = max(1, 2**24 // int(np.prod(shape[1:])))
    # Plain writes and not a mapping: on a full disk a mapping kills the process, a write raises.
    with replacing(path) as scratch, open(scratch, "wb") as handle, ThreadPoolExecutor() as pool:
        np.lib.format.write_array_header_1_0(
            handle, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        for start in range(0, shape[0], block):
            rows = pool.map(
                lambda i: squashed(images, i, shape[1]), range(start, min(start + block, shape[0]))
            )
            handle.write(np.stack(list(rows)).tobytes())
