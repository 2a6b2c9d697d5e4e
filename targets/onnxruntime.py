"""ONNX Runtime, opened the one way edgekd opens it, here and on a device (the device agent carries this file)."""

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

from edgekd.core.errors import EdgekdError, NotHere, did_you_mean
from edgekd.core.readers import read_json
from edgekd.targets.feed import Feed, as_pixels
from edgekd.targets.session import Nodes, Placement, Session, feed_for, model_path

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
"""Our word → ONNX Runtime's."""


def open_file(
    artifact: Mapping[str, Any],
    folder: Path,
    *,
    threads: int | None,
    spinning: bool,
    provider: str | None,
) -> Session:
    """Open an artifact; see `edgekd.targets.session.Opener`, errors as `open_onnx`."""
    return open_onnx(
        model_path(artifact, folder),
        int(artifact["preprocess"]["size"]),
        feed=feed_for(artifact),
        threads=threads,
        spinning=spinning,
        provider=provider or "cpu",
    )


def open_onnx(
    path: Path,
    size: int,
    *,
    feed: Feed = as_pixels,
    threads: int | None = None,
    spinning: bool = True,
    provider: str = "cpu",
) -> Session:
    """Open a model file on the CPU, or on request with one of the GPU providers.

    Args:
        path: the `.onnx` file, with one input.
        feed: uint8 `[B, size, size, 3]` → that input.
        threads: threads within one operator; None is ONNX Runtime's choice, the physical cores.
        spinning: waiting threads poll, ONNX Runtime's default; False lets them sleep, for work beside other work.
        provider: one of `PROVIDERS`; nothing else is ever used in its place.

    Raises:
        EdgekdError: a corrupt file, one too new for this ONNX Runtime, an unknown provider, or one that would leave a
            part of the graph to another.
        NotHere: the provider is not in this build of ONNX Runtime, or finds no device.
    """
    wanted = _available(provider)
    options = _options(threads, spinning, provider)
    started = time.perf_counter()
    try:
        runtime = onnxruntime.InferenceSession(str(path), options, providers=[wanted])
    except Exception as error:  # ONNX Runtime's exceptions share no base class but this
        raise _explained(error, path) from error
    load_ms = (time.perf_counter() - started) * 1e3
    active = runtime.get_providers()
    if not active or active[0] != wanted or (provider == "cpu" and len(active) > 1):
        raise EdgekdError(
            f"ONNX Runtime uses {', '.join(active)} instead of {wanted}.",
            "Install the plain onnxruntime package."
            if provider == "cpu"
            else "Look at nvidia-smi and at ONNX Runtime's requirements for CUDA and TensorRT.",
        )
    image = runtime.get_inputs()[0]
    fixed = image.shape[0] if isinstance(image.shape[0], int) else None
    if fixed is not None and fixed != 1:
        raise EdgekdError(
            f"{path} takes exactly {fixed} images at a time, and edgekd asks about one.",
            "Export it with a batch of 1, or with one that is left open.",
        )
    name = image.name

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        answer: NDArray[np.float32] = runtime.run(None, {name: feed(images)})[0]
        return answer

    def placement() -> Placement:
        return onnx_placement(
            path, feed(np.zeros((1, size, size, 3), dtype=np.uint8)), provider=provider
        )

    threads_used = options.intra_op_num_threads or _default_threads()
    return Session(run, wanted, threads_used, load_ms, placement, largest_batch=fixed)


def onnx_placement(path: Path, image: NDArray[Any], *, provider: str = "cpu") -> Placement:
    """Where each node runs: one answer of a second session, opened like `open_onnx`'s but with profiling on.

    Args:
        path: the `.onnx` file.
        image: one, for the model's one input.
        provider: one of `PROVIDERS`.

    Raises:
        EdgekdError, NotHere: as `open_onnx`.
    """
    wanted = _available(provider)
    return Placement(
        wanted,
        profiled_nodes(path, image, [wanted], _options(1, False, provider)),
        "ONNX Runtime's profile",
    )


def profiled_nodes(
    path: Path,
    image: NDArray[Any],
    providers: Sequence[str],
    options: onnxruntime.SessionOptions,
) -> Nodes:
    """The nodes that ONNX Runtime's profile of one answer names, by provider; the graph is the optimised one."""
    with tempfile.TemporaryDirectory(prefix="edgekd-profile-") as folder:
        options.enable_profiling = True
        options.profile_file_prefix = os.path.join(folder, "run")
        try:
            runtime = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's exceptions share no base class but this
            raise _explained(error, path) from error
        runtime.run(None, {runtime.get_inputs()[0].name: image})
        events = read_json(Path(runtime.end_profiling()), "profile of ONNX Runtime")
    nodes: Nodes = {}
    for event in events:
        args = event.get("args", {})
        if (
            event.get("cat") == "Node"
            and event["name"].endswith("_kernel_time")
            and args.get("provider")
        ):
            kinds = nodes.setdefault(args["provider"], {})
            kinds[args["op_name"]] = kinds.get(args["op_name"], 0) + 1
    return nodes


def _options(threads: int | None, spinning: bool, provider: str) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # failures come as exceptions
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    if provider != "cpu":
        # Without this, whatever the provider does not take runs on the CPU, silently.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


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
            f"{path} needs a newer ONNX Runtime than {version}: {_reason(text)}.",
            "Update onnxruntime on this machine.",
        )
    return EdgekdError(
        f"ONNX Runtime {version} cannot load {path}: {_reason(text)}.",
        "Export again with --overwrite.",
    )


def _reason(text: str) -> str:
    """ONNX Runtime's message without its error class and without the path, in one line."""
    line = next((line for line in text.splitlines() if line.strip()), "no reason given")
    return line.rpartition(" : ")[2].strip().rstrip(".")[:200]
