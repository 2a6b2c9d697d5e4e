"""The writer for Core ML: an ML program in an `.mlpackage`, converted, compressed and checked on any machine.

The torch program is converted to float32, then to half precision (except for layers that need float32), and then
compressed. Each step is read back from disk and compared with the previous one on real images.
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
from scipy.special import logsumexp
from torch import Tensor, nn

from edgekd.core.console import say, warn
from edgekd.core.errors import EdgekdError, first_line
from edgekd.core.manifest import Artifact, TensorSpec
from edgekd.core.predictor import Predictor
from edgekd.core.readers import read_json
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
"""Supported minimum systems; the first, which introduced 8-bit activations, is the default."""
_MODEL = f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel"
_SAMPLES = 32
"""Number of images for the range analysis and for the comparison of each step with the previous one."""


class Program(nn.Module):
    """The module for Core ML: image → probabilities or a unit embedding, including normalisation and head."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: Deployable) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone, model.head
        # The deployable has one statistic per value of a pixel row; the first three are those of the channels.
        self.register_buffer("scale", model.scale[:3].reshape(1, 3, 1, 1).clone())
        self.register_buffer("shift", model.shift[:3].reshape(1, 3, 1, 1).clone())

    def forward(self, image: Tensor) -> Tensor:
        """RGB float32 `[1, 3, H, W]`, 0 to 255 → probabilities `[1, C]`, or an embedding `[1, D]`."""
        answer: Tensor = self.head(self.backbone(image * self.scale + self.shift))
        return answer if isinstance(self.head, UnitHead) else answer.softmax(1)


def write(build: Build) -> Written:
    """Write `model.mlpackage` in the wanted precision.

    Without coremltools, without images for the analysis, and for a student that cannot be converted or checked, it is
    an `EdgekdError`.
    """
    coremltools = import_coremltools()
    source, deployment = build.source, build.config.deployment_target or DEPLOYMENT[0]
    if deployment not in DEPLOYMENT:
        raise EdgekdError(
            f"The deployment target {deployment} is not supported.",
            f"Known: {', '.join(DEPLOYMENT)}.",
        )
    started = time.perf_counter()
    size, classes = source.preprocess.size, source.classes if source.bank is None else None
    exported = capture(source.model, size)
    package, quantization = build.folder / PACKAGE, None
    details: dict[str, Any] = {}
    model = convert(exported, size, classes, deployment, half=False)
    if build.config.precision == "fp32":
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
    return Written(
        files=(_MODEL, *(name for name in names if name != _MODEL)),
        inputs=(image,),
        outputs=_outputs(build),
        quantization=quantization,
        details=details,
    )


