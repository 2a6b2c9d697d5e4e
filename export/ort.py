"""The writer for ONNX Runtime: one `model.onnx`, in fp32, fp16 or int8."""

from __future__ import annotations

from functools import partial

from edgekd.export.build import Build, Written, image_input, logits_output, write_onnx
from edgekd.export.mixed import quantize_within
from edgekd.export.quantize import quantize_int8

MODEL_FILE = "model.onnx"


def write(build: Build) -> Written:
    """Write `model.onnx` in the wanted precision."""
    quantize = partial(quantize_int8, calibrator=build.calibrator)
    if build.yardstick is not None:
        quantize = partial(quantize_within, yardstick=build.yardstick, calibrator=build.calibrator)
    quantization = write_onnx(build, build.folder / MODEL_FILE, quantize)
    inputs, outputs = (image_input(build.preprocess.size),), (logits_output(len(build.classes)),)
    return Written("onnx", (MODEL_FILE,), inputs, outputs, quantization)
