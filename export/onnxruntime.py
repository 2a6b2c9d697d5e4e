"""The writer for ONNX Runtime: one `model.onnx`, in fp32, fp16 or int8."""

from __future__ import annotations

from functools import partial
from typing import Any

from edgekd.export.build import Build, Written, agent_beside, write_onnx, write_within
from edgekd.export.onnx_eval import runtime_evaluator
from edgekd.export.quantize.groups import groups_of
from edgekd.export.quantize.onnxruntime import calibrate, quantize_int8, weight_grid, write_int8
from edgekd.export.quantize.scheme import onnx_scheme

MODEL_FILE = "model.onnx"
SCHEME = onnx_scheme(
    calibrate,
    write_int8,
    groups_of,
    grid=weight_grid,
    open=runtime_evaluator,
    rest="fp32",
    timed=True,
)


def write(build: Build) -> Written:
    """Write `model.onnx` in the wanted precision."""
    path = build.folder / MODEL_FILE
    quantization: dict[str, Any] | None
    if build.budget is not None:
        quantization = write_within(build, path, SCHEME)
    else:
        quantization = write_onnx(build, path, partial(quantize_int8, calibrator=build.calibrator))
    files = (MODEL_FILE, *agent_beside(build))
    return Written("onnx", files, (build.image,), (build.output,), quantization)
