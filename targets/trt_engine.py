"""A TensorRT engine on a GPU: pinned buffers, any batch up to the built one, copies timed apart from computing.

The device agent carries this file.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError
from edgekd.targets.feed import Feed, as_pixels


@dataclass(frozen=True)
class Timing:
    """One call by the GPU's own clock."""

    h2d_ms: float
    """Images from pinned memory to the GPU."""
    compute_ms: float
    d2h_ms: float
    """Logits back to pinned memory."""


def cuda_call(answer: tuple[Any, ...]) -> Any:
    """The value of a `cuda.bindings` call, whose answer is `(error, *values)`.

    Raises:
        EdgekdError: CUDA reports an error.
    """
    error, *values = answer
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
        cuda_graph: record the launches of each batch size once and replay them: less work per call for the CPU.
    """

    def __init__(self, engine: Any, *, feed: Feed = as_pixels, cuda_graph: bool = False) -> None:
        from cuda.bindings import runtime

        self._cuda = runtime
        self._engine = engine
        self._context = engine.create_execution_context()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._input, self._output = sorted(
            names, key=lambda name: "INPUT" not in str(engine.get_tensor_mode(name))
        )
        self.max_batch = int(engine.get_tensor_profile_shape(self._input, 0)[2][0])
        self._item = tuple(engine.get_tensor_shape(self._input))[1:]
        self._width = int(engine.get_tensor_shape(self._output)[1])
        self._stream = cuda_call(runtime.cudaStreamCreate())
        self._feed = feed
        side = self._item[1]  # the second of [H, W, 3] and of [3, H, W], of a square
        taken = feed(np.zeros((1, side, side, 3), dtype=np.uint8)).dtype.type
        self._host_in = self._pinned((self.max_batch, *self._item), taken)
        self._host_out = self._pinned((self.max_batch, self._width), np.float32)
        self._device_in = cuda_call(runtime.cudaMalloc(self._host_in.nbytes))
        self._device_out = cuda_call(runtime.cudaMalloc(self._host_out.nbytes))
        self._context.set_tensor_address(self._input, int(self._device_in))
        self._context.set_tensor_address(self._output, int(self._device_out))
        self._events = [cuda_call(runtime.cudaEventCreate()) for _ in range(4)]
        self._graphs: dict[int, Any] | None = {} if cuda_graph else None
        self._batch = 0

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 `[B, H, W, 3]` → float32 `[B, …]`, `B` up to `max_batch`."""
        return self.timed(images)[0]

    def timed(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], Timing]:
        """As `run`, with what the copies and the computation took.

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
        cuda_call(
            cuda.cudaMemcpyAsync(
                self._device_in,
                self._host_in.ctypes.data,
                n_in,
                kinds.cudaMemcpyHostToDevice,
                self._stream,
            )
        )
        self._mark(1)
        if graph is None:
            self._enqueue()
        else:
            cuda_call(cuda.cudaGraphLaunch(graph, self._stream))
        self._mark(2)
        cuda_call(
            cuda.cudaMemcpyAsync(
                self._host_out.ctypes.data,
                self._device_out,
                n_out,
                kinds.cudaMemcpyDeviceToHost,
                self._stream,
            )
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

    def _mark(self, index: int) -> None:
        cuda_call(self._cuda.cudaEventRecord(self._events[index], self._stream))

    def _pinned(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        size = prod(shape) * np.dtype(dtype).itemsize
        address = int(cuda_call(self._cuda.cudaHostAlloc(size, 0)))
        return (
            np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
            .view(dtype)
            .reshape(shape)
        )


def check_batch(batch: int, largest: int) -> None:
    """Refuse a batch that the engine was not built for."""
    if batch > largest:
        raise EdgekdError(
            f"The engine was built for batches of up to {largest}, not {batch}.",
            f"Give {largest} images at a time, or build it with build_engine.py --max-batch {batch}.",
        )
