"""An artifact folder, opened without edgekd's manifest reader (which needs pydantic)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import EdgekdError
from edgekd.images import UnreadableImage, decode
from edgekd.resize import resize_rgb
from edgekd.targets.agent.runtimes import open_file
from edgekd.targets.agent.store import sha256_of
from edgekd.targets.bank import read_bank
from edgekd.targets.opened import Ask, Run


@dataclass(frozen=True)
class DeviceModel:
    """An artifact, ready to answer."""

    run: Run
    """uint8 `[B, H, W, 3]` → float32 logits `[B, C]`."""
    prepare: Callable[[bytes], NDArray[np.uint8]]
    """An encoded image → uint8 `[H, W, 3]`."""
    classes: tuple[str, ...]
    provider: str
    threads: int
    load_ms: float
    placement: Ask
    """Which nodes run where; may open the model once more."""
    largest_batch: int | None
    """Images that one call takes at most; None: any number."""
    embed: Run | None = None
    """uint8 `[B, H, W, 3]` → unit vectors float32 `[B, D]`, of an artifact that ends in an embedding."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `artifact.json` in `folder` holds; a folder without a readable one is an `EdgekdError`."""
    try:
        artifact: dict[str, Any] = json.loads(
            (folder / "artifact.json").read_text(encoding="utf-8")
        )
    except (OSError, ValueError) as error:
        raise EdgekdError(
            f"There is no readable artifact at {folder}.", "Name the folder of artifact.json."
        ) from error
    return artifact


def open_model(folder: Path, *, threads: int | None) -> DeviceModel:
    """Open an artifact folder with the runtime its format asks for.

    Raises:
        EdgekdError: an altered file, a format without a runtime here, a missing runtime.
    """
    artifact = read_manifest(folder)
    for name, expected in artifact["files"].items():
        if not (folder / name).is_file() or sha256_of(folder / name) != expected:
            raise EdgekdError(
                f"{folder / name} is not the file that was exported.", "Copy the artifact again."
            )
    opened = open_file(artifact, folder, threads=threads)
    bank = read_bank(folder / artifact["bank"]) if artifact.get("bank") else None
    return DeviceModel(
        opened.run if bank is None else lambda images: bank.logits(opened.run(images)),
        preparing(artifact["preprocess"]),
        tuple(artifact["classes"]),
        opened.provider,
        opened.threads,
        opened.load_ms,
        opened.placement,
        opened.largest_batch,
        None if bank is None else opened.run,
    )


def preparing(preprocess: dict[str, Any]) -> Callable[[bytes], NDArray[np.uint8]]:
    """Decode and resize as `artifact.json` says; what the file takes is made of that when it runs."""
    wanted = {key: preprocess[key] for key in ("size", "resize", "crop_pct", "interpolation")}

    def prepare(encoded: bytes) -> NDArray[np.uint8]:
        try:
            return resize_rgb(decode(encoded), **wanted)
        except UnreadableImage as error:
            raise EdgekdError(
                f"The device's Pillow cannot read an image: {error.reason}.", "Update Pillow there."
            ) from error

    return prepare
