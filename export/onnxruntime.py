"""The writer for ONNX Runtime: one `model.onnx`, in fp32, fp16 or int8."""

from __future__ import annotations

from edgekd.export.quantize.onnxruntime import OnnxRuntimeInt8
from edgekd.export.writer import Build, Written, agent_beside, write_onnx

MODEL_FILE = "model.onnx"


def write(build: Build) -> Written:
    """Write `model.onnx` in the wanted precision."""
    options = build.config.options
    scheme = OnnxRuntimeInt8(padded=options.get("padding", True))
    quantization = write_onnx(build, build.folder / MODEL_FILE, scheme)
    files = (MODEL_FILE, *agent_beside(build))
    return Written(files, (build.image,), (build.output,), quantization, options)
