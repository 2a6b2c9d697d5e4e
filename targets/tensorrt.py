"""TensorRT engines in an artifact's folder, opened the one way edgekd opens them, here and on a device.

The device agent carries this file. An engine runs on this machine's GPU and never anywhere else.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.core.errors import EdgekdError, NotHere
from edgekd.targets.feed import Feed, as_pixels
from edgekd.targets.opened import Opened, feed_for
from edgekd.targets.trt_build import MODULES
from edgekd.targets.trt_builders import find_gpu
from edgekd.targets.trt_device import (
    DEVICE_FILE,
    HOW,
    check_tensorrt,
    ready_engine,
    refuse_mismatch,
)
from edgekd.targets.trt_engine import Engine

ENGINE_FILE = "model.engine"
"""Built with the artifact and covered by its hashes."""
make_ready = ready_engine
"""Build the engine of an artifact that came without one; see `edgekd.targets.opened.Opener`."""


def open_file(
    artifact: Mapping[str, Any],
    folder: Path,
    *,
    threads: int | None,
    spinning: bool,
    provider: str | None,
) -> Opened:
    """Open an artifact; see `edgekd.targets.opened.Opener`, errors as `open_engine`. Threads say nothing here."""
    return open_trt(artifact["details"], Path(folder), feed=feed_for(artifact))


def check(artifact: Mapping[str, Any]) -> None:
    """Refuse a device without TensorRT, cuda-python or a fitting GPU; see `edgekd.targets.opened.Opener`."""
    check_tensorrt(artifact["details"])


def open_trt(details: Mapping[str, Any], folder: Path, *, feed: Feed = as_pixels) -> Opened:
    """The engine in `folder` with the time it took to load; errors as `open_engine`.

    TensorRT does not tell which of its kernels run where: all of them run on the GPU.
    """
    started = time.perf_counter()
    engine, provider = open_engine(details, folder, feed=feed)
    load_ms = (time.perf_counter() - started) * 1e3
    return Opened(engine.run, provider, 1, load_ms, largest_batch=engine.max_batch)


def open_engine(
    details: Mapping[str, Any], folder: Path, *, feed: Feed = as_pixels, cuda_graph: bool = False
) -> tuple[Engine, str]:
    """The engine in `folder`, first the one built on this device, and what runs it.

    Args:
        details: those of `artifact.json`, as export's writer for TensorRT leaves them.
        feed: uint8 `[B, H, W, 3]` → the engine's input.

    Raises:
        NotHere: no engine has been built yet, no TensorRT, no GPU, or an engine for another kind of GPU.
        EdgekdError: an engine of another TensorRT version, or a damaged one.
    """
    local = folder / DEVICE_FILE
    path = local if local.is_file() else folder / ENGINE_FILE
    if not path.is_file():
        raise NotHere(f"{folder} holds no engine yet.", f"Build it on the device: {HOW}.")
    names = list(MODULES) if path == local else [details["builder"]]
    if names[0] not in MODULES:
        raise EdgekdError(f"{path} was built by {names[0]}, which is not known here.", HOW)
    runtimes = {name: trt for name in names if (trt := _module(name)) is not None}
    if not runtimes:
        raise NotHere(
            f"{path} needs the Python package {MODULES[names[0]]}, which is not on this machine.",
            "Install edgekd[tensorrt], or for TensorRT-RTX edgekd[tensorrt-rtx].",
        )
    gpu = find_gpu()
    if gpu is None:
        raise NotHere(
            f"{path} needs an NVIDIA GPU with its driver, and this machine has none.",
            "Copy the folder to the device.",
        )
    for name, trt in runtimes.items():
        if path != local:
            refuse_mismatch(details, gpu, trt.__version__)
        loaded = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(
            path.read_bytes()
        )
        if loaded is not None:
            return Engine(
                loaded, feed=feed, cuda_graph=cuda_graph
            ), f"{name} {trt.__version__}, {gpu.name}"
    tried = " and ".join(f"{name} {trt.__version__}" for name, trt in runtimes.items())
    raise EdgekdError(
        f"{tried} cannot load {path} on this {gpu.name}.",
        f"Build it again on this machine: {HOW}.",
    )


def _module(name: str) -> Any | None:
    try:
        return importlib.import_module(MODULES[name])
    except (ImportError, OSError):
        return None
