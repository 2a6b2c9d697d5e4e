"""The writer for ONNX Runtime: one `model.onnx`, in fp32, fp16 or int8."""

from __future__ import annotations

from edgekd.export.build import Build, Written, fp32_onnx, image_input, logits_output
from edgekd.export.mixed import quantize_within
from edgekd.export.quantize import quantize_int8, to_fp16

MODEL_FILE = "model.onnx"


def write(build: Build) -> Written:
    """Write `model.onnx` in the wanted precision."""
    model, quantization = build.folder / MODEL_FILE, None
    if build.precision == "fp32":
        fp32_onnx(build, model)
    else:
        base = build.folder / "fp32.onnx"
        fp32_onnx(build, base)
        if build.precision == "int8":
            assert build.calibration is not None
            if build.yardstick is None:
                quantization = quantize_int8(base, model, build.calibration)
            else:
                quantization = quantize_within(base, model, build.calibration, build.yardstick)
        else:
            to_fp16(base, model)
        base.unlink()
    inputs, outputs = (image_input(build.preprocess.size),), (logits_output(len(build.classes)),)
    return Written("onnx", (MODEL_FILE,), inputs, outputs, quantization)
