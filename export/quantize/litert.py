"""INT8 for LiteRT: ai-edge-quantizer's static quantization with edgekd's ranges, corrected biases and float logits.

Activations are int8 per tensor, weights int8 per output channel. The last layer also has int8 weights, but quantizes
its input dynamically and gives float logits: the step of int8 logits on PACS would be 0.2, more than the margin of some
images.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.export.quantize.calibration import (
    Calibrator,
    Means,
    Ranges,
    counted,
    lost_by_rounding,
    narrowed,
    refuse_infinite,
)

METHOD = "ai-edge-quantizer static_wi8_ai8; the last layer rounds activations per image"
_OUTPUTS = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0}
"""Kind of layer → the axis of its weight's output channels."""


def quantize(
    base: Path, out: Path, images: NDArray[np.uint8], calibrator: Calibrator
) -> dict[str, Any]:
    """Write the float file `base` in INT8 to `out`.

    Args:
        images: RGB uint8 `[N, H, W, 3]` of the training domains.

    Returns:
        What was done, for `artifact.json`.
    """
    from ai_edge_quantizer import quantizer

    graph = _Graph.of(base)
    ranges, means = graph.observe(images)
    if calibrator != "minmax":
        counts = counted(graph.values(images), ranges)
        ranges = narrowed(counts, ranges, calibrator, symmetric=False)
    corrected = graph.correct_biases(ranges, means)
    found = {
        name: {"min": low.reshape(shape), "max": high.reshape(shape)}
        for name, (low, high) in ranges.items()
        for shape in [(1,) * graph.activations[name][1]]
    }
    work = quantizer.Quantizer(graph.model, graph.recipe())
    work.quantize(found, enable_progress_report=False).export_model(str(out))
    return {
        "scheme": METHOD,
        "calibrator": calibrator,
        "calibration_images": len(images),
        "corrected_biases": corrected,
    }


