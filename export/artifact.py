"""Write artifact folders: the files of a format and their `artifact.json`."""

from __future__ import annotations

import importlib
import math
import platform
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from edgekd.configs.export import ExportConfig
from edgekd.core.console import say
from edgekd.core.errors import EdgekdError, GateFailed
from edgekd.core.folders import ARTIFACT, publishing
from edgekd.core.manifest import Artifact, read_artifact
from edgekd.core.predictor import in_batches
from edgekd.core.readers import sha256_file
from edgekd.core.version import __version__
from edgekd.export.graph import Deployable, fuse, torch_logits
from edgekd.export.onnx.write import OPSET
from edgekd.export.parity import (
    EXACT,
    REFERENCE_FILE,
    check,
    compare,
    runner,
    write_reference,
)
from edgekd.export.quantize.calibration import Calibrator
from edgekd.export.writer import Build, Source, Written
from edgekd.targets.bank import BANK_FILE
from edgekd.targets.registry import artifact_name, get_target
from edgekd.targets.session import open_session

FEW_CALIBRATION_IMAGES = 100
"""Number of calibration images below which more are suggested."""


def export_model(
    source: Source, folder: Path, config: ExportConfig, *, fp32_path: Path | None = None
) -> Artifact:
    """Write the artifact folder `folder` atomically.

    The parity check compares what `parity.runner` gives for the finished file with the model in torch. Where it fails,
    nothing appears at `folder`: the artifact goes to `<folder>.failed`, with the numbers in its `artifact.json`.

    Args:
        config: target, precision and other options of the file; run, data and limits are not used.
        fp32_path: the `model.onnx` of an fp32 artifact of the same model, to start from instead of exporting again.

    Raises:
        EdgekdError: the folder exists, calibration images are missing, the model cannot be exported, or the disk is
            full.
        GateFailed: the file does not match the model, or int8 loses more than `source.budget` allows.
    """
    folder = Path(folder)
    target = get_target(config.target)
    if config.precision in target.calibrated and source.calibration is None:
        raise EdgekdError(
            f"{config.precision.upper()} needs calibration images.",
            "Give some of the training images, 200 or more.",
        )
    if len(source.parity_images) == 0:
        raise EdgekdError(
            "There are no images for the parity check.", "Give some real images, 64 or more."
        )
    ARTIFACT.refuse(folder, overwrite=config.overwrite)
    example = torch.from_numpy(np.array(source.parity_images[:2]))
    model, error = fuse(source.model, example)
    if error is not None and fp32_path is not None and not _holds_fused(fp32_path):
        fp32_path = None
    details = _fused_facts(source.model, model, error)
    with publishing(folder, ARTIFACT, overwrite=config.overwrite) as scratch:
        build = Build(
            replace(source, model=model),
            config.model_copy(update={"input": config.input or "uint8"}),
            scratch,
            cast(Calibrator, config.calibrator or target.default_calibrator),
            fp32_path,
        )
        reference = build.logits(torch_logits(source.model, source.parity_images))
        artifact = _written(build, reference, details)
        if not artifact.parity["passed"] and _may_try_mse(source, config):
            say(f"{artifact.name} by {build.calibrator}: {artifact.parity['reason']}; now by mse")
            build = replace(build, calibrator="mse")
            artifact = _written(build, reference, details)
        if not artifact.parity["passed"]:
            _set_aside(artifact, folder, scratch, _suggestions(build, artifact))
    return artifact.model_copy(update={"folder": folder})


def _written(build: Build, reference: NDArray[np.float32], details: dict[str, Any]) -> Artifact:
    """Write a file and its `artifact.json`; return it with its parity record.

    `reference` holds the logits of the model in torch for the parity images, float32 `[M, C]`; `details` go into
    `artifact.json`.
    """
    written: Written = importlib.import_module(get_target(build.config.target).writer).write(build)
    draft = _draft(build, written, reference, details)
    draft.write(build.folder)
    run, run_by = runner(build.folder, draft)
    candidate, least = in_batches(run, build.source.parity_images), build.config.min_agreement
    found = compare(reference, candidate) | {"run_by": run_by}
    found = check(found, build.config.precision, None if least is None else least / 100)
    if build.config.input == "picture":
        found |= _check_resize(build, found)
    artifact = draft.model_copy(update={"parity": found})
    artifact.write(build.folder)
    return artifact


def _may_try_mse(source: Source, config: ExportConfig) -> bool:
    """Return whether `mse`, which is slower and more accurate, may be tried: no calibrator and no limit is given."""
    target = get_target(config.target)
    free = config.calibrator is None and source.budget is None and config.precision == "int8"
    return free and "mse" in {*target.calibrators} - {target.default_calibrator}


