"""Artifacts of the format `onnx`, run by ONNX Runtime: on the CPU, or on request by one of its GPU providers."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgekd.errors import EdgekdError, NotHere, did_you_mean
from edgekd.manifest import Artifact
from edgekd.targets.session import Session

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
"""Our word → ONNX Runtime's."""


def open_onnx(
    artifact: Artifact, folder: Path, *, threads: int | None, spinning: bool, provider: str = "cpu"
) -> Session:
    """Load the model; arguments as `edgekd.targets.session.open_session`.

    Raises:
        EdgekdError: a corrupt file, one too new for this ONNX Runtime, an unknown provider, or one that would leave a
            part of the graph to another.
        NotHere: the provider is not in this build of ONNX Runtime, or finds no device.
    """
    wanted = _available(provider)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # failures come as exceptions
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    if provider != "cpu":
        # Without this, whatever the provider does not take runs on the CPU, silently.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    started = time.perf_counter()
    try:
        runtime = onnxruntime.InferenceSession(str(folder / artifact.model_file), options, providers=[wanted])
    except Exception as error:  # ONNX Runtime's exceptions share no base class but this
        raise _explained(error, folder / artifact.model_file) from error
    load_ms = (time.perf_counter() - started) * 1e3
    active = runtime.get_providers()
    if not active or active[0] != wanted or (provider == "cpu" and len(active) > 1):
        raise EdgekdError(
            f"ONNX Runtime uses {', '.join(active)} instead of {wanted}.",
            "Install the plain onnxruntime package."
            if provider == "cpu"
            else "Look at nvidia-smi and at ONNX Runtime's requirements for CUDA and TensorRT.",
        )
    name = artifact.inputs[0].name

    def predict(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = runtime.run(None, {name: images})[0]
        return logits

    return Session(artifact, wanted, options.intra_op_num_threads or _default_threads(), load_ms, predict)


def _available(provider: str) -> str:
    """ONNX Runtime's name of `provider`, which this build has."""
    if provider not in PROVIDERS:
        raise EdgekdError(f'There is no provider "{provider}".', did_you_mean(provider, PROVIDERS))
    name = PROVIDERS[provider]
    if name not in onnxruntime.get_available_providers():
        raise NotHere(
            f"This build of ONNX Runtime has no {name}; it has {', '.join(onnxruntime.get_available_providers())}.",
            "Install onnxruntime-gpu in place of onnxruntime.",
        )
    return name


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
