"""What edgekd can export to. A new target is one entry here, one writer in export/ (`WRITERS`)
and, where its runtime exists on a machine that edgekd runs on, one opener in targets/ (`OPENERS`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from edgekd.errors import EdgekdError, did_you_mean
from edgekd.manifest import Input, Precision


@dataclass(frozen=True)
class Target:
    """A runtime on a class of devices."""

    name: str
    runtime: str
    """What executes the artifact, and on what."""
    precisions: tuple[Precision, ...]
    summary: str
    """One line for `edgekd list targets`."""
    calibrated: tuple[Precision, ...] = ("int8",)
    """Precisions whose writer looks at training images."""
    options: tuple[str, ...] = ()
    """Switches of its writer besides the precision."""
    calibrators: tuple[str, ...] = ("minmax",)
    """Ways to choose the ranges of INT8."""
    default_calibrator: str = "minmax"
    """The one of them that is taken where none is asked for (docs/measurements.md has the measurements)."""
    inputs: tuple[Input, ...] = ("uint8", "float")
    """What its files can take."""
    mixed: bool = True
    """Whether its INT8 can keep layers in float."""


DEFAULT_TARGET = "onnxruntime"
_CALIBRATORS = ("minmax", "percentile", "entropy", "mse")

TARGETS: dict[str, Target] = {
    "onnxruntime": Target(
        name="onnxruntime",
        runtime="ONNX Runtime, CPU",
        precisions=("fp32", "fp16", "int8"),
        summary="one .onnx file for any machine with ONNX Runtime; fp16 is for other engines, slow on CPU",
        calibrators=_CALIBRATORS,
    ),
    "coreml": Target(
        name="coreml",
        runtime="Core ML, iOS 17 / macOS 14 and later",
        precisions=("fp32", "fp16", "int8", "w8a8", "pal4", "pal6"),
        summary="an .mlpackage with image input and class labels; checked by a reference evaluator off macOS",
        calibrated=("fp16", "int8", "w8a8", "pal4", "pal6"),
        options=("deployment_target",),
        inputs=("uint8",),
        mixed=False,
    ),
    "openvino": Target(
        name="openvino",
        runtime="OpenVINO, CPU",
        precisions=("fp32", "fp16", "int8"),
        summary="IR for OpenVINO on x86 and Arm processors; INT8 by NNCF; fp16 halves the file and computes in fp32",
        options=("inference_precision",),
    ),
    "tensorrt": Target(
        name="tensorrt",
        runtime="TensorRT, NVIDIA GPUs",
        precisions=("fp32", "fp16", "int8"),
        summary="an engine where one can be built, and always what builds one on the device",
        options=("compute_capability",),
        calibrators=_CALIBRATORS,
        default_calibrator="mse",
    ),
}


def check_calibrator(target: Target, precision: str, calibrator: str | None) -> None:
    """Refuse a way to choose ranges that the target does not have, or a precision without ranges."""
    if calibrator is None:
        return
    if calibrator not in target.calibrators:
        raise EdgekdError(
            f'{target.name} has no calibrator "{calibrator}".',
            did_you_mean(calibrator, target.calibrators),
        )
    if precision != "int8":
        raise EdgekdError(
            f"{precision} has no ranges to choose.", "--calibrator belongs to --int8."
        )


def check_input(target: Target, kind: str) -> None:
    """Refuse an input that does not exist, or that the target's files do not take."""
    known = get_args(Input)
    if kind not in known:
        raise EdgekdError(f'There is no input "{kind}".', did_you_mean(kind, known))
    if kind not in target.inputs:
        raise EdgekdError(
            f"The files of {target.name} take an image, not the {kind}s that other programs normalise.",
            "Give --input uint8, or leave it out.",
        )


def artifact_name(
    target: str, precision: str, *, embedding: bool = False, input: Input = "uint8"
) -> str:
    """Name of an artifact, and of its folder in a run."""
    return f"{target}-{precision}" + "-embedding" * embedding + "-float-input" * (input == "float")


def get_target(name: str) -> Target:
    """The target called `name`; an unknown one is an `EdgekdError` with a suggestion."""
    if name not in TARGETS:
        raise EdgekdError(f'There is no target "{name}".', did_you_mean(name, TARGETS))
    return TARGETS[name]