def _draft(
    build: Build, written: Written, reference: NDArray[np.float32], details: dict[str, Any]
) -> Artifact:
    """Return the artifact's record before its parity check, with its further files written."""
    source, config = build.source, build.config
    further: tuple[str, ...] = ()
    if source.bank is not None:
        further += (BANK_FILE,)
        (build.folder / BANK_FILE).write_bytes(source.bank.to_bytes())
    if source.parity_keys:
        further += (REFERENCE_FILE,)
        write_reference(build.folder / REFERENCE_FILE, source.parity_keys, reference)
    quantization = written.quantization
    if quantization is not None and "calibration_images" in quantization:
        quantization = {**quantization, "ids": list(source.calibration_ids)}
    embeds = source.bank is not None
    return Artifact(
        name=artifact_name(
            config.target,
            config.precision,
            embedding=embeds,
            input=config.input or "uint8",
            padding=config.padding,
        ),
        target=config.target,
        format=get_target(config.target).format,
        precision=config.precision,
        files={file: sha256_file(build.folder / file) for file in (*written.files, *further)},
        inputs=written.inputs,
        outputs=written.outputs,
        classes=source.classes,
        bank=BANK_FILE if embeds else None,
        preprocess=source.preprocess,
        quantization=quantization,
        # The session that the check opens reads this record; the check's own result replaces it.
        parity=compare(reference, reference) | {"passed": False},
        details=written.details | details,
        source=source.facts,
        versions=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _fused_facts(model: Deployable, fused: Deployable, error: float | None) -> dict[str, Any]:
    if error is None:
        return {}
    trained, left = (sum(one.numel() for one in net.parameters()) for net in (model, fused))
    facts = {"trained_parameters": trained, "parameters": left, "max_error_relative": error}
    return {"fused": facts}


def _holds_fused(fp32: Path) -> bool:
    """Return whether an fp32 artifact has the fused form; files of earlier versions do not."""
    try:
        return "fused" in read_artifact(fp32.parent, check_hashes=False).details
    except EdgekdError:
        return False


def _check_resize(build: Build, parity: dict[str, Any]) -> dict[str, Any]:
    """Compare a file's logits of pictures in their own sizes with those of the same, resized by edgekd.

    The result belongs into the parity record. Pictures of the student's size count as resized already and are left out.
    """
    preprocess = build.source.preprocess
    session = open_session(build.folder, spinning=False)
    own, prepared = [], []
    for picture in build.source.pictures():
        if picture.shape[:2] != preprocess.shape:
            own.append(session.run(picture[None])[0])  # [C]
            pixels = preprocess.pixels(Image.fromarray(picture))
            prepared.append(session.run(pixels[None])[0])  # [C]
    if not own:
        return {}
    resize = check(compare(np.stack(prepared), np.stack(own)), "int8")
    if resize["passed"] or not parity["passed"]:
        return {"resize": resize}
    reason = f"on {resize['n']} pictures that the file resizes itself, {resize['reason']}"
    return {"resize": resize, "passed": False, "reason": reason}


def _set_aside(artifact: Artifact, folder: Path, scratch: Path, suggestions: str) -> None:
    parity, failed = artifact.parity, folder.with_name(folder.name + ".failed")
    with publishing(failed, ARTIFACT, overwrite=True) as place:
        place.rmdir()
        scratch.rename(place)
    kept = f"It is kept in {failed}."
    if artifact.precision in EXACT:
        raise GateFailed(
            f"{artifact.name} does not match the student: {parity['reason']}, on {parity['n']} images.",
            kept,
        )
    raise GateFailed(
        f"{artifact.name} differs too much from the student: {parity['reason']}, on {parity['n']} images.",
        f"{kept} {suggestions}",
    )


def _suggestions(build: Build, artifact: Artifact) -> str:
    """Return suggestions for a quantized file that fails its parity check."""
    target, ways, int8 = get_target(artifact.target), [], artifact.precision == "int8"
    images = build.source.calibration if artifact.precision in target.calibrated else None
    if images is not None and len(images) < FEW_CALIBRATION_IMAGES:
        ways.append(f"--calibration-images 300 in place of {len(images)}")
    if int8 and target.mixed and build.source.budget is None:
        ways.append("--max-drop-id 1.0 --max-drop-ood 1.5 (costly layers stay in float)")
    others = [name for name in target.calibrators if name != target.default_calibrator]
    if int8 and others and build.calibrator == target.default_calibrator:
        ways.append(f"--calibrator {' or '.join(others)}")
    if int8 and "int8-weights" in target.precisions:
        ways.append("--int8-weights")
    if artifact.precision == "pal4":
        ways.append("--palettize 6")
    percent = math.floor(100 * artifact.parity["top1_agreement"])
    ways.append(f"or accept it: --min-agreement {percent}")
    return f"Try {'; '.join(ways)}."


def _versions() -> dict[str, str]:
    packages = ("torch", "timm", "onnx", "onnxruntime", "numpy")
    return {
        "edgekd": __version__,
        "python": platform.python_version(),
        "opset": str(OPSET),
        **{package: version_of(package) for package in packages},
    }
