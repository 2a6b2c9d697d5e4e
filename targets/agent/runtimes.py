"""The runtimes that the agent knows: whether one is on this device, and a model file opened in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgekd.errors import EdgekdError, NotHere
from edgekd.targets.feed import feed_of
from edgekd.targets.opened import Opened

FORMATS = ("onnx", "openvino", "tensorrt")
"""Formats of artifacts that the agent runs."""
PACKAGES = {
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt (or tensorrt-rtx) with cuda-python and an NVIDIA GPU",
}
"""Format → what a device's Python needs besides numpy and Pillow, for people."""
_OR = "or name a Python that has it."


def needs(artifact: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `artifact.json` that says which runtime it needs: what `check_runtime` looks at."""
    details = artifact.get("details", {})
    kept = ("builder", "builder_version", "compute_capabilities")
    return {
        "format": artifact["format"],
        "details": {key: details[key] for key in kept if key in details},
    }


def check_runtime(artifact: Mapping[str, Any]) -> None:
    """Nothing, where this device's Python can load the runtime of an artifact.

    Args:
        artifact: what `artifact.json` holds; what `needs` takes of it is enough.

    Raises:
        EdgekdError: an unknown format, or a runtime that is not here, by the name of its package.
    """
    if artifact["format"] == "onnx":
        try:
            import onnxruntime  # noqa: F401
        except (ImportError, OSError) as error:
            raise EdgekdError(
                f"The device's Python cannot load onnxruntime ({error}).",
                f"On the device: python3 -m pip install onnxruntime, {_OR}",
            ) from error
    elif artifact["format"] == "openvino":
        from edgekd.targets.openvino_runtime import OLDEST, TOO_NEW, load_openvino

        bounds = f"openvino>={OLDEST[0]}.{OLDEST[1]},<{TOO_NEW[0]}"
        hint = f"On the device: python3 -m pip install '{bounds}', {_OR}"
        try:
            load_openvino()
        except NotHere as error:
            raise EdgekdError(
                f"The device's Python cannot load openvino ({error.__cause__}).", hint
            ) from error
        except EdgekdError as error:
            raise EdgekdError(f"The device's Python: {error.message}", hint) from error
    elif artifact["format"] == "tensorrt":
        from edgekd.targets.agent.engines import check_tensorrt

        check_tensorrt(artifact["details"])
    else:
        raise EdgekdError(
            f"The agent cannot run artifacts of the format {artifact['format']}.",
            f"It runs {', '.join(FORMATS)}.",
        )


def make_ready(
    artifact: Mapping[str, Any], folder: Path, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """What must be done once before an artifact can be opened: a TensorRT bundle's engine is built.

    Returns:
        What was built here, as `engines.ready_engine` says it; None where nothing was.

    Raises:
        EdgekdError: as `check_runtime`, or a build that fails.
    """
    check_runtime(artifact)
    if artifact["format"] != "tensorrt":
        return None
    from edgekd.targets.agent.engines import ready_engine

    return ready_engine(artifact, folder, say)


def open_file(artifact: Mapping[str, Any], folder: Path, *, threads: int | None) -> Opened:
    """The model file of an artifact, open in its runtime.

    Raises:
        EdgekdError: as `check_runtime`, or a file that the runtime refuses.
    """
    if artifact["format"] == "coreml":
        return _open_coreml(folder, threads)
    check_runtime(artifact)
    path, size = folder / next(iter(artifact["files"])), int(artifact["preprocess"]["size"])
    feed = feed_of(artifact["inputs"][0]["dtype"], artifact["preprocess"])
    if artifact["format"] == "onnx":
        from edgekd.targets.onnx_runtime import open_onnx

        return open_onnx(path, size, feed=feed, threads=threads)
    if artifact["format"] == "tensorrt":
        from edgekd.targets.trt_runtime import open_trt

        return open_trt(artifact["details"], folder, feed=feed)
    from edgekd.targets.openvino_runtime import open_ir

    details = artifact.get("details", {})
    return open_ir(
        path,
        size,
        feed=feed,
        threads=threads,
        written_by=str(details.get("openvino", "")),
        inference_precision=str(details.get("inference_precision", "f32")),
    )


def _open_coreml(folder: Path, threads: int | None) -> Opened:
    """A Core ML package on this Mac; the modules that open it are in the whole package, not in the agent's file."""
    try:
        from edgekd.targets.session import open_session
    except ImportError as error:
        raise EdgekdError(
            "The agent cannot run artifacts of the format coreml.",
            "Measure them on a Mac without --device.",
        ) from error
    session = open_session(folder, threads=threads)
    return Opened(
        session.predict,
        session.provider,
        session.threads,
        session.load_ms,
        session.placement,
        session.largest_batch,
    )
