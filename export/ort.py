"""The writer for ONNX Runtime: one `model.onnx`, in fp32, fp16 or int8."""

from __future__ import annotations

from functools import partial
from typing import Any

from edgekd.export.build import Build, Written, image_input, logits_output, write_onnx, write_tuned
from edgekd.export.mixed import file_logits, quantize_within
from edgekd.export.qat import Dialect
from edgekd.export.quantize import calibrate, quantize_int8, weight_grid, write_int8

MODEL_FILE = "model.onnx"
DIALECT = Dialect(calibrate, write_int8, weight_grid, file_logits)


def write(build: Build) -> Written:
    """Write `model.onnx` in the wanted precision."""
    path, trained = build.folder / MODEL_FILE, None
    quantization: dict[str, Any] | None
    if build.tuner is not None:
        quantization, trained = write_tuned(build, path, DIALECT)
    elif build.yardstick is not None:
        within = partial(quantize_within, yardstick=build.yardstick, calibrator=build.calibrator)
        quantization = write_onnx(build, path, within)
    else:
        quantization = write_onnx(build, path, partial(quantize_int8, calibrator=build.calibrator))
    inputs, outputs = (image_input(build.preprocess.size),), (logits_output(len(build.classes)),)
    return Written("onnx", (MODEL_FILE,), inputs, outputs, quantization, trained=trained)
