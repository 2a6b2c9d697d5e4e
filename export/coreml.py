"""The writer for Core ML: an ML program in one `.mlpackage`, converted, compressed and checked on any machine.

From the torch program to float32, from there to half precision with the layers that it would ruin left in float32, then
compression. Each step is read back from disk and compared with the one before on real images.
"""

from __future__ import annotations

import contextlib
import copy
import json
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekd.core.console import say, warn
from edgekd.core.errors import EdgekdError, first_line
from edgekd.core.manifest import Artifact, TensorSpec
from edgekd.core.predictor import Predictor
from edgekd.core.readers import parse_json, read_json
from edgekd.core.version import __version__
from edgekd.export.graph import Deployable, UnitHead, torch_logits
from edgekd.export.mil.compress import (
    PALETTE_BITS,
    palettize,
    quantize_activations,
    quantize_weights,
)
from edgekd.export.mil.evaluate import logits_of
from edgekd.export.mil.program import MilProgram, import_coremltools, read_program
from edgekd.export.mil.ranges import Ranges, layers_to_keep, measure_ranges
from edgekd.export.onnx.write import quiet
from edgekd.export.parity import compare
from edgekd.export.writer import Build, Written
from edgekd.targets.coreml import EMBEDDING, load_embedder, load_package

PACKAGE = "model.mlpackage"
DEPLOYMENT = ("iOS17", "iOS18", "iOS26")
"""Oldest systems that an export can be made for, the default first: 8-bit activations came with it."""
_MODEL = f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel"
_SAMPLES = 32
"""Images for the range analysis and for the comparison of each step with the one before."""


class Program(nn.Module):
    """What Core ML runs: an image in, probabilities or a unit embedding out, normalisation and head inside."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: Deployable) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone, model.head
        # The deployable holds one statistic per value of a pixel row; its first three are the channels'.
        self.register_buffer("scale", model.scale[:3].reshape(1, 3, 1, 1).clone())
        self.register_buffer("shift", model.shift[:3].reshape(1, 3, 1, 1).clone())

    def forward(self, image: Tensor) -> Tensor:
        """RGB float32 `[1, 3, H, W]`, 0 to 255 → probabilities `[1, C]`, or an embedding `[1, D]`."""
        answer: Tensor = self.head(self.backbone(image * self.scale + self.shift))
        return answer if isinstance(self.head, UnitHead) else answer.softmax(1)


def write(build: Build) -> Written:
    """Write `model.mlpackage` in the wanted precision.

    Raises:
        EdgekdError: coremltools is missing, the student cannot be converted or checked, no images for the analysis.
    """
    coremltools = import_coremltools()
    deployment = str(build.options.get("deployment_target") or DEPLOYMENT[0])
    if deployment not in DEPLOYMENT:
        raise EdgekdError(
            f"Core ML models are not made for {deployment} here.",
            f"Known: {', '.join(DEPLOYMENT)}.",
        )
    started = time.perf_counter()
    size, classes = build.preprocess.size, build.classes if build.bank is None else None
    exported = capture(build.model, size)
    package, quantization = build.folder / PACKAGE, None
    details: dict[str, Any] = {}
    model = convert(exported, size, classes, deployment, half=False)
    if build.precision == "fp32":
        _save(model, package, build)
    else:
        quantization, details = _write_half(build, model, exported, classes, deployment)
    parts = sorted(part for part in package.rglob("*") if part.is_file())
    details |= {
        "minimum_deployment_target": deployment,
        "coremltools": coremltools.__version__,
        "package_mb": round(sum(part.stat().st_size for part in parts) / 1e6, 3),
        "write_seconds": round(time.perf_counter() - started, 1),
        "not_verified": "latency"
        if platform.system() == "Darwin"
        else "Apple's kernels, the Neural Engine, latency",
    }
    names = [str(part.relative_to(build.folder)) for part in parts]
    image = TensorSpec(
        name="image", dtype="image", shape=(size, size), layout="RGB, 8 bits per channel"
    )
    evaluate, by = _evaluation(build)
    return Written(
        format="coreml",
        files=(_MODEL, *(name for name in names if name != _MODEL)),
        inputs=(image,),
        outputs=_outputs(build),
        quantization=quantization,
        details=details,
        evaluate=evaluate,
        evaluated_by=by,
    )


def _write_half(
    build: Build,
    model: Any,
    exported: torch.export.ExportedProgram,
    classes: Collection[str] | None,
    deployment: str,
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Write the package in half precision, compressed further where wanted.

    Returns:
        What was quantized, and details: what half precision would do, and how far each step strays from the one before.
    """
    if build.calibration is None or len(build.calibration) == 0:
        raise EdgekdError(
            "The range analysis for half precision needs images.", "Give some training images."
        )
    samples = _spread(build.calibration, _SAMPLES)
    full = _read_back(model, build.folder)
    ranges = measure_ranges(full, samples)
    kept = layers_to_keep(full, ranges.hazards)
    _report(ranges, kept)
    size, quantization = build.preprocess.size, None
    model = convert(exported, size, classes, deployment, half=True, keep=kept)
    half = _read_back(model, build.folder)
    with _disk_errors():
        if build.precision == "int8-weights":
            model, quantization = quantize_weights(model)
        elif build.precision == "int8":
            say("int8: 8-bit weights and activations; --int8-weights is what --int8 was in 0.1")
            calibrated = measure_ranges(half, build.calibration)
            model, quantization = quantize_activations(model, half, calibrated)
            quantization["calibration_images"] = len(build.calibration)
        elif build.precision in PALETTE_BITS:
            model, quantization = palettize(model, PALETTE_BITS[build.precision])
    _save(model, build.folder / PACKAGE, build)
    return quantization, {
        "fp16_hazards": [hazard.as_json() for hazard in ranges.hazards],
        "float32_layers": sorted(kept),
        "links": _links(build, ranges, half, samples),
    }


