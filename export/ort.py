"""The writer for ONNX Runtime: one `model.onnx`, in fp32, fp16 or int8."""

from __future__ import annotations

from functools import partial
from typing import Any

from edgekd.export.build import Build, Written, image_input, logits_output, write_onnx
from edgekd.export.mixed import file_logits, quantize_within
from edgekd.export.qat import Dialect, quantize_tuned
from edgekd.export.quantize import quantize_int8, weight_grid, write_int8

MODEL_FILE = "model.onnx"
DIALECT = Dialect(write_int8, weight_grid, file_logits)


def write(build: Build) -> Written:
    """Write `model.onnx` in the wanted precision."""
    path, trained = build.folder / MODEL_FILE, None
    if build.tuner is not None:
        tuned = write_onnx(build, path, partial(quantize_tuned, dialect=DIALECT, tuner=build.tuner))
        assert tuned is not None
        quantization: dict[str, Any] | None = tuned[0]
        trained = tuned[1]
    else:
        quantize = quantize_int8 if build.yardstick is None else partial(quantize_within, yardstick=build.yardstick)
        quantization = write_onnx(build, path, quantize)
    inputs, outputs = (image_input(build.preprocess.size),), (logits_output(len(build.classes)),)
    return Written("onnx", (MODEL_FILE,), inputs, outputs, quantization, trained=trained)
