"""What edgekd can export to and open: one entry for each target (the device agent carries this file).

A new target is one entry here, a writer in export/ and an opener in targets/; no other module names a target.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from edgekd.core.errors import EdgekdError, did_you_mean
from edgekd.core.formats import Input, Precision


@dataclass(frozen=True)
class Target:
    """A runtime on a class of devices."""

    name: str
    format: str
    """Of its artifacts; no two targets share one."""
    writer: str
    """Module in export/ with `write(build: Build) -> Written`."""
    opener: str
    """Module in targets/, an `edgekd.targets.session.Opener`; of a target with `packages` it needs numpy alone beside
    the runtime."""
    runtime: str
    """What executes the artifact, and on what."""
    precisions: tuple[Precision, ...]
    summary: str
    """One line for `edgekd list targets`."""
    calibrated: tuple[Precision, ...] = ("int8",)
    """Precisions whose writer needs training images."""
    options: tuple[str, ...] = ()
    """Switches of its writer besides the precision."""
    calibrators: tuple[str, ...] = ("minmax",)
    """Ways to choose the ranges of INT8."""
    default_calibrator: str = "minmax"
    """The usual one of them (docs/measurements.md has the measurements)."""
    inputs: tuple[Input, ...] = ("uint8", "float")
    """What its files can take."""
    mixed: bool = True
    """Whether its INT8 can keep layers in float."""
    packages: str | None = None
    """What a device's Python needs besides numpy and Pillow, for people; None: the agent does not run it."""
    modules: tuple[str, ...] = ()
    """Files of targets/ that its opener needs on a device."""
    providers: bool = False
    """Whether its opener takes a provider."""
    timed_at_export: bool = False
    """Whether its files run on the machine that exports them."""
    reference: str | None = None
    """Module in export/ with `reference(artifact, folder) -> (Predictor, name)`, which evaluates a file without its
    runtime."""
    compared_by_reference: bool = False
    """Whether logits for a comparison come from `reference` even where the runtime is at hand."""


DEFAULT_TARGET = "onnxruntime"
AUTO = "auto"
"""In place of a target: the best file is found by measuring."""
UNPADDED = "-unpadded"
"""In the name of an artifact whose layers got no padding."""
_CALIBRATORS = ("minmax", "percentile", "entropy", "mse")

TARGETS: dict[str, Target] = {
    "onnxruntime": Target(
        name="onnxruntime",
        format="onnx",
        writer="edgekd.export.onnxruntime",
        opener="edgekd.targets.onnxruntime",
        packages="onnxruntime",
        providers=True,
        timed_at_export=True,
        inputs=("uint8", "float", "picture"),
        runtime="ONNX Runtime, CPU",
        precisions=("fp32", "fp16", "int8"),
        summary="one .onnx file for any machine with ONNX Runtime; fp16 is for other engines, slow on CPU",
        options=("padding",),
        calibrators=_CALIBRATORS,
    ),
    "coreml": Target(
        name="coreml",
        format="coreml",
        writer="edgekd.export.coreml",
        opener="edgekd.targets.coreml",
        reference="edgekd.export.coreml",
        compared_by_reference=True,  # Core ML's classifiers give probabilities, the evaluator logits
        runtime="Core ML, iOS 17 / macOS 14 and later",
        precisions=("fp32", "fp16", "int8", "int8-weights", "pal4", "pal6"),
        summary="an .mlpackage with image input and class labels; checked by a reference evaluator off macOS",
        calibrated=("fp16", "int8", "int8-weights", "pal4", "pal6"),
        options=("deployment_target",),
        inputs=("uint8",),
        mixed=False,
    ),
    "openvino": Target(
        name="openvino",
        format="openvino",
        writer="edgekd.export.openvino",
        opener="edgekd.targets.openvino",
        packages="openvino",
        timed_at_export=True,
        runtime="OpenVINO, CPU",
        precisions=("fp32", "fp16", "int8"),
        summary="IR for OpenVINO on x86 and Arm processors; INT8 by NNCF; fp16 halves the file and computes in fp32",
        options=("inference_precision",),
    ),
    "executorch": Target(
        name="executorch",
        format="executorch",
        writer="edgekd.export.executorch",
        opener="edgekd.targets.executorch",
        timed_at_export=True,
        runtime="ExecuTorch, CPU by XNNPACK",
        precisions=("fp32", "int8"),
        summary="one .pte file for apps that run PyTorch's mobile runtime; takes one image at a time",
        inputs=("uint8",),
        mixed=False,
    ),
    "litert": Target(
        name="litert",
        format="tflite",
        writer="edgekd.export.litert",
        opener="edgekd.targets.litert",
        packages="ai-edge-litert",
        timed_at_export=True,
        runtime="LiteRT (TensorFlow Lite), CPU",
        precisions=("fp32", "fp16", "int8", "int8-weights"),
        summary="one .tflite file for Android and small Linux devices; takes one image at a time",
        calibrators=_CALIBRATORS,
        default_calibrator="mse",
        inputs=("uint8",),
        mixed=False,
    ),
    "tensorrt": Target(
        name="tensorrt",
        format="tensorrt",
        writer="edgekd.export.tensorrt",
        opener="edgekd.targets.tensorrt",
        packages="tensorrt (or tensorrt-rtx) with cuda-python and an NVIDIA GPU",
        modules=("trt/__init__.py", "trt/build.py", "trt/machine.py"),
        reference="edgekd.export.onnx.evaluate",
        runtime="TensorRT, NVIDIA GPUs",
        precisions=("fp32", "fp16", "int8"),
        summary="an engine where one can be built, and always what builds one on the device",
        options=("compute_capability",),
        calibrators=_CALIBRATORS,
        default_calibrator="mse",
    ),
}


def target_of(format: str) -> Target:
    """Return the target whose artifacts have this format; an unknown one is an `EdgekdError`."""
    for target in TARGETS.values():
        if target.format == format:
            return target
    formats = ", ".join(target.format for target in TARGETS.values())
    raise EdgekdError(f"edgekd cannot run the format {format}.", f"It runs {formats}.")


def opener_of(format: str) -> Any:
    """Return the module that opens files of this format, an `edgekd.targets.session.Opener`.

    Where its runtime does not load, that is an ImportError or OSError.
    """
    return importlib.import_module(target_of(format).opener)


def artifact_name(
    target: str,
    precision: str,
    *,
    embedding: bool = False,
    input: Input = "uint8",
    padding: bool | None = None,
) -> str:
    """Return the name of an artifact, and of its folder in a run."""
    kind = "" if input == "uint8" else f"-{input}-input"
    unpadded = UNPADDED * (padding is False)
    return f"{target}-{precision}{unpadded}" + "-embedding" * embedding + kind


def get_target(name: str) -> Target:
    """Return the target called `name`; an unknown one is an `EdgekdError` with a suggestion."""
    if name not in TARGETS:
        raise EdgekdError(f'There is no target "{name}".', did_you_mean(name, (*TARGETS, AUTO)))
    return TARGETS[name]