SIMPLER: dict[Any, Callable[..., torch.Tensor]] = {
    torch.ops.aten.addcmul.default: lambda x, y, z, value=1: x + value * y * z,
    torch.ops.aten.alias.default: lambda x: x,
}
"""What coremltools cannot convert, in operations that it can: ConvNeXt V2's first, GhostNet's second."""


def capture(model: Deployable, size: int) -> torch.export.ExportedProgram:
    """Return the program as core operations, the form that coremltools converts whatever its numpy.

    Raises:
        EdgekdError: torch cannot trace the student.
    """
    whole = Program(copy.deepcopy(model).cpu()).eval()
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(whole, (torch.zeros(1, 3, size, size),))
            core: torch.export.ExportedProgram = program.run_decompositions(SIMPLER)
            return core
    except Exception as error:  # torch.export raises a dozen kinds
        raise EdgekdError(
            f"The student cannot be captured for Core ML ({first_line(error)}).",
            "Choose another student, or one built from common layers.",
        ) from error


def convert(
    exported: torch.export.ExportedProgram,
    size: int,
    classes: Collection[str] | None,
    deployment: str = DEPLOYMENT[0],
    *,
    half: bool,
    keep: Collection[str] = (),
) -> Any:
    """Return a coremltools model of the program: image input; class labels, or a float32 embedding.

    Args:
        classes: None for a program that ends in an embedding.
        deployment: the oldest system it must run on.
        half: compute in float16, but for `keep` and the softmax of a classifier, whose small probabilities float16
            would take for zero.
        keep: layers that stay in float32, by name.

    Raises:
        EdgekdError: an operation that coremltools does not support, or no room for its files.
    """
    coremltools = import_coremltools()

    def in_half(op: Any) -> bool:
        if {op.name, *(var.name for var in op.outputs)} & set(keep):
            return False
        if not (classes and op.op_type == "softmax"):
            return True
        return op is not [x for x in op.enclosing_block.operations if x.op_type == "softmax"][-1]

    precision = coremltools.precision.FLOAT32
    if half:
        precision = coremltools.transform.FP16ComputePrecision(in_half)
    rgb = coremltools.colorlayout.RGB
    image = coremltools.ImageType(name="image", shape=(1, 3, size, size), color_layout=rgb)
    name = "probabilities" if classes else EMBEDDING
    try:
        with _disk_errors(), quiet():
            return coremltools.convert(
                copy.deepcopy(exported),
                convert_to="mlprogram",
                compute_precision=precision,
                minimum_deployment_target=coremltools.target[deployment],
                inputs=[image],
                outputs=[coremltools.TensorType(name=name, dtype=np.float32)],
                classifier_config=coremltools.ClassifierConfig(list(classes)) if classes else None,
                skip_model_load=True,
            )
    except EdgekdError:
        raise
    except Exception as error:  # coremltools raises a dozen kinds
        raise EdgekdError(
            f"coremltools {coremltools.__version__} cannot convert the student ({first_line(error)}).",
            "Choose another student, or one built from common layers.",
        ) from error


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Explain a failure to write: coremltools builds packages in the temporary folder, by a library without reasons."""
    try:
        yield
    except RuntimeError as error:
        if "FileWriter" not in str(error):
            raise
        raise EdgekdError(
            f"coremltools could not write its files in {tempfile.gettempdir()}.",
            "Is the disk full? Free some space and run again; nothing half-written was kept.",
        ) from error


def _report(ranges: Ranges, kept: set[str]) -> None:
    for ruined, opening in (
        (True, "half precision would ruin"),
        (False, "look at on the device, left in half precision:"),
    ):
        found = [one.sentence for one in ranges.hazards if (one.layer in kept) is ruined]
        if found:
            more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
            warn(f"{opening} {'; '.join(found[:3])}{more}.")
    if kept:
        say(f"half precision: {len(kept)} layers stay in float32: {', '.join(sorted(kept))}")


def _read_back(model: Any, folder: Path) -> MilProgram:
    """Return the program of an unfinished model, by way of the disk, as Core ML would get it."""
    path = folder / "step.mlpackage"
    with quiet():
        model.save(str(path))
    try:
        return read_program(path)
    finally:
        shutil.rmtree(path)


def _save(model: Any, package: Path, build: Build) -> None:
    student = parse_json(build.metadata.get("provenance", "{}")).get("student")
    does = "Embeds an image"
    if build.bank is None:
        does = f"Classifies an image into {len(build.classes)} classes"
    model.short_description = f"{does}; {build.precision}." + (
        f" Student: {student}." if student else ""
    )
    model.version, model.author = __version__, "edgekd"
    size = build.preprocess.size
    model.input_description["image"] = f"RGB image, {size} × {size}"
    model.user_defined_metadata.update(dict(build.metadata))
    with quiet():
        model.save(str(package))
    # A map of operation names for another project's debugger; the package's own manifest does not list it.
    (package / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    _make_reproducible(package)


def _make_reproducible(package: Path) -> None:
    """Replace what coremltools draws at random in a package: the order of maps, and the identifiers of its items."""
    from coremltools.proto import Model_pb2

    for path in package.rglob("*.mlmodel"):
        spec = Model_pb2.Model()
        spec.ParseFromString(path.read_bytes())
        path.write_bytes(spec.SerializeToString(deterministic=True))
    manifest = read_json(package / "Manifest.json", "manifest of the Core ML package")
    names = {
        name: str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"]))
        for name, entry in manifest["itemInfoEntries"].items()
    }
    entries = {names[name]: entry for name, entry in manifest["itemInfoEntries"].items()}
    manifest["itemInfoEntries"] = entries
    manifest["rootModelIdentifier"] = names[manifest["rootModelIdentifier"]]
    text = json.dumps(manifest, indent=4, sort_keys=True)
    (package / "Manifest.json").write_text(text, encoding="utf-8")


def _outputs(build: Build) -> tuple[TensorSpec, ...]:
    if build.bank is not None:
        spec = build.output
        return (spec.model_copy(update={"name": EMBEDDING, "shape": (1, *spec.shape[1:])}),)
    return (
        TensorSpec(name="classLabel", dtype="string", shape=(), layout="most probable class"),
        TensorSpec(
            name="classLabel_probs",
            dtype="float64",
            shape=(len(build.classes),),
            layout="by class name",
        ),
    )


def _links(
    build: Build, ranges: Ranges, half: MilProgram, samples: NDArray[np.uint8]
) -> dict[str, dict[str, Any]]:
    """Return how far the logits of each step stray from those of the one before, on the same images."""
    rounded = logits_of(half, samples)
    package = logits_of(read_program(build.folder / PACKAGE), samples)
    steps = {
        "torch → float32 program": (torch_logits(build.model, samples), ranges.logits),
        "float32 → float16": (ranges.logits, rounded),
        "float16 → package": (rounded, package),
    }
    wanted = ("n", "max_error_relative", "cosine", "top1_agreement")
    compared = {name: compare(*map(build.logits, pair)) for name, pair in steps.items()}
    return {name: {key: numbers[key] for key in wanted} for name, numbers in compared.items()}


def reference(artifact: Artifact, folder: Path) -> Predictor:
    """Return the package in an artifact's folder, run by the reference evaluator: logits, or embeddings."""
    return _evaluator(folder)


