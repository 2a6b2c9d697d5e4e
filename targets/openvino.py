"""OpenVINO's CPU device, opened the one way edgekd opens it, here and on a device (the device agent carries this file).

Never another of OpenVINO's devices.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError, NotHere, optional
from edgekd.targets.session import (
    OR_ANOTHER,
    Placement,
    RuntimeOptions,
    Session,
    feed_for,
    model_path,
)

OLDEST, TOO_NEW = (2025, 0), (2027, 0)
"""Releases that edgekd takes: from the first on, and before the second."""

KEPT_BATCHES = 4
"""Batch sizes kept compiled: the single image, the full batch of an evaluation, its last one, and one to spare."""
_MEMORY = ("Input", "Output", "Const", "Constant", "Parameter", "Result")
"""Kinds of nodes that are memory, not work."""


def open_file(artifact: Mapping[str, Any], folder: Path, options: RuntimeOptions) -> Session:
    """Open an IR file on the CPU; see `edgekd.targets.session.Opener`.

    OpenVINO has no choice between polling and sleeping. It ties its threads to cores, which helps on a quiet machine
    only: `spinning=False` turns that off. An inference precision that this processor lacks is an `EdgekdError`.
    """
    openvino = load_openvino()
    details, size = artifact["details"], int(artifact["preprocess"]["size"])
    # Left to OpenVINO, it would be bfloat16 where the processor has it, whatever the file holds.
    precision = str(details.get("inference_precision", "f32"))
    settings = _settings(precision, options)
    core, path, feed = shared_core(), model_path(artifact, folder), feed_for(artifact)
    item = feed(np.zeros((1, size, size, 3), dtype=np.uint8)).shape[1:]

    @functools.lru_cache(maxsize=KEPT_BATCHES)
    def prepared(batch: int) -> tuple[Any, Any, NDArray[Any], NDArray[np.float32]]:
        """Return the compiled model, a request, and its own input and output memory, for one batch size.

        The file leaves the batch open, and the CPU device then plans at every call: batch 1 of a small student took
        1.7 times as long as compiled for batch 1.
        """
        try:
            model = core.read_model(path)
            model.reshape([batch, *item])
            compiled = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            written_by = str(details.get("openvino", ""))
            raise _explained(error, path, written_by, version_of(openvino)) from error
        used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if used != precision:
            raise EdgekdError(
                f"This processor computes in {used} for OpenVINO, where {path} requires {precision}.",
                "Export without --inference-precision, or run it on a processor that has it.",
            )
        request = compiled.create_infer_request()
        memory = request.get_input_tensor(0).data, request.get_output_tensor(0).data
        return compiled, request, *memory

    started = time.perf_counter()
    compiled, *_ = prepared(1)
    load_ms = (time.perf_counter() - started) * 1e3

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        _, request, taken, found = prepared(len(images))
        taken[...] = feed(images)
        # Not infer(): it wraps every answer anew, 7 % of the time of a small student.
        request.start_async()
        request.wait()
        # A copy: the request writes its next answer into the same memory.
        return found.copy()

    return Session(
        run,
        f"OpenVINO {version_of(openvino)}, CPU, {precision}",
        int(compiled.get_property("INFERENCE_NUM_THREADS")),
        load_ms,
        lambda: _placement(compiled),
    )


def _settings(precision: str, options: RuntimeOptions) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": precision,
    }
    if options.threads is not None:
        settings["INFERENCE_NUM_THREADS"] = options.threads
    if not options.spinning:
        settings["ENABLE_CPU_PINNING"] = False
    return settings


def check(artifact: Mapping[str, Any]) -> None:
    """Refuse a device without OpenVINO, or with another release; see `edgekd.targets.session.Opener`."""
    bounds = f"openvino>={OLDEST[0]}.{OLDEST[1]},<{TOO_NEW[0]}"
    hint = f"On the device: python3 -m pip install '{bounds}', {OR_ANOTHER}"
    try:
        load_openvino()
    except NotHere as error:
        raise EdgekdError(
            f"The device's Python cannot load openvino ({error.__cause__}).", hint
        ) from error
    except EdgekdError as error:
        raise EdgekdError(f"The device's Python: {error.message}", hint) from error


def load_openvino() -> Any:
    """Return the package `openvino`; it is `NotHere` where it does not load, another release an `EdgekdError`."""
    openvino = optional("openvino", "openvino", "An OpenVINO file")
    release = _numbers(version_of(openvino))[:2]
    if not OLDEST <= release < TOO_NEW:
        raise EdgekdError(
            f"OpenVINO {'.'.join(map(str, release))} is installed; edgekd works with {OLDEST[0]} up to {TOO_NEW[0]}.",
            'pip install "edgekd[openvino]"',
        )
    return openvino


@functools.cache
def shared_core() -> Any:
    """Return the one `openvino.Core` of this process; errors as `load_openvino`.

    OpenVINO's CPU device installs a stack for signal handlers, and restores the one before when its core goes. Where
    two cores do not go in reverse order, that one is freed memory, and the next Ctrl-C is a segmentation fault.
    """
    core = load_openvino().Core()
    core.set_property({"ENABLE_MMAP": False})  # a file may be written anew while it is open
    return core


def version_of(openvino: Any) -> str:
    """`2026.4.1` out of `2026.4.1-22982-e213a147257-releases/2026/4`."""
    return str(openvino.__version__).partition("-")[0]


def reason_of(error: Exception) -> str:
    """Return the last line with words: OpenVINO puts the source file's name first."""
    lines = [line.strip() for line in str(error).splitlines() if any(map(str.isalpha, line))]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")[:200]


def _placement(compiled: Any) -> Placement:
    kinds: dict[str, int] = {}
    for node in compiled.get_runtime_model().get_ops():
        layer, precision = (
            node.rt_info[key].astype(str) for key in ("layerType", "runtimePrecision")
        )
        if layer not in _MEMORY:
            kinds[f"{layer} {precision}"] = kinds.get(f"{layer} {precision}", 0) + 1
    return Placement("CPU", {"CPU": kinds}, "OpenVINO's runtime model")


def _explained(error: RuntimeError, path: Path, written_by: str, version: str) -> EdgekdError:
    if _numbers(written_by) > _numbers(version):
        return EdgekdError(
            f"{path} was written by OpenVINO {written_by}, and {version} cannot load it.",
            "Update openvino on this machine.",
        )
    return EdgekdError(
        f"OpenVINO {version} cannot load {path}: {reason_of(error)}.",
        "Export again with --overwrite.",
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
