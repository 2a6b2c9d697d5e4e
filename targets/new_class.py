"""A class from a few images of it, by the artifact itself: what a device can do alone."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError
from edgekd.core.readers import printable
from edgekd.data.images import EXTENSIONS, UnreadableImage, read_bytes
from edgekd.targets.bank import ClassBank
from edgekd.targets.bank_change import change_bank


def add_by_images(
    folder: Path, name: str, places: Sequence[Path], embed: Callable[[bytes], NDArray[np.float32]]
) -> ClassBank:
    """Add the class `name` to the artifact in `folder`: the mean of its images' embeddings.

    Args:
        places: images, and folders of images.
        embed: an encoded image → the artifact's embedding of it, float32 `[D]`.

    Raises:
        EdgekdError: no images, one that cannot be read, a class that is there already, an artifact without a bank.
    """
    contents = [content(path) for path in _files(places)]
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    embeddings = np.stack([embed(content) for content in contents])  # [N, D]

    name = printable(name)

    def with_it(bank: ClassBank) -> ClassBank:
        found = recognised(bank, embeddings)
        how = provenance(
            "images", images=digests, **({} if found is None else {"recognised_left_out": found})
        )
        return bank.with_class(name, bank.of_images(embeddings), how)

    return change_bank(folder, with_it)


def recognised(bank: ClassBank, embeddings: NDArray[np.float32]) -> int | None:
    """How many of a new class's images the others of them would name, beside the bank's classes; None for one image.

    Args:
        embeddings: `[N, D]`.
    """
    if len(embeddings) < 2:
        return None
    found = 0
    for left in range(len(embeddings)):
        vector = bank.of_images(np.delete(embeddings, left, axis=0))
        old = bank.logits(embeddings[left : left + 1]).max()
        found += int(bank.logit_scale * float(vector @ embeddings[left]) > old)
    return found


def told(bank: ClassBank) -> str:
    """What the last change means, in a sentence."""
    entry = bank.facts["added"][-1]
    if "recognised_left_out" in entry:
        known, images = entry["recognised_left_out"], len(entry["images"])
        return f"{known} of its {images} images are recognised by the others of them"
    if entry["by"] == "images":
        return "one image makes a poor class; a few more tell how well it is recognised"
    return "a class without images seldom wins against trained ones; measure it on images of it, or add it by some"


def provenance(by: str, **facts: Any) -> dict[str, Any]:
    """Who adds a class, and how: for `added` in a bank's facts."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")  # noqa: UP017  Python 3.9 has no datetime.UTC
    return {"by": by, **facts, "at": now, "on": platform.node()}


def content(path: Path) -> bytes:
    """Return the bytes of an image file; an `EdgekdError` where it is missing, no regular file or too large."""
    try:
        return read_bytes(path)
    except UnreadableImage as error:
        raise EdgekdError(f"{path} cannot be read: {error.reason}.", "Leave it out.") from error


def _files(places: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found += sorted(path for path in place.iterdir() if path.suffix.lower() in EXTENSIONS)
        elif place.is_file():
            found.append(place)
        else:
            raise EdgekdError(
                f"There is no image at {place}.", "Name images, or a folder of images."
            )
    if not found:
        raise EdgekdError(
            f"There are no images in {', '.join(map(str, places)) or 'what was named'}.",
            "Five to twenty will do.",
        )
    return found
