"""An exported artifact, opened and ready to run: numpy and ONNX Runtime only, never torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgekd.errors import EdgekdError
from edgekd.manifest import Artifact, read_artifact
from edgekd.targets.onnx_runtime import open_onnx


@dataclass(frozen=True)
class Session:
    """A loaded artifact. Make one with `open_session`."""

    artifact: Artifact
    provider: str
    threads: int
    """Threads within one operator; operators run one after the other."""
    load_ms: float
    """Reading and preparing the model, without the check of its hash."""
    _runtime: onnxruntime.InferenceSession

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
        logits: NDArray[np.float32] = self._runtime.run(None, {self.artifact.inputs[0].name: images})[0]
        return logits


def open_session(
    folder: Path, *, threads: int | None = None, check_hashes: bool = True, spinning: bool = True
) -> Session:
    """Load the artifact in `folder` on the CPU.

    Args:
        threads: threads within one operator; None is ONNX Runtime's choice, the physical cores.
        check_hashes: False skips the comparison of each file with its SHA-256, for repeated loads of a checked folder.
        spinning: waiting threads poll, ONNX Runtime's default: the lowest latency on a quiet machine. False lets them
            sleep, for work beside other work.

    Raises:
        EdgekdError: not an artifact, an altered or corrupt file, a file too new for this ONNX Runtime, or a provider
            other than the CPU's.
    """
    folder = Path(folder)
    if threads is not None and threads < 1:
        raise EdgekdError(f"{threads} threads are not possible.", "Give 1 or more.")
    artifact = read_artifact(folder, check_hashes=check_hashes)
    if artifact.format != "onnx":
        raise EdgekdError(
            f"The artifact at {folder} has the format {artifact.format}, which this session cannot run.",
            "Use the edgekd that wrote it.",
        )
    opened = open_onnx(folder / artifact.model_file, threads=threads, spinning=spinning)
    return Session(artifact, opened.provider, opened.threads, opened.load_ms, opened.runtime)
