"""An exported artifact, opened and ready to run: numpy and ONNX Runtime only, never torch."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgekd.errors import EdgekdError
from edgekd.manifest import Artifact, read_artifact

_PROVIDER = "CPUExecutionProvider"


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
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # failures come as exceptions
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    started = time.perf_counter()
    try:
        runtime = onnxruntime.InferenceSession(str(folder / artifact.model_file), options, providers=[_PROVIDER])
    except Exception as error:  # ONNX Runtime's exceptions share no base class but this
        raise _explained(error, folder / artifact.model_file) from error
    load_ms = (time.perf_counter() - started) * 1e3
    active = runtime.get_providers()
    if active != [_PROVIDER]:
        raise EdgekdError(
            f"ONNX Runtime uses {', '.join(active)} instead of {_PROVIDER}.", "Install the plain onnxruntime package."
        )
    return Session(artifact, _PROVIDER, options.intra_op_num_threads or _default_threads(), load_ms, runtime)


def _default_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _explained(error: Exception, path: Path) -> EdgekdError:
    """ONNX Runtime's reason in a sentence of ours."""
    text = str(error)
    lowered = text.lower()
    version = onnxruntime.__version__
    if "unsupported model ir version" in lowered or ("opset" in lowered and "support" in lowered):
        return EdgekdError(
            f"{path} needs a newer ONNX Runtime than {version}: {_reason(text)}.", "Update onnxruntime on this machine."
        )
    return EdgekdError(f"ONNX Runtime {version} cannot load {path}: {_reason(text)}.", "Export again with --overwrite.")


def _reason(text: str) -> str:
    """ONNX Runtime's message without its error class and without the path, in one line."""
    line = next((line for line in text.splitlines() if line.strip()), "no reason given")
    return line.rpartition(" : ")[2].strip().rstrip(".")[:200]
