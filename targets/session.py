"""An exported artifact, opened and ready to run, whatever its runtime; never torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import EdgekdError
from edgekd.manifest import Artifact, read_artifact
from edgekd.targets.placement import Placement

OPENERS = {
    "onnx": "edgekd.targets.ort:open_onnx",
    "openvino": "edgekd.targets.ov:open_openvino",
    "tensorrt": "edgekd.targets.trt:open_tensorrt",
    "coreml": "edgekd.targets.coreml:open_coreml",
}
"""Format → function `(artifact, folder, *, threads, spinning) -> Session`; imported when a file asks for it."""


@dataclass(frozen=True)
class Session:
    """A loaded artifact. Make one with `open_session`."""

    artifact: Artifact
    provider: str
    """What executes the graph, in the runtime's own words."""
    threads: int
    """Threads within one operator; operators run one after the other."""
    load_ms: float
    """Reading and preparing the model, without the check of its hash."""
    predict: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    """The runtime's call, unchecked."""
    placement: Callable[[], Placement | None] = lambda: None
    """Asks the runtime which nodes run where; None from runtimes that do not tell. May open the model once more."""

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """RGB uint8 `[B, H, W, 3]` → float32 logits `[B, C]`.

        Raises:
            EdgekdError: another dtype or another shape than the artifact's input.
        """
        size = self.artifact.preprocess.size
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3) or len(images) == 0:
            raise EdgekdError(
                f"{self.artifact.name} takes uint8 [B, {size}, {size}, 3], not {images.dtype} {list(images.shape)}.",
                "Prepare the images with the artifact's preprocess.",
            )
        return self.predict(images)


def open_session(
    folder: Path,
    *,
    threads: int | None = None,
    check_hashes: bool = True,
    spinning: bool = True,
    provider: str | None = None,
) -> Session:
    """Load the artifact in `folder` with the runtime of its format.

    Args:
        threads: threads within one operator; None is the runtime's choice.
        check_hashes: False skips the comparison of each file with its SHA-256, for repeated loads of a checked folder.
        spinning: waiting threads poll, ONNX Runtime's default: the lowest latency on a quiet machine. False lets them
            sleep, for work beside other work. Runtimes without such a choice ignore it.
        provider: for ONNX files, who executes them: `cpu`, `cuda`, `tensorrt` or `tensorrt-rtx`; None is the format's
            own default. Nothing else is ever used in its place.

    Raises:
        EdgekdError: not an artifact, a format that cannot run here, an altered or corrupt file, a file that the
            runtime refuses, or a runtime that would fall back to another device.
    """
    folder = Path(folder)
    if threads is not None and threads < 1:
        raise EdgekdError(f"{threads} threads are not possible.", "Give 1 or more.")
    artifact = read_artifact(folder, check_hashes=check_hashes)
    if artifact.format not in OPENERS:
        raise EdgekdError(
            f"The artifact at {folder} has the format {artifact.format}, which edgekd cannot run.",
            f"It runs {', '.join(OPENERS)}.",
        )
    chosen = {} if provider is None else {"provider": provider}
    if chosen and artifact.format != "onnx":
        raise EdgekdError(f"The format {artifact.format} has one runtime and no providers.", "Leave the provider out.")
    module, _, function = OPENERS[artifact.format].partition(":")
    session: Session = getattr(importlib.import_module(module), function)(
        artifact, folder, threads=threads, spinning=spinning, **chosen
    )
    return session
