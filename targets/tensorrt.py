"""TensorRT engines in an artifact's folder, opened the one way edgekd opens them, here and on a device.

The device agent carries this file. An engine runs on this machine's GPU and never anywhere else.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError, NotHere
from edgekd.targets.feed import Feed
from edgekd.targets.session import RuntimeOptions, Session, feed_for
from edgekd.targets.trt.build import MODULES
from edgekd.targets.trt.machine import (
    DEVICE_FILE,
    HOW,
    check_tensorrt,
    find_gpu,
    ready_engine,
    refuse_mismatch,
    runtime,
)

ENGINE_FILE = "model.engine"
"""Built with the artifact and covered by its hashes."""
make_ready = ready_engine
"""Build the engine of an artifact that came without one; see `edgekd.targets.session.Opener`."""


def open_file(artifact: Mapping[str, Any], folder: Path, options: RuntimeOptions) -> Session:
    """Open an artifact's engine; see `edgekd.targets.session.Opener`, errors as `open_engine`. Threads mean nothing.

    TensorRT has no record of which of its kernels run where: all of them run on the GPU.
    """
    started = time.perf_counter()
    engine, runtime = open_engine(artifact["details"], Path(folder), feed_for(artifact))
    load_ms = (time.perf_counter() - started) * 1e3
    return Session(engine.run, runtime, 1, load_ms, largest_batch=engine.max_batch)


def check(artifact: Mapping[str, Any]) -> None:
    """Refuse a device without TensorRT, cuda-python or a fitting GPU; see `edgekd.targets.session.Opener`."""
    check_tensorrt(artifact["details"])


def open_engine(details: Mapping[str, Any], folder: Path, feed: Feed) -> tuple[Engine, str]:
    """Return the engine in `folder`, first the one built on this device, and what runs it.

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
    runtimes = {name: trt for name in names if (trt := runtime(name)) is not None}
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
        logger = trt.Logger(trt.Logger.ERROR)
        loaded = trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
        if loaded is not None:
            return Engine(loaded, feed), f"{name} {trt.__version__}, {gpu.name}"
    tried = " and ".join(f"{name} {trt.__version__}" for name, trt in runtimes.items())
    raise EdgekdError(
        f"{tried} cannot load {path} on this {gpu.name}.",
        f"Build it again on this machine: {HOW}.",
    )


def cuda_call(result: tuple[Any, ...]) -> Any:
    """Return the value of a `cuda.bindings` call, `(error, *values)`; a CUDA error is an `EdgekdError`."""
    error, *values = result
    if error.value != 0:
        raise EdgekdError(
            f"CUDA reports {error.name}.",
            "Look at nvidia-smi: is the GPU free and its driver recent?",
        )
    return values[0] if len(values) == 1 else tuple(values) or None


class Engine:
    """An `ICudaEngine` of `tensorrt` or `tensorrt_rtx` with one image input and one output, logits or embeddings."""

    def __init__(self, engine: Any, feed: Feed) -> None:
        from cuda.bindings import runtime as cuda

        self._cuda, self._engine = cuda, engine
        self._context = engine.create_execution_context()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._input, self._output = sorted(
            names, key=lambda name: "INPUT" not in str(engine.get_tensor_mode(name))
        )
        self.max_batch = int(engine.get_tensor_profile_shape(self._input, 0)[2][0])
        self._item = tuple(engine.get_tensor_shape(self._input))[1:]
        self._width = int(engine.get_tensor_shape(self._output)[1])
        self._stream = cuda_call(cuda.cudaStreamCreate())
        self._feed = feed
        side = self._item[1]  # the second of [H, W, 3] and of [3, H, W], of a square
        taken = feed(np.zeros((1, side, side, 3), dtype=np.uint8)).dtype.type
        self._host_in = self._pinned((self.max_batch, *self._item), taken)
        self._host_out = self._pinned((self.max_batch, self._width), np.float32)
        self._device_in = cuda_call(cuda.cudaMalloc(self._host_in.nbytes))
        self._device_out = cuda_call(cuda.cudaMalloc(self._host_out.nbytes))
        self._context.set_tensor_address(self._input, int(self._device_in))
        self._context.set_tensor_address(self._output, int(self._device_out))
        self._batch = 0

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 `[B, H, W, 3]` → float32 `[B, …]`, `B` up to `max_batch`; a CUDA error is an `EdgekdError`."""
        cuda, batch = self._cuda, len(images)
        if batch != self._batch:
            self._context.set_input_shape(self._input, (batch, *self._item))
            self._batch = batch
        taken, found = self._host_in[:batch], self._host_out[:batch]
        np.copyto(taken, self._feed(images))
        kinds = cuda.cudaMemcpyKind
        self._copy(self._device_in, taken.ctypes.data, taken.nbytes, kinds.cudaMemcpyHostToDevice)
        if not self._context.execute_async_v3(int(self._stream)):
            raise EdgekdError(
                "TensorRT could not run the engine.", f"Build it again on this machine: {HOW}."
            )
        self._copy(found.ctypes.data, self._device_out, found.nbytes, kinds.cudaMemcpyDeviceToHost)
        cuda_call(cuda.cudaStreamSynchronize(self._stream))
        return found.copy()

    def _copy(self, to: Any, source: Any, size: int, kind: Any) -> None:
        cuda_call(self._cuda.cudaMemcpyAsync(to, source, size, kind, self._stream))

    def _pinned(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        size = prod(shape) * np.dtype(dtype).itemsize
        address = int(cuda_call(self._cuda.cudaHostAlloc(size, 0)))
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        return memory.view(dtype).reshape(shape)