@dataclass(frozen=True)
class _Graph:
    """A .tflite file in memory."""

    model: bytearray
    content: Any
    """The parsed file; constants are views of `model`, so changing them changes the file."""
    utils: Any

    @classmethod
    def of(cls, path: Path) -> _Graph:
        from ai_edge_quantizer.utils import tfl_flatbuffer_utils

        model = bytearray(path.read_bytes())
        return cls(model, tfl_flatbuffer_utils.read_model(model), tfl_flatbuffer_utils)

    @property
    def operators(self) -> list[Any]:
        operators: list[Any] = self.content.subgraphs[0].operators
        return operators

    def kind(self, operator: Any) -> str:
        """Return the kind of an operator, empty for one that is not quantized."""
        code = self.content.operatorCodes[operator.opcodeIndex].builtinCode
        return str(getattr(self.utils.TFL_OP_CODE_TO_NAME.get(code), "value", ""))

    def name(self, index: int) -> str:
        """Return the name of a tensor."""
        return str(self.utils.get_tensor_name(self.content.subgraphs[0].tensors[index]))

    def constant(self, index: int) -> NDArray[Any] | None:
        """Return the values of a constant, as a view; None for an activation."""
        tensor = self.content.subgraphs[0].tensors[index]
        found: NDArray[Any] | None = self.utils.get_tensor_data(tensor, self.content.buffers)
        return found

    @functools.cached_property
    def activations(self) -> dict[str, tuple[int, int]]:
        """Return name → index and rank of every float activation."""
        tensors = self.content.subgraphs[0].tensors
        kinds = self.utils.TENSOR_CODE_TO_TYPE
        return {
            self.name(index): (index, len(tensors[index].shape))
            for operator in self.operators
            for index in operator.outputs
            if kinds[tensors[index].type] == "FLOAT32"
        }

    def values(self, images: NDArray[np.uint8]) -> Iterator[dict[str, NDArray[np.float32]]]:
        """Yield the activations by name, image by image.

        The quantizer's own calibration reads every constant again for every image.
        """
        from ai_edge_litert.interpreter import Interpreter

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that keeping all tensors needs memory
            running = Interpreter(
                model_content=bytes(self.model),
                num_threads=1,
                experimental_preserve_all_tensors=True,
            )
        running.allocate_tensors()
        [image], swished = running.get_input_details(), self._swished()
        for picture in images:
            running.set_tensor(image["index"], picture[None])
            running.invoke()
            found = {
                name: running.get_tensor(index) for name, (index, _) in self.activations.items()
            }
            for name in swished:
                np.maximum(found[name], -3, out=found[name])
            yield found

    def observe(self, images: NDArray[np.uint8]) -> tuple[Ranges, Means]:
        """Return the extremes of every activation, and the mean of each channel of the layers' inputs.

        The quantizer's default is a moving average of the extremes, which clips rare values.
        """
        read = {self.name(one.inputs[0]) for one in self.operators if self.kind(one) in _OUTPUTS}
        ranges: Ranges = {}
        means: Means = {}
        for found in self.values(images):
            for name, value in found.items():
                low, high = ranges.get(name, (np.float32(np.inf), np.float32(-np.inf)))
                ranges[name] = (
                    np.asarray(np.minimum(low, value.min())),
                    np.asarray(np.maximum(high, value.max())),
                )
                if name in read:
                    channels = value.reshape(-1, value.shape[-1]).mean(axis=0, dtype=np.float64)
                    means[name] = means.get(name, 0) + channels / len(images)
        refuse_infinite(ranges)
        return ranges, means

    def _swished(self) -> list[str]:
        """Return the activations used only by a HardSwish, which is 0 below -3."""
        readers = Counter(index for one in self.operators for index in one.inputs)
        return [
            self.name(one.inputs[0])
            for one in self.operators
            if self.kind(one) == "HARD_SWISH" and readers[one.inputs[0]] == 1
        ]

    def correct_biases(self, ranges: Ranges, means: Means) -> int:
        """Correct each bias for the average shift of rounding the weights, in place; return the number of biases."""
        tensors, corrected = self.content.subgraphs[0].tensors, 0
        readers = Counter(
            tensors[index].buffer for one in self.operators for index in one.inputs if index >= 0
        )
        for operator in self.operators:
            kind, inputs = self.kind(operator), list(operator.inputs)
            if kind not in _OUTPUTS or len(inputs) < 3 or inputs[2] < 0:
                continue
            weight, bias = self.constant(inputs[1]), self.constant(inputs[2])
            read = self.name(inputs[0])
            if weight is None or bias is None or read not in means:
                continue
            if any(readers[tensors[index].buffer] > 1 for index in inputs[1:3]):
                continue  # several layers share them
            if kind != "FULLY_CONNECTED":  # [O, H, W, I], or [1, H, W, O] of a depthwise one
                weight = weight.transpose((0, 3, 1, 2) if kind == "CONV_2D" else (3, 0, 1, 2))
            scales = np.abs(weight.reshape(len(weight), -1)).max(axis=1) / 127
            # The scale of an int32 bias is the product of both scales, which is too small for tiny weights. A weight of
            # this size changes the output by less than 0.2 % of the bias.
            step = float(ranges[read][1] - ranges[read][0]) / 255
            least = np.abs(bias) / max(step, 1e-9) / 2.0**24
            tiny = scales < least
            weight[(tiny, *[0] * (weight.ndim - 1))] = 127 * least[tiny]
            scales = np.maximum(scales, least)
            bias += lost_by_rounding(weight, np.where(scales > 0, scales, 1), means[read]).astype(
                bias.dtype
            )
            corrected += 1
        return corrected

    def recipe(self) -> Any:
        """Return the quantizer's recipe."""
        from ai_edge_quantizer import algorithm_manager, qtyping, recipe, recipe_manager

        rules = recipe_manager.RecipeManager()
        rules.load_quantization_recipe(recipe.static_wi8_ai8())
        kinds, in_float = qtyping.TFLOperationName, algorithm_manager.AlgorithmName.NO_QUANTIZE
        layers = [self.kind(operator) == kinds.FULLY_CONNECTED.value for operator in self.operators]
        if any(layers):
            last = len(layers) - 1 - layers[::-1].index(True)
            scope, *behind = map(self._scope, self.operators[last:])
            rules.add_quantization_config(".*", kinds.OUTPUT, algorithm_key=in_float)
            rules.add_dynamic_config(scope, kinds.FULLY_CONNECTED, 8)
            for one in behind:  # of an embedding, which is divided by its length
                rules.add_quantization_config(one, kinds.ALL_SUPPORTED, algorithm_key=in_float)
        return rules.get_quantization_recipe()

    def _scope(self, operator: Any) -> str:
        """Return the pattern of a rule for one operator."""
        name = self.utils.get_op_scope(operator, self.content.subgraphs[0].tensors)
        return f"^{re.escape(name)}$"
