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
from edgekd.targets.agent.store import sha256_of
from edgekd.targets.bank import read_bank
from edgekd.targets.placement import Placement

FORMATS = ("onnx",)
"""Formats of artifacts that the agent runs."""


@dataclass(frozen=True)
class DeviceModel:
    """An artifact, ready to answer."""

    run: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    """uint8 `[1, H, W, 3]` → float32 logits `[1, C]`."""
    prepare: Callable[[bytes], NDArray[np.uint8]]
    """An encoded image → uint8 `[H, W, 3]`."""
    classes: tuple[str, ...]
    provider: str
    threads: int
    load_ms: float
    placement: Callable[[], Placement]
    """Which nodes run where; opens the model once more."""
    embed: Callable[[NDArray[np.uint8]], NDArray[np.float32]] | None = None
    """uint8 `[1, H, W, 3]` → unit vector float32 `[1, D]`, of an artifact that ends in an embedding."""


def open_model(folder: Path, *, threads: int | None) -> DeviceModel:
    """Open an artifact folder with the runtime its format asks for.

    Raises:
        EdgekdError: an altered file, a format without a runtime here, a missing runtime.
    """
    try:
        artifact = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EdgekdError(f"There is no readable artifact at {folder}.", "Name the folder of artifact.json.") from error
    for name, expected in artifact["files"].items():
        if not (folder / name).is_file() or sha256_of(folder / name) != expected:
            raise EdgekdError(f"{folder / name} is not the file that was exported.", "Copy the artifact again.")
    if artifact["format"] not in FORMATS:
        raise EdgekdError(f"The agent cannot run artifacts of the format {artifact['format']}.", "It runs onnx.")
    try:
        from edgekd.targets.onnx_runtime import onnx_placement, open_onnx
    except ImportError as error:
        raise EdgekdError(
            f"The device's Python cannot load onnxruntime ({error}).",
            "On the device: python3 -m pip install onnxruntime, or name a Python that has it.",
        ) from error
    path, size = folder / next(iter(artifact["files"])), artifact["preprocess"]["size"]
    opened = open_onnx(path, threads=threads)
    name, runtime = artifact["inputs"][0]["name"], opened.runtime

    def ask(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        answer: NDArray[np.float32] = runtime.run(None, {name: images})[0]
        return answer

    bank = read_bank(folder / artifact["bank"]) if artifact.get("bank") else None
    return DeviceModel(
        ask if bank is None else lambda images: bank.logits(ask(images)),
        preparing(artifact["preprocess"]),
        tuple(artifact["classes"]),
        opened.provider,
        opened.threads,
        opened.load_ms,
        lambda: onnx_placement(path, np.zeros((1, size, size, 3), dtype=np.uint8)),
        None if bank is None else ask,
    )


def preparing(preprocess: dict[str, Any]) -> Callable[[bytes], NDArray[np.uint8]]:
    """Decode and resize as `artifact.json` says; normalisation is inside the artifact."""
    wanted = {key: preprocess[key] for key in ("size", "resize", "crop_pct", "interpolation")}

    def prepare(encoded: bytes) -> NDArray[np.uint8]:
        try:
            return resize_rgb(decode(encoded), **wanted)
        except UnreadableImage as error:
            raise EdgekdError(
                f"The device's Pillow cannot read an image: {error.reason}.", "Update Pillow there."
            ) from error

    return prepare
