"""The writer for ONNX Runtime: one `model.onnx`, in fp32, fp16 or int8."""

from __future__ import annotations

from functools import partial
from typing import Any

from edgekd.export.build import Build, Written, image_input, write_onnx, write_tuned, write_within
from edgekd.export.dialect import Dialect
from edgekd.export.mixed import file_logits
from edgekd.export.quantize import calibrate, quantize_int8, weight_grid, write_int8
from edgekd.export.units import units_of
from edgekd.targets.devices.zipapp import write_agent

MODEL_FILE = "model.onnx"
AGENT_FILE = "edgekd-agent.pyz"
"""Beside a model that ends in an embedding: classifies and adds classes with Python, numpy, Pillow and ONNX Runtime."""
DIALECT = Dialect(calibrate, write_int8, weight_grid, units_of, file_logits, rest="fp32", timed=True)


def write(build: Build) -> Written:
    """Write `model.onnx` in the wanted precision."""
    path, trained = build.folder / MODEL_FILE, None
    quantization: dict[str, Any] | None
    if build.tuner is not None:
        quantization, trained = write_tuned(build, path, DIALECT)
    elif build.yardstick is not None:
        quantization = write_within(build, path, DIALECT)
    else:
        quantization = write_onnx(build, path, partial(quantize_int8, calibrator=build.calibrator))
    files: tuple[str, ...] = (MODEL_FILE,)
    if build.bank is not None:  # the device itself can add classes, with what lies in the folder
        write_agent(build.folder / AGENT_FILE)
        files += (AGENT_FILE,)
    inputs, outputs = (image_input(build.preprocess.size),), (build.output,)
    return Written("onnx", files, inputs, outputs, quantization, trained=trained)
