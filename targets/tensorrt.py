"""TensorRT engines in an artifact's folder, opened the one way edgekd opens them, here and on a device.

The device agent carries this file. An engine runs on this machine's GPU and never anywhere else.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError, NotHere
from edgekd.targets.feed import Feed, as_pixels
from edgekd.targets.session import RuntimeOptions, Session, feed_for
from edgekd.targets.trt.build import MODULES
from edgekd.targets.trt.builders import find_gpu, runtime
from edgekd.targets.trt.engine import (
    DEVICE_FILE,
    HOW,
    check_tensorrt,
    ready_engine,
    refuse_mismatch,
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
    engine, runtime = open_engine(artifact["details"], Path(folder), feed=feed_for(artifact))
    load_ms = (time.perf_counter() - started) * 1e3
    return Session(engine.run, runtime, 1, load_ms, largest_batch=engine.max_batch)


def check(artifact: Mapping[str, Any]) -> None:
    """Refuse a device without TensorRT, cuda-python or a fitting GPU; see `edgekd.targets.session.Opener`."""
    check_tensorrt(artifact["details"])


def open_engine(
    details: Mapping[str, Any], folder: Path, *, feed: Feed = as_pixels, cuda_graph: bool = False
) -> tuple[Engine, str]:
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


@dataclass(frozen=True)
class Timing:
    """One call by the GPU's own clock."""

    h2d_ms: float
    """Images from pinned memory to the GPU."""
    compute_ms: float
    d2h_ms: float
    """Logits back to pinned memory."""


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
    """A deserialized engine with one image input and one output, logits or embeddings.

    Args:
        engine: an `ICudaEngine` of `tensorrt` or `tensorrt_rtx`.
        feed: uint8 `[B, H, W, 3]` → the engine's input.
        cuda_graph: record the launches of each batch size once and relaunch them: less work per call for the CPU.
    """

    def __init__(self, engine: Any, *, feed: Feed = as_pixels, cuda_graph: bool = False) -> None:
        from cuda.bindings import runtime as cuda

        self._cuda = cuda
        self._engine = engine
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
        self._events = [cuda_call(cuda.cudaEventCreate()) for _ in range(4)]
        self._graphs: dict[int, Any] | None = {} if cuda_graph else None
        self._batch = 0

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 `[B, H, W, 3]` → float32 `[B, …]`, `B` up to `max_batch`."""
        return self.timed(images)[0]

    def timed(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], Timing]:
        """Run as `run`, and time the copies and the computation.

        Raises:
            EdgekdError: a larger batch than the engine was built for, or a CUDA error.
        """
        check_batch(len(images), self.max_batch)
        cuda, batch = self._cuda, len(images)
        if batch != self._batch:
            self._context.set_input_shape(self._input, (batch, *self._item))
            self._batch = batch
        np.copyto(self._host_in[:batch], self._feed(images))
        kinds = cuda.cudaMemcpyKind
        n_in, n_out = self._host_in[:batch].nbytes, self._host_out[:batch].nbytes
        graph = self._graph(batch)
        self._mark(0)
        self._copy(self._device_in, self._host_in.ctypes.data, n_in, kinds.cudaMemcpyHostToDevice)
        self._mark(1)
        if graph is None:
            self._enqueue()
        else:
            cuda_call(cuda.cudaGraphLaunch(graph, self._stream))
        self._mark(2)
        self._copy(
            self._host_out.ctypes.data, self._device_out, n_out, kinds.cudaMemcpyDeviceToHost
        )
        self._mark(3)
        cuda_call(cuda.cudaStreamSynchronize(self._stream))
        spans = [
            float(cuda_call(cuda.cudaEventElapsedTime(a, b)))
            for a, b in zip(self._events[:-1], self._events[1:])  # noqa: B905  Python 3.9 has no strict
        ]
        return self._host_out[:batch].copy(), Timing(*spans)

    def _graph(self, batch: int) -> Any | None:
        if self._graphs is None:
            return None
        if batch not in self._graphs:
            cuda = self._cuda
            self._enqueue()  # TensorRT allocates on the first call of a shape, which a capture must not contain
            cuda_call(cuda.cudaStreamSynchronize(self._stream))
            mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            cuda_call(cuda.cudaStreamBeginCapture(self._stream, mode))
            self._enqueue()
            captured = cuda_call(cuda.cudaStreamEndCapture(self._stream))
            self._graphs[batch] = cuda_call(cuda.cudaGraphInstantiate(captured, 0))
        return self._graphs[batch]

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise EdgekdError(
                "TensorRT could not run the engine.",
                "Build it again on this machine: sh build.sh, or python3 build_engine.py.",
            )

    def _copy(self, to: Any, source: Any, size: int, kind: Any) -> None:
        cuda_call(self._cuda.cudaMemcpyAsync(to, source, size, kind, self._stream))

    def _mark(self, index: int) -> None:
        cuda_call(self._cuda.cudaEventRecord(self._events[index], self._stream))

    def _pinned(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        size = prod(shape) * np.dtype(dtype).itemsize
        address = int(cuda_call(self._cuda.cudaHostAlloc(size, 0)))
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        return memory.view(dtype).reshape(shape)


def check_batch(batch: int, largest: int) -> None:
    """Refuse a batch that the engine was not built for."""
    if batch > largest:
        raise EdgekdError(
            f"The engine was built for batches of up to {largest}, not {batch}.",
            f"Give {largest} images at a time, or build it with build_engine.py --max-batch {batch}.",
        )
