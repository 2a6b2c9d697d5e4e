"""From a deployable graph to an artifact folder: the format's files and the `artifact.json` that explains them."""

from __future__ import annotations

import importlib
import json
import math
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
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
from edgekd.core.preprocess import Preprocess
from edgekd.core.readers import sha256_file
from edgekd.core.version import __version__
from edgekd.export.graph import Deployable, Fused, fuse, torch_logits
from edgekd.export.onnx.write import OPSET
from edgekd.export.parity import EXACT, REFERENCE_FILE, check, compare, write_reference
from edgekd.export.quantize.calibration import Calibrator
from edgekd.export.quantize.search import AccuracyBudget
from edgekd.export.writer import Build, Written
from edgekd.targets.bank import BANK_FILE, ClassBank
from edgekd.targets.registry import artifact_name, get_target
from edgekd.targets.session import open_session

FEW_CALIBRATION_IMAGES = 100
"""Below, more of them are the first suggestion."""


@dataclass(frozen=True)
class Source:
    """What is exported: a model, and the images that calibrate, limit and check its files."""

    model: Deployable
    classes: tuple[str, ...]
    preprocess: Preprocess
    parity_images: NDArray[np.uint8]
    """uint8 `[M, H, W, 3]`, real images, none of them used for calibration."""
    facts: dict[str, Any]
    """Where the model comes from; JSON values."""
    parity_keys: tuple[str, ...] = ()
    """Their content keys; with them the student's logits are kept in the artifact for `edgekd verify`."""
    calibration: NDArray[np.uint8] | None = None
    """uint8 `[N, H, W, 3]`, images of the training domains; needed for int8, unused otherwise."""
    calibration_ids: tuple[str, ...] = ()
    """Names of these images, for the artifact's record."""
    pictures: Callable[[], Iterable[NDArray[np.uint8]]] = tuple
    """Gives images in their own sizes, uint8 `[h, w, 3]` each, that a file which resizes is checked on."""
    budget: AccuracyBudget | None = None
    """How much accuracy int8 may cost; layers are kept in float until it costs no more."""
    bank: ClassBank | None = None
    """For a `model` that ends in an embedding: the vectors of `classes`, which then are beside the file. Parity, drops
    and thresholds are those of the logits computed with them."""


