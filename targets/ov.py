"""Artifacts of the format `openvino`, run by OpenVINO's CPU device; never on another."""

from __future__ import annotations

from pathlib import Path

from edgekd.manifest import Artifact
from edgekd.targets.openvino_runtime import open_ir
from edgekd.targets.session import Session, feed_for, session_of


def open_openvino(
    artifact: Artifact, folder: Path, *, threads: int | None, spinning: bool
) -> Session:
    """Load the IR; arguments as `edgekd.targets.session.open_session`, errors as `openvino_runtime.open_ir`."""
    opened = open_ir(
        folder / artifact.model_file,
        artifact.preprocess.size,
        feed=feed_for(artifact),
        threads=threads,
        spinning=spinning,
        written_by=str(artifact.details.get("openvino", "")),
        inference_precision=str(artifact.details.get("inference_precision", "f32")),
    )
    return session_of(artifact, opened)
