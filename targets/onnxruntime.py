"""Open ONNX files in ONNX Runtime (part of the device agent)."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError, NotHere, check_known
from edgekd.core.machine import usable_cores
from edgekd.core.readers import read_json
from edgekd.targets.session import Nodes, Placement, RuntimeOptions, Session, feed_for, model_path

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
"""Provider in edgekd → provider in ONNX Runtime."""


def open_file(artifact: Mapping[str, Any], folder: Path, options: RuntimeOptions) -> Session:
    """Open an artifact on the CPU, or on request with one of the GPU providers; see `edgekd.targets.session.Opener`.

    A provider that would leave a part of the graph to another is an `EdgekdError`; one that this build lacks is
    `NotHere`.
    """
    path, feed, size = (
        model_path(artifact, folder),
        feed_for(artifact),
        artifact["preprocess"]["size"],
    )
    wanted = _available(options.provider or "cpu")
    started = time.perf_counter()
    runtime = _open(path, _session_options(options, wanted), [wanted])
    load_ms = (time.perf_counter() - started) * 1e3
    active = runtime.get_providers()
    if wanted not in active[:1]:
        raise EdgekdError(
            f"ONNX Runtime uses {', '.join(active)} instead of {wanted}.",
            "Look at nvidia-smi and at ONNX Runtime's requirements for CUDA and TensorRT.",
        )
    image = runtime.get_inputs()[0]
    fixed = image.shape[0] if isinstance(image.shape[0], int) else None
    if fixed not in (None, 1):
        raise EdgekdError(
            f"{path} has a fixed batch of {fixed} images, but edgekd runs single images.",
            "Export it with a batch of 1 or a dynamic batch.",
        )
    name = image.name

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = runtime.run(None, {name: feed(images)})[0]
        return found

    def placement() -> Placement:
        blank = feed(np.zeros((1, size, size, 3), dtype=np.uint8))
        quiet = RuntimeOptions(threads=1, spinning=False)
        nodes = profiled_nodes(path, blank, [wanted], _session_options(quiet, wanted))
        return Placement(wanted, nodes, "ONNX Runtime's profile")

    threads_used = options.threads or usable_cores()
    return Session(run, wanted, threads_used, load_ms, placement, largest_batch=fixed)


def profiled_nodes(
    path: Path,
    image: NDArray[Any],
    providers: Sequence[str],
    options: onnxruntime.SessionOptions,
) -> Nodes:
    """Return the nodes of the optimised graph by provider, from ONNX Runtime's profile of one call."""
    with tempfile.TemporaryDirectory(prefix="edgekd-profile-") as folder:
        options.enable_profiling = True
        options.profile_file_prefix = os.path.join(folder, "run")
        runtime = _open(path, options, providers)
        runtime.run(None, {runtime.get_inputs()[0].name: image})
        events = read_json(Path(runtime.end_profiling()), "profile of ONNX Runtime")
    nodes: Nodes = {}
    for event in events:
        args = event.get("args", {})
        is_node = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        if is_node and args.get("provider"):
            kinds = nodes.setdefault(args["provider"], {})
            kinds[args["op_name"]] = kinds.get(args["op_name"], 0) + 1
    return nodes


def _open(
    path: Path, options: onnxruntime.SessionOptions, providers: Sequence[str]
) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's exceptions have no other common base
        text, version = str(error), onnxruntime.__version__
        line = next((line for line in text.splitlines() if line.strip()), "no reason given")
        reason = line.rpartition(" : ")[2].strip().rstrip(".")[:200]  # without error class and path
        lowered = text.lower()
        if "unsupported model ir version" in lowered or (
            "opset" in lowered and "support" in lowered
        ):
            raise EdgekdError(
                f"{path} needs a newer ONNX Runtime than {version}: {reason}.",
                "Update onnxruntime on this machine.",
            ) from error
        raise EdgekdError(
            f"ONNX Runtime {version} cannot load {path}: {reason}.",
            "Export again with --overwrite.",
        ) from error


def _session_options(wanted: RuntimeOptions, provider: str) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = wanted.threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # failures are raised as exceptions
    spinning = "1" if wanted.spinning else "0"
    options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    if provider != PROVIDERS["cpu"]:
        # Without this, operators that the provider does not support silently run on the CPU.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def _available(provider: str) -> str:
    """Return ONNX Runtime's name of `provider`, if this build has it."""
    check_known(provider, PROVIDERS, f'There is no provider "{provider}".')
    name, present = PROVIDERS[provider], onnxruntime.get_available_providers()
    if name not in present:
        raise NotHere(
            f"This build of ONNX Runtime has no {name}; it has {', '.join(present)}.",
            "Install onnxruntime-gpu in place of onnxruntime.",
        )
    return name
