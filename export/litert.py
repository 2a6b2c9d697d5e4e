"""The writer for LiteRT: one `model.tflite`, in fp32, fp16, int8 or with 8-bit weights."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from edgekd.core.errors import NotHere
from edgekd.core.manifest import LABELS_FILE, TensorSpec
from edgekd.export.quantize.litert import quantize
from edgekd.export.writer import Build, Written, agent_beside, converting

MODEL_FILE = "model.tflite"
INPUT = "images"
"""The signature's name of the input: the parameter of `Deployable.forward`."""
_PACKAGES = ("litert-torch", "ai-edge-quantizer", "ai-edge-litert")


def write(build: Build) -> Written:
    """Write `model.tflite`: RGB uint8 `[1, H, W, 3]` in, one row out; made for one image at a time.

    fp16 and int8-weights store weights in fewer bits and compute in float; int8 is that of `quantize.litert`.

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
    output = build.output.model_copy(update={"shape": (1, *build.output.shape[1:])})
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

    with converting(f"{build.precision} by ai-edge-quantizer"):
        if build.precision == "int8":
            assert build.calibration is not None
            return quantize(base, path, build.calibration, build.calibrator)
        rules = _half() if build.precision == "fp16" else recipe.weight_only_wi8_afp32()
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
