"""The writer for ExecuTorch: one `model.pte` for its XNNPACK backend, in fp32 or int8."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch

from edgekd.core.errors import NotHere
from edgekd.core.manifest import TensorSpec
from edgekd.export.quantize.executorch import quantize
from edgekd.export.writer import Build, Written, converting

MODEL_FILE = "model.pte"
INPUT = "images"


def write(build: Build) -> Written:
    """Write `model.pte`: RGB uint8 `[1, H, W, 3]` in, float32 logits out; made for one image at a time.

    int8 is that of `quantize.executorch`: int8 activations per tensor, int8 weights per channel, float logits.

    Raises:
        NotHere: ExecuTorch is not installed.
        EdgekdError: an operator that it does not take.
    """
    _load()
    size = build.preprocess.size
    example = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    with converting("Lowering to ExecuTorch"):
        program, quantization = _lowered(build, example)
    (build.folder / MODEL_FILE).write_bytes(program)
    output = build.output.model_copy(update={"shape": (1, *build.output.shape[1:])})
    image = TensorSpec(name=INPUT, dtype="uint8", shape=(1, size, size, 3), layout="NHWC RGB")
    details = {"executorch": version("executorch"), "backend": "XNNPACK"}
    return Written("executorch", (MODEL_FILE,), (image,), (output,), quantization, details)


def _load() -> None:
    try:
        import executorch.exir
        import executorch.runtime  # noqa: F401
    except (ImportError, OSError) as error:
        raise NotHere(
            f"ExecuTorch is not on this machine ({error}).", 'pip install "edgekd[executorch]"'
        ) from error


def _lowered(build: Build, example: torch.Tensor) -> tuple[bytes, dict[str, Any] | None]:
    """Return the program, and the record of its calibration."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    model: torch.nn.Module = build.model.eval()
    quantization = None
    if build.precision == "int8":
        assert build.calibration is not None
        model, quantization = quantize(build.model, example, build.calibration)
    graph = torch.export.export(model, (example,))
    edge = to_edge_transform_and_lower(graph, partitioner=[XnnpackPartitioner()])
    return bytes(edge.to_executorch().buffer), quantization
