"""Artifacts of the format `onnx`, run by ONNX Runtime: on the CPU, or on request by one of its GPU providers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekd.manifest import Artifact
from edgekd.targets import onnx_runtime
from edgekd.targets.placement import Placement
from edgekd.targets.session import Session


def open_onnx(
    artifact: Artifact, folder: Path, *, threads: int | None, spinning: bool, provider: str = "cpu"
) -> Session:
    """Load the model; arguments as `edgekd.targets.session.open_session`, errors as `onnx_runtime.open_onnx`."""
    opened = onnx_runtime.open_onnx(folder / artifact.model_file, threads=threads, spinning=spinning, provider=provider)
    name = artifact.inputs[0].name

    def predict(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = opened.runtime.run(None, {name: images})[0]
        return logits

    def placement() -> Placement:
        size = artifact.preprocess.size
        image = np.zeros((1, size, size, 3), dtype=np.uint8)
        return onnx_runtime.onnx_placement(folder / artifact.model_file, image, provider=provider)

    return Session(artifact, opened.provider, opened.threads, opened.load_ms, predict, placement)
