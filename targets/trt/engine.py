"""TensorRT on a device: whether it is there, and an engine built once from the ONNX file of an artifact.

What was built lies beside the artifact's files as `device.engine`, with `device.engine.json` about it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgekd.core.errors import EdgekdError, NotHere
from edgekd.core.readers import read_object, sha256_file
from edgekd.targets.agent.store import written
from edgekd.targets.trt.build import MODULES, BuildError, build
from edgekd.targets.trt.builders import Gpu, find_gpu

MODEL_FILE = "model.onnx"
DEVICE_FILE = "device.engine"
"""Built on the device: by the scripts beside it, or by `ready_engine`."""
ABOUT_FILE = DEVICE_FILE + ".json"
HOW = "sh build.sh, or python3 build_engine.py"
_INSTALL = "On the device: python3 -m pip install {}, or name a Python that has it (JetPack's: /usr/bin/python3)."


def check_tensorrt(details: Mapping[str, Any]) -> tuple[str, Any, Gpu]:
    """Return who runs an artifact's engine on this device: builder's name, its module, the GPU.

    Args:
        details: of `artifact.json`; those of an artifact with an engine name its `builder`, `builder_version` and
            `compute_capabilities`.

    Raises:
        EdgekdError: TensorRT, cuda-python or the GPU is missing, or the engine is for another GPU or version.
    """
    name, trt = _runtime(details)
    try:
        import cuda.bindings.runtime  # noqa: F401
    except (ImportError, OSError) as error:
        raise EdgekdError(
            f"The device's Python cannot load cuda.bindings ({error}).",
            _INSTALL.format("cuda-python"),
        ) from error
    gpu = find_gpu()
    if gpu is None:
        raise EdgekdError(
            "The device has no NVIDIA GPU with a working driver, and nothing else runs an engine.",
            "Look at nvidia-smi there, and whether cuda-python is of the driver's CUDA release.",
        )
    if details.get("builder") is not None:
        try:
            refuse_mismatch(details, gpu, trt.__version__)
        except NotHere as error:
            raise EdgekdError(
                error.message,
                f"Export with --compute-capability {gpu.capability}; without a builder the device builds.",
            ) from error
        except EdgekdError as error:
            raise EdgekdError(
                error.message, f"Install {name} {details['builder_version']} on the device."
            ) from error
    return name, trt, gpu


def ready_engine(
    artifact: Mapping[str, Any], folder: Path, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """See to it that the artifact in `folder` has an engine for this device.

    Returns:
        What was built here, now or before: `builder`, `version`, `gpu`, `compute_capability`, `seconds`, `sha256`.
        None for an engine that came with the artifact, or that somebody else built in this folder.

    Raises:
        EdgekdError: as `check_tensorrt`, or TensorRT refuses the model.
    """
    details = artifact["details"]
    name, trt, gpu = check_tensorrt(details)
    if details.get("builder") is not None:
        return None
    path, about = folder / DEVICE_FILE, _about(folder)
    if path.is_file() and about.get("sha256") != sha256_file(path):
        say(f"{artifact['name']} has an engine that was built here by other means")
        return None
    wanted = {
        "builder": name,
        "version": trt.__version__,
        "gpu": gpu.name,
        "compute_capability": gpu.capability,
    }
    if path.is_file() and all(about.get(key) == value for key, value in wanted.items()):
        say(f"the engine of {artifact['name']} was built here before, by {name} {trt.__version__}")
        return about
    who = f"{name} {trt.__version__} for {gpu.name}"
    say(f"building the engine of {artifact['name']} once, with {who}; this may take long")
    started = time.perf_counter()
    try:
        plan = build(trt, (folder / MODEL_FILE).read_bytes(), max_batch=int(details["max_batch"]))
    except BuildError as error:
        raise EdgekdError(
            f"{name} {trt.__version__} cannot build the engine of {artifact['name']} on this {gpu.name}: {error}.",
            "Try another precision, or another TensorRT on the device.",
        ) from error
    seconds = round(time.perf_counter() - started, 1)
    scratch = folder / (DEVICE_FILE + ".part")
    scratch.write_bytes(plan)
    about = {**wanted, "seconds": seconds, "sha256": sha256_file(scratch)}
    # An engine without the note that belongs to it would pass for somebody else's: at no moment is there one.
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    with written(folder / ABOUT_FILE, json.dumps(about).encode()):
        pass
    os.replace(scratch, path)
    say(f"engine of {artifact['name']}: {len(plan) / 1e6:.1f} MB, built in {seconds:g} s")
    return about


def _runtime(details: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the module that built the engine, or the first that can build one."""
    builder = details.get("builder")
    if builder is not None and builder not in MODULES:
        raise EdgekdError(f"{builder} is no builder of engines.", "Copy the artifact again.")
    failed = None
    for name in MODULES if builder is None else (builder,):
        try:
            trt = importlib.import_module(MODULES[name])
        except (ImportError, OSError) as error:
            failed = failed or (MODULES[name], error)
            continue
        if builder is not None or hasattr(
            trt, "OnnxParser"
        ):  # the packages that only run engines cannot build
            return name, trt
        failed = failed or (MODULES[name], ImportError("it only runs engines and cannot build one"))
    assert failed is not None
    package = ("tensorrt-rtx-cu13" if failed[0] == "tensorrt_rtx" else failed[0]) + " cuda-python"
    raise EdgekdError(
        f"The device's Python cannot load {failed[0]} ({failed[1]}).", _INSTALL.format(package)
    ) from failed[1]


def _about(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / ABOUT_FILE, "note about the engine")
    except EdgekdError:
        return {}


def refuse_mismatch(details: Mapping[str, Any], gpu: Gpu, version: str) -> None:
    """Refuse an engine of another kind of GPU or TensorRT version, before TensorRT fails with a message of its own."""
    if gpu.capability not in details["compute_capabilities"]:
        raise NotHere(
            f"The engine was built for compute capability {', '.join(details['compute_capabilities'])}, "
            f"and this {gpu.name} has {gpu.capability}.",
            f"Export with --compute-capability {gpu.capability}, or build it here: {HOW}.",
        )
    if version.split(".")[:3] != str(details["builder_version"]).split(".")[:3]:
        raise EdgekdError(
            f"The engine was built by {details['builder']} {details['builder_version']}, and here is {version}.",
            f"Install that version, or build it again here: {HOW}.",
        )
