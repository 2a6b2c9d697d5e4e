"""The writer for LiteRT: one `model.tflite`, in fp32, fp16, int8 or with 8-bit weights.

INT8 is ai-edge-quantizer's static quantization with edgekd's ranges, corrected biases and float logits: activations
are int8 per tensor, weights int8 per output channel. The last layer has int8 weights too, but rounds its input for each
image anew and gives float: over all images of PACS the 256 steps of int8 logits would be 0.2 apart, and some images
decide by less.
"""

from __future__ import annotations

import functools
import re
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.core.errors import optional
from edgekd.core.manifest import LABELS_FILE, TensorSpec
from edgekd.export.quantize.calibration import (
    Calibrator,
    Means,
    Ranges,
    counted,
    lost_by_rounding,
    narrowed,
    refuse_infinite,
)
from edgekd.export.writer import Build, Written, agent_beside, converting

MODEL_FILE = "model.tflite"
INPUT = "images"
"""Name of the input in the signature, the parameter of `Deployable.forward`."""
_PACKAGES = ("litert-torch", "ai-edge-quantizer", "ai-edge-litert")
METHOD = "ai-edge-quantizer static_wi8_ai8; the last layer rounds activations per image"
_OUTPUTS = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0}
"""Kind of layer → the axis of its weight's output channels."""


def write(build: Build) -> Written:
    """Write `model.tflite`: RGB uint8 `[1, H, W, 3]` → one row, one image at a time.

    fp16 and int8-weights store weights in fewer bits and compute in float. It is `NotHere` without the packages, and an
    `EdgekdError` for an operator that litert-torch or the quantizer does not take.
    """
    for package in ("ai_edge_litert.interpreter", "ai_edge_quantizer", "litert_torch"):
        optional(package, "litert", "The LiteRT target")
    size, path = build.source.preprocess.size, build.folder / MODEL_FILE
    with tempfile.TemporaryDirectory() as scratch:
        base = path if build.config.precision == "fp32" else Path(scratch) / MODEL_FILE
        _convert(build, base, torch.zeros(1, size, size, 3, dtype=torch.uint8))
        quantization = None if base == path else _quantize(build, base, path)
    if build.source.bank is None:
        _attach_labels(path, build.source.classes)
    output = build.output.model_copy(update={"shape": (1, *build.output.shape[1:])})
    image = TensorSpec(name=INPUT, dtype="uint8", shape=(1, size, size, 3), layout="NHWC RGB")
    return Written(
        files=(MODEL_FILE, *agent_beside(build)),
        inputs=(image,),
        outputs=(output,),
        quantization=quantization,
        details={name: version(name) for name in _PACKAGES},
    )


def _attach_labels(path: Path, classes: Sequence[str]) -> None:
    """Append the classes as an associated file, a ZIP archive after the model, which interpreters ignore."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo(LABELS_FILE), "".join(f"{name}\n" for name in classes))


def _convert(build: Build, path: Path, example: torch.Tensor) -> None:
    import litert_torch

    with converting("Conversion by litert-torch"):
        model = litert_torch.convert(build.source.model.eval(), sample_kwargs={INPUT: example})
        model.export(str(path))


def _quantize(build: Build, base: Path, path: Path) -> dict[str, Any] | None:
    """Write `base` with fewer bits to `path`, and return the record of the calibration."""
    from ai_edge_quantizer import quantizer, recipe

    precision, images = build.config.precision, build.source.calibration
    with converting(f"{precision} by ai-edge-quantizer"):
        if precision == "int8":
            assert images is not None
            return _quantized(base, path, images, build.calibrator)
        rules = _half() if precision == "fp16" else recipe.weight_only_wi8_afp32()
        work = quantizer.Quantizer(str(base), rules)
        work.quantize(enable_progress_report=False).export_model(str(path))
    return None


def _half() -> Any:
    """Return the recipe that stores every weight as float16."""
    from ai_edge_quantizer import qtyping, recipe_manager

    rules = recipe_manager.RecipeManager()
    weights = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
    rules.add_quantization_config(
        ".*",
        qtyping.TFLOperationName.ALL_SUPPORTED,
        qtyping.OpQuantizationConfig(
            weight_tensor_config=weights,
            compute_precision=qtyping.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        ),
        "float_casting",
    )
    return rules.get_quantization_recipe()


def _quantized(
    base: Path, out: Path, images: NDArray[np.uint8], calibrator: Calibrator
) -> dict[str, Any]:
    """Write the float file `base` in INT8 to `out`; return what was done, for `artifact.json`.

    `images` are RGB uint8 `[N, H, W, 3]` of the training domains.
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
    """As the quantizer's package reads it; constants are views of `model`, so that a change of one changes the file."""
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
        """Return what an operator is, empty for one that is not quantized."""
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
        """Name → index and rank of every float tensor that an operator writes."""
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

        The quantizer's own calibration would look at every constant anew for every image.
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

        The quantizer's own way is a moving average of the extremes, which cuts off what few images reach.
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
        """Return the activations that only a HardSwish reads, which is 0 below -3 in any case."""
        readers = Counter(index for one in self.operators for index in one.inputs)
        return [
            self.name(one.inputs[0])
            for one in self.operators
            if self.kind(one) == "HARD_SWISH" and readers[one.inputs[0]] == 1
        ]

    def correct_biases(self, ranges: Ranges, means: Means) -> int:
        """Add to each bias what rounding the weights takes away on average, in place; return how many there are."""
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
            # An int32 bias has the product of both steps as its unit, which tiny weights make too small for it. One
            # weight of this size moves the output by less than 0.2 % of the bias.
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
        """Return what is quantized how."""
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
        """Return the pattern that a rule has for one operator."""
        name = self.utils.get_op_scope(operator, self.content.subgraphs[0].tensors)
        return f"^{re.escape(name)}$"
