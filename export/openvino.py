"""The writer for OpenVINO: its IR, `model.xml` with `model.bin`, in fp32, fp16 or int8."""

from __future__ import annotations

import onnx

from edgekd.core.errors import EdgekdError, did_you_mean
from edgekd.export.onnx.graphs import rewrite, with_float_input
from edgekd.export.openvino_ir import read, save
from edgekd.export.quantize.calibration import check_calibration
from edgekd.export.quantize.openvino import OpenVinoInt8
from edgekd.export.writer import Build, Written, agent_beside
from edgekd.targets.openvino import load_openvino, version_of

MODEL_FILES = ("model.xml", "model.bin")
INFERENCE_PRECISIONS = ("f32", "bf16", "f16")
"""What OpenVINO's CPU device can compute in, apart from int8."""


def write(build: Build) -> Written:
    """Write the IR of the fp32 ONNX file; int8 goes through NNCF's post-training quantization.

    Raises:
        NotHere: OpenVINO is not installed.
        EdgekdError: a version of it outside edgekd's bounds, useless calibration images, or a graph that OpenVINO or
            NNCF does not take.
        GateFailed: int8 costs more than the accuracy budget, whatever stays in float.
    """
    openvino = load_openvino()
    computes_in = _inference_precision(build)
    path = build.folder / MODEL_FILES[0]
    quantization = None
    with build.fp32_file() as base:
        if build.calibration is not None:
            check_calibration(build.calibration, onnx.load(base))
        if build.input == "float":
            rewrite(base, base, with_float_input)
        if build.precision == "int8":
            scheme = OpenVinoInt8(build.metadata, build.feed, embeds=build.bank is not None)
            quantization = build.quantize(scheme, base, path)
        else:
            save(read(base), path, build.metadata, halved=build.precision != "fp32")
    return Written(
        format="openvino",
        files=(*MODEL_FILES, *agent_beside(build)),
        inputs=(build.image,),
        outputs=(build.output,),
        quantization=quantization,
        details={"openvino": version_of(openvino), "inference_precision": computes_in},
    )


def _inference_precision(build: Build) -> str:
    """Return what the file's float layers compute in; `f32` unless the option is set."""
    chosen = str(build.options.get("inference_precision") or "f32")
    if chosen not in INFERENCE_PRECISIONS:
        raise EdgekdError(
            f'OpenVINO has no inference precision "{chosen}".',
            did_you_mean(chosen, INFERENCE_PRECISIONS),
        )
    if build.precision == "fp32" and chosen != "f32":
        raise EdgekdError(
            f"An fp32 file gives the student's own logits, which {chosen} does not.",
            "Export with --fp16 or --int8 for this inference precision.",
        )
    return chosen