def export_model(
    source: Source, folder: Path, config: ExportConfig, *, fp32_path: Path | None = None
) -> Artifact:
    """Write the artifact folder `folder`, which appears complete, in one rename, or not at all.

    The parity check runs the finished file through `open_session` on the parity images, or where its runtime is not on
    this machine through the writer's own evaluation, and compares it with the model in torch. Where it fails, nothing
    appears at `folder`: the artifact goes to `<folder>.failed`, with the numbers in its `artifact.json`.

    Args:
        config: target, precision and the rest of the file; its run, data and limits are not used.
        fp32_path: the `model.onnx` of an fp32 artifact of the same model, to start from instead of exporting again.

    Raises:
        EdgekdError: folder exists, no calibration images, a model that ONNX cannot hold, disk full.
        GateFailed: the file does not compute what the model computes, or int8 costs more than `source.budget`
            allows, whatever stays in float.
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
    fused = fuse(source.model, torch.from_numpy(np.array(source.parity_images[:2])))
    if fused.error is not None and fp32_path is not None and not _holds_fused(fp32_path):
        fp32_path = None
    writer = importlib.import_module(target.writer)
    with publishing(folder, ARTIFACT, overwrite=config.overwrite) as scratch:
        build = _build(source, fused, scratch, config, fp32_path)
        written = writer.write(build)
        outputs = torch_logits(source.model, source.parity_images)
        artifact = _checked(source, fused, build, written, config, outputs)
        if not artifact.parity["passed"] and _may_try_mse(source, config):
            say(f"{artifact.name} by {build.calibrator}: {artifact.parity['reason']}; now by mse")
            build = replace(build, calibrator="mse")
            artifact = _checked(source, fused, build, writer.write(build), config, outputs)
        if not artifact.parity["passed"]:
            _set_aside(artifact, folder, scratch, _suggestions(build, artifact))
    return artifact.model_copy(update={"folder": folder})


def _checked(
    source: Source,
    fused: Fused[Deployable],
    build: Build,
    written: Written,
    config: ExportConfig,
    outputs: NDArray[np.float32],
) -> Artifact:
    """Return the artifact of written files, with its parity record, as it stands in the folder.

    Args:
        outputs: of the model in torch for the parity images, float32 `[M, …]`.
    """
    reference = build.logits(outputs)
    draft = _draft(source, build, config, written, reference)
    details = draft.details | _fused_facts(source.model, fused)
    draft = draft.model_copy(update={"details": details})
    draft.write(build.folder)
    candidate, run_by = _logits_of_file(build, written, source.parity_images)
    least = None if config.min_agreement is None else config.min_agreement / 100
    found = compare(reference, candidate) | {"run_by": run_by}
    found = check(found, config.precision, least)
    if build.input == "picture":
        found |= _check_resize(build, source.pictures(), found)
    artifact = draft.model_copy(update={"parity": found})
    artifact.write(build.folder)
    return artifact


def _may_try_mse(source: Source, config: ExportConfig) -> bool:
    """Return whether `mse`, which takes longer and errs less, may be tried: no calibrator and no limit is given."""
    target = get_target(config.target)
    free = config.calibrator is None and source.budget is None and config.precision == "int8"
    return free and "mse" in {*target.calibrators} - {target.default_calibrator}


def _build(
    source: Source,
    fused: Fused[Deployable],
    scratch: Path,
    config: ExportConfig,
    fp32_path: Path | None,
) -> Build:
    target = get_target(config.target)
    metadata = {
        "preprocess": source.preprocess.model_dump_json(),
        "provenance": json.dumps({"edgekd": __version__, **source.facts}, ensure_ascii=False),
    }
    if source.bank is None:  # else they are beside the file, and may change
        metadata["classes"] = json.dumps(list(source.classes), ensure_ascii=False)
    return Build(
        model=fused.model,
        folder=scratch,
        precision=config.precision,
        preprocess=source.preprocess,
        classes=source.classes,
        metadata=metadata,
        calibration=source.calibration if config.precision in target.calibrated else None,
        fp32_onnx=fp32_path,
        options=config.options,
        budget=source.budget if config.precision == "int8" else None,
        calibrator=cast(Calibrator, config.calibrator or target.default_calibrator),
        bank=source.bank,
        input=config.input or "uint8",
    )


def _draft(
    source: Source,
    build: Build,
    config: ExportConfig,
    written: Written,
    reference: NDArray[np.float32],
) -> Artifact:
    """Return the artifact's record before its parity check, with its further files written."""
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
            input=build.input,
            padding=config.padding,
        ),
        target=config.target,
        format=written.format,
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
        details=written.details,
        source=source.facts,
        versions=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _fused_facts(model: Deployable, fused: Fused[Deployable]) -> dict[str, Any]:
    if fused.error is None:
        return {}
    trained, left = (sum(one.numel() for one in net.parameters()) for net in (model, fused.model))
    facts = {"trained_parameters": trained, "parameters": left}
    return {"fused": facts | {"max_error_relative": fused.error}}


def _holds_fused(fp32: Path) -> bool:
    """Return whether an fp32 artifact holds the fused form; files of earlier versions do not."""
    try:
        return "fused" in read_artifact(fp32.parent, check_hashes=False).details
    except EdgekdError:
        return False


def _logits_of_file(
    build: Build, written: Written, images: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], str | None]:
    """Return the finished artifact's logits, and what ran it."""
    if written.evaluate is not None:
        return build.logits(in_batches(written.evaluate, images)), written.evaluated_by
    session = open_session(build.folder, spinning=False)
    return in_batches(session.run, images), session.provider


def _check_resize(
    build: Build, pictures: Iterable[NDArray[np.uint8]], parity: dict[str, Any]
) -> dict[str, Any]:
    """Compare a file's logits of pictures in their own sizes with those of the same, resized by edgekd.

    Returns:
        For the parity record: `resize`, as `compare`, and a failure if its class differs too often. Pictures of the
        student's size are left out, since they count as resized already.
    """
    session = open_session(build.folder, spinning=False)
    own, prepared = [], []
    for picture in pictures:
        if picture.shape[:2] != build.preprocess.shape:
            own.append(session.run(picture[None])[0])  # [C]
            pixels = build.preprocess.pixels(Image.fromarray(picture))
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
            f"{artifact.name} does not compute what the student computes: {parity['reason']}, on {parity['n']} images.",
            kept,
        )
    raise GateFailed(
        f"{artifact.name} differs too much from the student: {parity['reason']}, on {parity['n']} images.",
        f"{kept} {suggestions}",
    )


def _suggestions(build: Build, artifact: Artifact) -> str:
    """Return what was not tried and may bring a file with few bits over its threshold."""
    target, ways, int8 = get_target(artifact.target), [], artifact.precision == "int8"
    if build.calibration is not None and len(build.calibration) < FEW_CALIBRATION_IMAGES:
        ways.append(f"--calibration-images 300 in place of {len(build.calibration)}")
    if int8 and target.mixed and build.budget is None:
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
