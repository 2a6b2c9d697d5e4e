"""LiteRT on the CPU, opened the one way edgekd opens it, here and on a device (the device agent carries this file)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError, first_line, optional
from edgekd.targets.session import RuntimeOptions, Session, model_path

PACKAGE = "ai-edge-litert"


def open_file(artifact: Mapping[str, Any], folder: Path, options: RuntimeOptions) -> Session:
    """Open a `model.tflite`, which takes one image; see `edgekd.targets.session.Opener`.

    Threads are 1 unless given, LiteRT's own default. The XNNPACK delegate takes what it has kernels for, LiteRT's own
    kernels the rest, all on the CPU.
    """
    litert, version = load_litert()
    path, count = model_path(artifact, folder), options.threads or 1
    started = time.perf_counter()
    try:
        interpreter = litert.Interpreter(model_path=str(path), num_threads=count)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise EdgekdError(
            f"LiteRT {version} cannot load {path}: {first_line(error)}.",
            "Export again with --overwrite, or update ai-edge-litert.",
        ) from error
    load_ms = (time.perf_counter() - started) * 1e3
    image, answer = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    scale, zero_point = answer["quantization"]

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        interpreter.set_tensor(image["index"], images)
        interpreter.invoke()
        found: NDArray[Any] = interpreter.get_tensor(answer["index"])  # a copy
        if found.dtype == np.int8:
            return (found.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)
        return found

    return Session(run, f"LiteRT {version}, CPU", count, load_ms, largest_batch=1)


def check(artifact: Mapping[str, Any]) -> None:
    """Refuse a device without LiteRT; see `edgekd.targets.session.Opener`."""
    load_litert()


def load_litert() -> tuple[Any, str]:
    """Return the module of LiteRT's interpreter and its version; it is `NotHere` where it does not load."""
    from importlib.metadata import version

    interpreter = optional("ai_edge_litert.interpreter", "litert", "A LiteRT file")
    return interpreter, version(PACKAGE)
