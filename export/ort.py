"""The writer for ONNX Runtime: one `model.onnx`, in fp32, fp16 or int8."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgekd.export.bank_graph import with_classes, without_classes
from edgekd.export.build import Build, Written, agent_beside, write_onnx, write_tuned
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
        quantization = write_onnx(build, path, partial(_within, build=build))
    else:
        quantization = write_onnx(build, path, partial(quantize_int8, calibrator=build.calibrator))
    files = (MODEL_FILE, *agent_beside(build))
    return Written("onnx", files, (build.image,), (build.output,), quantization, trained=trained)


def _within(fp32: Path, out: Path, calibration: NDArray[np.uint8], *, build: Build) -> dict[str, Any]:
    """INT8 within the build's yardstick, which asks for classes: an embedding's are in the file while it is made."""
    assert build.yardstick is not None
    within = partial(quantize_within, yardstick=build.yardstick, calibrator=build.calibrator)
    if build.bank is None:
        return within(fp32, out, calibration)
    onnx.save(with_classes(onnx.load(fp32), build.bank), fp32)
    described = within(fp32, out, calibration)
    onnx.save(without_classes(onnx.load(out)), out)
    return described
