"""Which TensorRT can build an engine on this machine, and for which GPUs (the device agent carries this file)."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgekd.core.errors import EdgekdError
from edgekd.targets.trt.build import MODULES

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
