"""Artifacts of the format `onnx`, run by ONNX Runtime: on the CPU, or on request by one of its GPU providers."""

from __future__ import annotations

from pathlib import Path

from edgekd.manifest import Artifact
from edgekd.targets import onnx_runtime
from edgekd.targets.session import Session, feed_for, session_of


def open_onnx(
    artifact: Artifact, folder: Path, *, threads: int | None, spinning: bool, provider: str = "cpu"
) -> Session:
    """Load the model; arguments as `edgekd.targets.session.open_session`, errors as `onnx_runtime.open_onnx`."""
    opened = onnx_runtime.open_onnx(
        folder / artifact.model_file,
        artifact.preprocess.size,
        feed=feed_for(artifact),
        threads=threads,
        spinning=spinning,
        provider=provider,
    )
    return session_of(artifact, opened)
