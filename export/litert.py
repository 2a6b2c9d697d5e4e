"""The writer for LiteRT: one `model.tflite`, in fp32, fp16, int8 or with 8-bit weights."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.core.errors import NotHere
from edgekd.core.manifest import LABELS_FILE, TensorSpec
from edgekd.export.build import Build, Written, agent_beside, converting

MODEL_FILE = "model.tflite"
INPUT = "images"
"""The signature's name of the input: the parameter of `Deployable.forward`."""
_PACKAGES = ("litert-torch", "ai-edge-quantizer", "ai-edge-litert")


def write(build: Build) -> Written:
    """Write `model.tflite`: RGB uint8 `[1, H, W, 3]` in, one row out; made for one image at a time.

    fp16 and int8-weights store weights in fewer bits and compute in float. int8 is ai-edge-quantizer's static
    quantization: int8 activations per tensor, int8 weights per channel, and an int8 output with its scale.

    Raises:
        NotHere: the packages are not installed.
        EdgekdError: an operator that litert-torch or the quantizer does not take.
    """
    _load()
    size, path = build.preprocess.size, build.folder / MODEL_FILE
    with tempfile.TemporaryDirectory() as scratch:
        base = path if build.precision == "fp32" else Path(scratch) / MODEL_FILE
        _convert(build, base, torch.zeros(1, size, size, 3, dtype=torch.uint8))
        quantization = None if base == path else _quantize(build, base, path)
    if build.bank is None:
        _attach_labels(path, build.classes)
    is_int8 = build.precision == "int8"
    output = build.output.model_copy(
        update={"shape": (1, *build.output.shape[1:]), "dtype": "int8" if is_int8 else "float32"}
    )
    image = TensorSpec(name=INPUT, dtype="uint8", shape=(1, size, size, 3), layout="NHWC RGB")
    return Written(
        format="tflite",
        files=(MODEL_FILE, *agent_beside(build)),
        inputs=(image,),
        outputs=(output,),
        quantization=quantization,
        details={name: version(name) for name in _PACKAGES},
    )


def _attach_labels(path: Path, classes: Sequence[str]) -> None:
    """Append the classes as an associated file: a ZIP archive behind the model, which interpreters do not read."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo(LABELS_FILE), "".join(f"{name}\n" for name in classes))


def _load() -> None:
    try:
        import ai_edge_litert.interpreter  # noqa: F401
        import ai_edge_quantizer  # noqa: F401
        import litert_torch  # noqa: F401
    except (ImportError, OSError) as error:
        raise NotHere(
            f"LiteRT's converter is not on this machine ({error}).", 'pip install "edgekd[litert]"'
        ) from error


def _convert(build: Build, path: Path, example: torch.Tensor) -> None:
    import litert_torch

    with converting("Conversion by litert-torch"):
        model = litert_torch.convert(build.model.eval(), sample_kwargs={INPUT: example})
        model.export(str(path))


def _quantize(build: Build, base: Path, path: Path) -> dict[str, Any] | None:
    """Write `base` with fewer bits to `path`, and return the record of what was calibrated."""
    from ai_edge_quantizer import quantizer, recipe

    images = build.calibration if build.precision == "int8" else None
    recipes = {
        "int8": recipe.static_wi8_ai8,
        "int8-weights": recipe.weight_only_wi8_afp32,
        "fp16": _half,
    }
    with converting(f"{build.precision} by ai-edge-quantizer"):
        work = quantizer.Quantizer(str(base), recipes[build.precision]())
        ranges = None if images is None else _ranges(base, work, images)
        work.quantize(ranges).export_model(str(path))
    if images is None:
        return None
    return {"calibration_images": len(images), "calibrator": "minmax", "scheme": "static_wi8_ai8"}


def _ranges(base: Path, work: Any, images: NDArray[np.uint8]) -> Any:
    """Return the smallest and largest value of every tensor over the images.

    `Quantizer.calibrate` takes a moving average over images instead, which cuts off what few of them reach.
    """
    from ai_edge_quantizer import calibrator, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    rules = recipe_manager.RecipeManager()
    rules.load_quantization_recipe(work.get_quantization_recipe())
    found = calibrator.Calibrator(
        str(base),
        num_threads=1,
        mode=calibrator.CalibrationMode.CALIBRATION_PRESERVE_ALL_TENSORS,
        qsv_update_func=qsv_utils.min_max_update,
    )
    found.calibrate({_signature(base): [{INPUT: image[None]} for image in images]}, rules)
    return found.get_model_qsvs()


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


def _signature(path: Path) -> str:
    from ai_edge_litert.interpreter import Interpreter

    [name] = Interpreter(str(path)).get_signature_list()
    return str(name)