def _write_half(
    build: Build,
    model: Any,
    exported: torch.export.ExportedProgram,
    classes: Collection[str] | None,
    deployment: str,
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Write the package in half precision, with further compression if requested.

    Returns:
        The record of the quantization, and details: hazards of half precision, and the error of each step.
    """
    images, precision = build.source.calibration, build.config.precision
    assert images is not None
    samples = _spread(images, _SAMPLES)
    full = _read_back(model, build.folder)
    ranges = measure_ranges(full, samples)
    kept = layers_to_keep(full, ranges.hazards)
    _report(ranges, kept)
    size, quantization = build.source.preprocess.size, None
    model = convert(exported, size, classes, deployment, half=True, keep=kept)
    half = _read_back(model, build.folder)
    with _disk_errors():
        if precision == "int8-weights":
            model, quantization = quantize_weights(model)
        elif precision == "int8":
            say("int8: 8-bit weights and activations; --int8-weights is what --int8 was in 0.1")
            calibrated = measure_ranges(half, images)
            model, quantization = quantize_activations(model, half, calibrated)
            quantization["calibration_images"] = len(images)
        elif precision in PALETTE_BITS:
            model, quantization = palettize(model, PALETTE_BITS[precision])
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
"""Decompositions of operations that coremltools cannot convert (ConvNeXt V2, GhostNet)."""


def capture(model: Deployable, size: int) -> torch.export.ExportedProgram:
    """Return the program as core operations, the form that coremltools converts whatever its numpy."""
    whole = Program(copy.deepcopy(model).cpu()).eval()
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(whole, (torch.zeros(1, 3, size, size),))
            core: torch.export.ExportedProgram = program.run_decompositions(SIMPLER)
            return core
    except Exception as error:  # torch.export raises many kinds
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
    """Return a coremltools model of the program: image input; class labels, or without `classes` a float32 embedding.

    With `half` it computes in float16, but for the layers named in `keep` and for the softmax of a classifier, whose
    small probabilities float16 would take for zero. `deployment` is the oldest system it must run on.
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
    except Exception as error:  # coremltools raises many kinds
        raise EdgekdError(
            f"coremltools {coremltools.__version__} cannot convert the student ({first_line(error)}).",
            "Choose another student, or one built from common layers.",
        ) from error


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Turn errors of coremltools' package writer, which give no reason, into an `EdgekdError`."""
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
    if found := [one.sentence for one in ranges.hazards]:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        warn(f"half precision would ruin {'; '.join(found[:3])}{more}.")
        say(f"half precision: {len(kept)} layers stay in float32: {', '.join(sorted(kept))}")


def _read_back(model: Any, folder: Path) -> MilProgram:
    """Return the program of a model, written to disk and read back, as Core ML would get it."""
    path = folder / "step.mlpackage"
    with quiet():
        model.save(str(path))
    try:
        return read_program(path)
    finally:
        shutil.rmtree(path)


def _save(model: Any, package: Path, build: Build) -> None:
    source, student = build.source, build.source.facts.get("student")
    does = "Embeds an image"
    if source.bank is None:
        does = f"Classifies an image into {len(source.classes)} classes"
    named = f" Student: {student}." if student else ""
    model.short_description = f"{does}; {build.config.precision}.{named}"
    model.version, model.author = __version__, "edgekd"
    size = source.preprocess.size
    model.input_description["image"] = f"RGB image, {size} × {size}"
    model.user_defined_metadata.update(source.metadata)
    with quiet():
        model.save(str(package))
    # A map of operation names for a debugger, which the package's manifest does not list.
    (package / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    _make_reproducible(package)


def _make_reproducible(package: Path) -> None:
    """Make a package deterministic: sort its maps, and replace the random identifiers of its items."""
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
    if build.source.bank is not None:
        spec = build.output
        return (spec.model_copy(update={"name": EMBEDDING, "shape": (1, *spec.shape[1:])}),)
    return (
        TensorSpec(name="classLabel", dtype="string", shape=(), layout="most probable class"),
        TensorSpec(
            name="classLabel_probs",
            dtype="float64",
            shape=(len(build.source.classes),),
            layout="by class name",
        ),
    )


def _links(
    build: Build, ranges: Ranges, half: MilProgram, samples: NDArray[np.uint8]
) -> dict[str, dict[str, Any]]:
    """Return the difference between the logits of each step and the previous one, on the same images."""
    rounded = logits_of(half, samples)
    package = logits_of(read_program(build.folder / PACKAGE), samples)
    steps = {
        "torch → float32 program": (torch_logits(build.source.model, samples), ranges.logits),
        "float32 → float16": (ranges.logits, rounded),
        "float16 → package": (rounded, package),
    }
    wanted = ("n", "max_error_relative", "cosine", "top1_agreement")
    compared = {name: compare(*map(build.logits, pair)) for name, pair in steps.items()}
    return {name: {key: numbers[key] for key in wanted} for name, numbers in compared.items()}


def reference(artifact: Artifact, folder: Path) -> tuple[Predictor, str]:
    """Return the package's output, logits or embeddings, and what computes it.

    That is Core ML on macOS, elsewhere the reference evaluator.
    """
    package = folder / PACKAGE
    program = read_program(package)

    def evaluated(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return logits_of(program, images)

    if platform.system() != "Darwin":
        return evaluated, "edgekd's reference evaluator (Core ML needs macOS)"
    by = f"Core ML on macOS {platform.mac_ver()[0]}"
    if artifact.bank is not None:
        return load_embedder(package), by
    log_probabilities = load_package(package, tuple(artifact.classes))

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        # Logits but for one number per image, which the evaluator's logits give.
        normalisers: NDArray[np.float32] = logsumexp(evaluated(images), axis=1, keepdims=True)
        return log_probabilities(images) + normalisers

    return run, by


def _spread(images: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Return at most `count` of the images, evenly spread over the domains."""
    spots = np.linspace(0, len(images) - 1, min(count, len(images))).round()
    chosen: NDArray[np.uint8] = images[np.unique(spots.astype(int))]
    return chosen
