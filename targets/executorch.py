"""ExecuTorch's runtime on the CPU, through its Python binding, which takes and gives tensors of torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError, first_line, optional
from edgekd.targets.session import RuntimeOptions, Session, model_path


def open_file(artifact: Mapping[str, Any], folder: Path, options: RuntimeOptions) -> Session:
    """Open a `model.pte`, which takes one image; see `edgekd.targets.session.Opener`.

    The binding has no setting for threads; ExecuTorch's own pool takes a number that it chooses by the processor.
    """
    runtime, torch, version = _load()
    path = model_path(artifact, folder)
    started = time.perf_counter()
    try:
        program = runtime.Runtime.get().load_program(path)
        method = program.load_method("forward")
        if method is None:
            raise RuntimeError("it has no method forward")
    except (RuntimeError, ValueError) as error:
        raise EdgekdError(
            f"ExecuTorch {version} cannot load {path}: {first_line(error)}.",
            "Export again with --overwrite.",
        ) from error
    load_ms = (time.perf_counter() - started) * 1e3

    def run(images: NDArray[np.uint8], alive: Any = program) -> NDArray[np.float32]:
        # The method points into its program and does not keep it alive.
        [found] = method.execute([torch.from_numpy(np.ascontiguousarray(images))])
        answer: NDArray[np.float32] = found.numpy().copy()
        return answer

    return Session(run, f"ExecuTorch {version}, XNNPACK", 0, load_ms, largest_batch=1)


def check(artifact: Mapping[str, Any]) -> None:
    """Refuse a Python without ExecuTorch; see `edgekd.targets.session.Opener`."""
    _load()


def _load() -> tuple[Any, Any, str]:
    """Return the modules of the runtime and of torch, which it brings, and its version."""
    from importlib.metadata import version

    needed = ("executorch.runtime", "torch")
    runtime, torch = (optional(name, "executorch", "An ExecuTorch file") for name in needed)
    return runtime, torch, version("executorch")
