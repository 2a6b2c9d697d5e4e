"""The TensorRT of this machine: what it builds engines for, whether it runs one, and an engine built once on a device.

What was built lies beside the artifact's files as `device.engine`, with `device.engine.json` about it. The device agent
carries this file.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.core.errors import EdgekdError, NotHere
from edgekd.core.readers import read_object, sha256_file
from edgekd.targets.agent.store import written
from edgekd.targets.trt.build import MODULES, BuildError, build

KNOWN_CAPABILITIES = {
    "7.5": "Turing: T4, RTX 20",
    "8.0": "A100, A30",
    "8.6": "Ampere: RTX 30, A10",
    "8.7": "Jetson Orin",
    "8.9": "Ada: RTX 40, L4",
    "9.0": "Hopper: H100, H200",
    "10.0": "Blackwell: B200",
    "10.3": "Blackwell: B300",
    "11.0": "Jetson Thor",
    "12.0": "Blackwell: RTX 50",
    "12.1": "GB10",
}
"""Compute capabilities that TensorRT 11 runs on."""
DEFAULT_AHEAD = ("8.6", "8.9", "12.0")
"""What TensorRT-RTX builds for when nobody names a device: the GPUs it was made for, RTX 30 to 50."""
MODEL_FILE = "model.onnx"
DEVICE_FILE = "device.engine"
"""Built on the device: by the scripts beside it, or by `ready_engine`."""
ABOUT_FILE = DEVICE_FILE + ".json"
HOW = "sh build.sh, or python3 build_engine.py"
_INSTALL = "On the device: python3 -m pip install {}, or name a Python that has it (JetPack's: /usr/bin/python3)."


@dataclass(frozen=True)
class Gpu:
    """The first CUDA device."""

    name: str
    capability: str


@dataclass(frozen=True)
class Choice:
    """The builder of the engine, for which GPUs, and why."""

    builder: str | None
    """`tensorrt`, `tensorrt-rtx`, or None: a bundle that is built on the device."""
    version: str | None
    capabilities: tuple[str, ...]
    why: str
    """One sentence."""


def choose(capabilities: Sequence[str] = (), *, precision: str) -> Choice:
    """Return the builder to use here for these compute capabilities, or for none in particular.

    A capability that TensorRT does not support is an `EdgekdError`.
    """
    unknown = [one for one in capabilities if one not in KNOWN_CAPABILITIES]
    if unknown:
        raise EdgekdError(
            f"TensorRT has no compute capability {unknown[0]}.",
            f"Known: {', '.join(KNOWN_CAPABILITIES)}.",
        )
    wanted = tuple(dict.fromkeys(capabilities))
    gpu, full, ahead = find_gpu(), module("tensorrt"), module("tensorrt-rtx")
    if gpu is not None and full is not None and wanted in ((), (gpu.capability,)):
        why = f"this machine has it and a {gpu.name}"
        return Choice("tensorrt", full.__version__, (gpu.capability,), why)
    if ahead is not None:
        chosen = wanted or DEFAULT_AHEAD
        if precision == "fp32" and "7.5" in chosen:
            raise EdgekdError(
                "TensorRT-RTX has no fp32 matrix product for compute capability 7.5.",
                "Use --fp16 or --int8, or leave 7.5 out.",
            )
        missing = [one for one in wanted if one not in capabilities_of(ahead)]
        if not missing:
            named = "" if wanted else ", the default; --compute-capability names others"
            why = f"it builds without a GPU for {', '.join(chosen)}{named}"
            return Choice("tensorrt-rtx", ahead.__version__, chosen, why)
        what = f"{missing[0]} ({KNOWN_CAPABILITIES[missing[0]]})"
        why = f"TensorRT-RTX {ahead.__version__} cannot build for {what}"
    elif gpu is None:
        why = "there is neither a GPU nor TensorRT-RTX on this machine"
    elif full is None:
        why = f"the package tensorrt is not installed beside this {gpu.name}"
    else:
        why = f"this GPU is {gpu.capability}, not {', '.join(wanted)}"
    return Choice(None, None, wanted, why)


def capabilities_of(ahead: Any) -> tuple[str, ...]:
    """Return what this TensorRT-RTX builds for without a GPU, by its own list: `SM86` → `8.6`."""
    names = [name[2:] for name in dir(ahead.ComputeCapability) if name.startswith("SM")]
    return tuple(sorted((f"{name[:-1]}.{name[-1]}" for name in names), key=float))


def runtime(name: str) -> Any | None:
    """Return NVIDIA's Python module, or None where it is not installed or does not load."""
    try:
        return importlib.import_module(MODULES[name])
    except (ImportError, OSError):
        return None


def module(name: str) -> Any | None:
    """Return NVIDIA's Python module, or None where there is none that builds engines; some packages only run them."""
    found = runtime(name)
    return found if hasattr(found, "OnnxParser") else None


@functools.cache
def find_gpu() -> Gpu | None:
    """Return the first CUDA device, or None; needs the `cuda-bindings` package."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    error, count = runtime.cudaGetDeviceCount()
    if error != runtime.cudaError_t.cudaSuccess or count == 0:
        return None
    error, properties = runtime.cudaGetDeviceProperties(0)
    if error != runtime.cudaError_t.cudaSuccess:
        return None
    return Gpu(properties.name.decode().rstrip("\0"), f"{properties.major}.{properties.minor}")


def describe() -> str:
    """Return what builds TensorRT engines here, for `edgekd doctor`."""
    choice = choose(precision="int8")
    if choice.builder is None:
        return f"bundles to build on the device ({choice.why})"
    return f"engines by {choice.builder} {choice.version} ({choice.why})"


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
            if builder is None and not hasattr(trt, "OnnxParser"):
                raise ImportError("it only runs engines and cannot build one")
            return name, trt
        except (ImportError, OSError) as error:
            failed = failed or (MODULES[name], error)
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
