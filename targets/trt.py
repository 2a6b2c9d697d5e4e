"""Artifacts of the format `tensorrt`, run by TensorRT or TensorRT-RTX on this machine's GPU; never anywhere else."""

from __future__ import annotations

from pathlib import Path

from edgekd.manifest import Artifact
from edgekd.targets import trt_runtime
from edgekd.targets.session import Session, feed_for, session_of
from edgekd.targets.trt_engine import Engine


def open_tensorrt(
    artifact: Artifact, folder: Path, *, threads: int | None, spinning: bool
) -> Session:
    """Load the engine; arguments as `edgekd.targets.session.open_session`, of which threads and spinning say nothing
    here, errors as `trt_runtime.open_engine`."""
    return session_of(
        artifact, trt_runtime.open_trt(artifact.details, Path(folder), feed=feed_for(artifact))
    )


def open_engine(
    artifact: Artifact, folder: Path, *, cuda_graph: bool = False
) -> tuple[Engine, str]:
    """The engine in `folder`, first the one built on this device, and what runs it; errors as
    `trt_runtime.open_engine`."""
    return trt_runtime.open_engine(
        artifact.details, Path(folder), feed=feed_for(artifact), cuda_graph=cuda_graph
    )
