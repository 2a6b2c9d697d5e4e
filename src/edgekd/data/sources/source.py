"""The readable images of a source, and their readers for files and packed images.

WebDataset shards (`shards/{000..127}.tar`) and Hugging Face `datasets` are read once, sequentially, to decode and hash
every image. The index is cached for later runs, and images are then read individually by offset.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgekd.core.console import Tally
from edgekd.core.errors import EdgekdError
from edgekd.data.images import UnreadableImage, decode
from edgekd.data.sources.scan import Entry, shown


@dataclass(frozen=True)
class FileReader:
    """Reads the i-th file below `root`; raises `EdgekdError` if it is no longer readable."""

    root: Path
    paths: tuple[str, ...]

    def __call__(self, index: int, draft: int | None = None) -> Image.Image:
        path = self.root / self.paths[index]
        try:
            return decode(path, draft=draft)
        except UnreadableImage as error:
            raise EdgekdError(
                f"{shown(str(path))} was readable when the run began and no longer is: {error.reason}.",
                "Restore the file, or start again without it.",
            ) from error


@dataclass(frozen=True, eq=False)
class PackedReader:
    """Reads the i-th image of a packed source; picklable and thread-safe.

    Attributes:
        content: row in the source → the image's encoded bytes.
        rows: int64 `[N]`, row of each image.
    """

    content: Callable[[int], bytes]
    rows: NDArray[np.int64]
    source: str

    def __call__(self, index: int, draft: int | None = None) -> Image.Image:
        row = int(self.rows[index])
        try:
            return decode(self.content(row), draft=draft)
        except UnreadableImage as error:
            raise EdgekdError(
                f"Image {row} of {self.source} was readable when the run began and no longer is: {error.reason}.",
                "Restore the source, or start again.",
            ) from error


@dataclass(frozen=True)
class Source:
    """The readable images of a source, in its order."""

    name: str
    """Short name for reports."""
    entries: tuple[Entry, ...]
    keys: tuple[str, ...]
    """32 hex digits of each image's content hash."""
    reader: FileReader | PackedReader
    root: Path | None = None
    """Folder that may hold `classes.txt`."""
    left_out: Tally = field(default_factory=Tally)