def _evaluator(folder: Path) -> Predictor:
    program = read_program(folder / PACKAGE)
    return lambda images: logits_of(program, images)


def _evaluation(build: Build) -> tuple[Predictor, str]:
    """Return what the parity check runs, and its name: Core ML where it exists, else the reference evaluator."""
    if platform.system() != "Darwin":
        return _evaluator(build.folder), "edgekd's reference evaluator (Core ML needs macOS)"
    by = f"Core ML on macOS {platform.mac_ver()[0]}"
    if build.bank is not None:
        return load_embedder(build.folder / PACKAGE), by
    predict = load_package(build.folder / PACKAGE, build.classes)

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        # A classifier gives probabilities, whose logarithms are the logits but for one number per image.
        reference = torch_logits(build.model, images).astype(np.float64)
        highest = reference.max(1, keepdims=True)
        normalisers = np.log(np.exp(reference - highest).sum(1, keepdims=True)) + highest
        logits: NDArray[np.float32] = (predict(images) + normalisers).astype(np.float32)
        return logits

    return run, by


def _spread(images: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Return at most `count` of the images, evenly over their order, which runs through the domains."""
    spots = np.linspace(0, len(images) - 1, min(count, len(images))).round()
    chosen: NDArray[np.uint8] = images[np.unique(spots.astype(int))]
    return chosen
