"""The writer for ExecuTorch: one `model.pte` for its XNNPACK backend, in fp32 or int8.

INT8 is torchao's post-training quantization, with four things done otherwise.

- What a clip (ReLU6) or a HardSwish throws away takes no part in the range of what it reads.
- A mean has a range of its own, not that of the map it averages, which is several times as wide.
- The last layer has int8 weights, but rounds its input for each image anew and gives float logits.
- Biases take back what rounding the weights shifts on average.
"""

from __future__ import annotations

import dataclasses
import operator
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from edgekd.core.errors import optional
from edgekd.core.manifest import TensorSpec
from edgekd.export.graph import Deployable
from edgekd.export.quantize.calibration import lost_by_rounding
from edgekd.export.writer import Build, Written, converting

MODEL_FILE = "model.pte"
INPUT = "images"
METHOD = "XNNPACKQuantizer, symmetric, per channel; the last layer rounds activations per image"
_HEAD = "head"
"""Name of the last layer, or of the module that holds it, in a `Deployable`."""
_ATEN = torch.ops.aten
_CLIPS = (_ATEN.hardtanh.default, _ATEN.hardtanh_.default)
_SWISHES = (_ATEN.hardswish.default, _ATEN.hardswish_.default)
_MEANS = (_ATEN.mean.dim, _ATEN.adaptive_avg_pool2d.default)
_LAYERS = {_ATEN.conv2d.default: 1, _ATEN.linear.default: -1}
"""Layers with weights → the axis of their input's channels."""


def write(build: Build) -> Written:
    """Write `model.pte`: RGB uint8 `[1, H, W, 3]` → float32 logits, one image at a time.

    It is `NotHere` without ExecuTorch, and an `EdgekdError` for an operator that ExecuTorch does not take.
    """
    for package in ("executorch.exir", "executorch.runtime"):
        optional(package, "executorch", "The ExecuTorch target")
    size = build.source.preprocess.size
    example = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    with converting("Lowering to ExecuTorch"):
        program, quantization = _lowered(build, example)
    (build.folder / MODEL_FILE).write_bytes(program)
    output = build.output.model_copy(update={"shape": (1, *build.output.shape[1:])})
    image = TensorSpec(name=INPUT, dtype="uint8", shape=(1, size, size, 3), layout="NHWC RGB")
    details = {"executorch": version("executorch"), "backend": "XNNPACK"}
    return Written((MODEL_FILE,), (image,), (output,), quantization, details)


def _lowered(build: Build, example: torch.Tensor) -> tuple[bytes, dict[str, Any] | None]:
    """Return the program, and the record of its calibration."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    model: torch.nn.Module = build.source.model.eval()
    quantization = None
    if build.config.precision == "int8":
        assert build.source.calibration is not None
        model, quantization = _quantized(build.source.model, example, build.source.calibration)
    graph = torch.export.export(model, (example,))
    edge = to_edge_transform_and_lower(graph, partitioner=[XnnpackPartitioner()])
    return bytes(edge.to_executorch().buffer), quantization


def _quantized(
    model: Deployable, example: Tensor, images: NDArray[np.uint8]
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Return `model` with Q/DQ pairs, to be lowered, and what was done, for `artifact.json`.

    `example` is uint8 `[1, H, W, 3]`, `images` are RGB uint8 `[N, H, W, 3]` of the training domains.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    observed = prepare_pt2e(torch.export.export(model, (example,)).module(), _rules())
    watched = _Watched(observed)
    with torch.inference_mode():
        for image in images:
            watched.run(torch.from_numpy(image[None].copy()))
        corrected = watched.correct_biases(len(images))
    record = {
        "scheme": METHOD,
        "calibrator": "minmax",
        "calibration_images": len(images),
        "corrected_biases": corrected,
    }
    return convert_pt2e(observed), record


class _Watched(fx.Interpreter):
    """Runs a graph with observers, and sums up the mean of each channel of the layers' inputs."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.sums: dict[fx.Node, Tensor] = {}

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "call_function" and node.target in _LAYERS:
            value = self.fetch_args_kwargs_from_env(node)[0][0].double()
            axis = _LAYERS[node.target] % value.ndim
            mean = value.mean([other for other in range(value.ndim) if other != axis])
            self.sums[node] = self.sums.get(node, 0) + mean
        return super().run_node(node)

    def correct_biases(self, runs: int) -> int:
        """Add to each bias what rounding the weights takes away on average, in place; return how many there are."""
        corrected = 0
        for node, total in self.sums.items():
            rounded, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
            if not (isinstance(rounded, fx.Node) and isinstance(bias, fx.Node)):
                continue
            if rounded.op != "call_module" or bias.op != "get_attr":
                continue  # a layer in float
            weight = self._attribute(rounded.args[0])
            scales, _ = self._attribute(rounded).calculate_qparams()
            lost = lost_by_rounding(weight.numpy(), scales.numpy(), (total / runs).numpy())
            self._attribute(bias).add_(torch.from_numpy(lost))
            corrected += 1
        return corrected

    def _attribute(self, node: Any) -> Any:
        return operator.attrgetter(node.target)(self.module)


def _rules() -> Any:
    """Return XNNPACK's quantizer with what is named above."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e import MinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    class Floored(MinMaxObserver):  # type: ignore[misc]
        """Takes everything below -3, where HardSwish is 0, for -3."""

        def forward(self, x: Tensor) -> Tensor:
            super().forward(x.clamp(min=-3))
            return x

    config = get_symmetric_quantization_config(is_per_channel=True)
    # Its own observers keep a histogram of every tensor, and search each of them anew after every image.
    spec, floored = (
        dataclasses.replace(
            config.input_activation, observer_or_fake_quant_ctr=kind.with_args(eps=2**-12)
        )
        for kind in (MinMaxObserver, Floored)
    )

    class Rules(XNNPACKQuantizer):  # type: ignore[misc]
        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            marked: fx.GraphModule = super().annotate(model)
            for node in marked.graph.nodes:
                source = node.args[0] if node.args else None
                if not isinstance(source, fx.Node):
                    continue
                before = source.meta.get(Q_ANNOTATION_KEY)
                if before is None or before.output_qspec is None:
                    continue
                if node.target in _MEANS:
                    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                        input_qspec_map={source: spec}, output_qspec=spec, _annotated=True
                    )
                if len(source.users) > 1 or source.target not in _LAYERS:
                    continue
                if node.target in _SWISHES:
                    before.output_qspec = floored
                if node.target in _CLIPS:
                    before.output_qspec = None
                    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                        output_qspec=spec, _annotated=True
                    )
            return marked

    layers = dataclasses.replace(config, input_activation=spec, output_activation=spec)
    last = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    return Rules().set_global(layers).set_module_name(_HEAD, last)
