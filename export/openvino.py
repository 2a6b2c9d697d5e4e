"""The writer for OpenVINO: its IR, `model.xml` with `model.bin`, in fp32, fp16 or int8."""

from __future__ import annotations

from edgekd.export.onnx.graphs import rewrite, with_float_input
from edgekd.export.openvino_ir import read, save
from edgekd.export.quantize.calibration import check_calibration
from edgekd.export.quantize.openvino import OpenVinoInt8
from edgekd.export.writer import Build, Written, agent_beside
from edgekd.targets.openvino import load_openvino, version_of

MODEL_FILES = ("model.xml", "model.bin")


def write(build: Build) -> Written:
    """Write the IR of the fp32 ONNX file; int8 uses NNCF's post-training quantization.

    It is `NotHere` without OpenVINO, and an `EdgekdError` for another release of it, for useless calibration images,
    and for a graph that OpenVINO or NNCF does not take.
    """
    openvino = load_openvino()
    # Float layers compute in float32 unless the option is set.
    computes_in = build.config.inference_precision or "f32"
    source, precision = build.source, build.config.precision
    path, quantization = build.folder / MODEL_FILES[0], None
    with build.fp32_file() as base:
        if precision == "int8" and source.calibration is not None:
            check_calibration(source.calibration)
        if build.config.input == "float":
            rewrite(base, base, with_float_input)
        if precision == "int8":
            scheme = OpenVinoInt8(source.metadata, build.feed, embeds=source.bank is not None)
            quantization = build.quantize(scheme, base, path)
        else:
            save(read(base), path, source.metadata, halved=precision != "fp32")
    return Written(
        files=(*MODEL_FILES, *agent_beside(build)),
        inputs=(build.image,),
        outputs=(build.output,),
        quantization=quantization,
        details={"openvino": version_of(openvino), "inference_precision": computes_in},
    )
