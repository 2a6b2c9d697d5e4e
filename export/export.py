"""From a deployable graph to an artifact folder: the format's files and the `artifact.json` that explains them."""

from __future__ import annotations

import importlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version as version_of
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.errors import EdgekdError, GateFailed
from edgekd.export.build import Build, Written
from edgekd.export.calibrators import Calibrator
from edgekd.export.evaluate import in_batches
from edgekd.export.graph import Deployable
from edgekd.export.mixed import Yardstick
from edgekd.export.onnx import OPSET
from edgekd.export.parity import EXACT, REFERENCE_FILE, check, compare, write_reference
from edgekd.files import sha256_file
from edgekd.folders import ARTIFACT, publishing
from edgekd.manifest import Artifact, Input, Precision
from edgekd.preprocess import Preprocess
from edgekd.targets.bank import BANK_FILE, ClassBank
from edgekd.targets.registry import TARGETS, check_calibrator, check_input, get_target
from edgekd.targets.session import open_session
from edgekd.version import __version__

WRITERS = {
    "onnxruntime": "edgekd.export.ort",
    "openvino": "edgekd.export.ov",
    "tensorrt": "edgekd.export.trt",
    "coreml": "edgekd.export.coreml",
}
"""Target → module with `write(build: Build) -> Written`; imported when it is asked for."""
SEARCHED = ("onnxruntime", "openvino", "tensorrt")
"""Targets whose int8 can keep layers in float."""
FEW_CALIBRATION_IMAGES = 100
"""Below, more of them come first among the ways on."""
_BATCH = 32


def export_model(
    model: Deployable,
    folder: Path,
    *,
    name: str,
    target: str,
    precision: Precision,
    classes: Sequence[str],
    preprocess: Preprocess,
    calibration: NDArray[np.uint8] | None,
    calibration_ids: Sequence[str] = (),
    parity_images: NDArray[np.uint8],
    parity_keys: Sequence[str] = (),
    source: dict[str, Any],
    overwrite: bool = False,
    fp32_path: Path | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
    yardstick: Yardstick | None = None,
    calibrator: Calibrator | None = None,
    min_agreement: float | None = None,
    bank: ClassBank | None = None,
    input: Input = "uint8",
) -> Artifact:
    """Write the artifact folder `folder`, which appears complete, in one rename, or not at all.

    The parity check runs the finished file through `open_session` on `parity_images`, or where its runtime is not on
    this machine through the writer's own evaluation, and compares it with `model` in torch. Where it fails, nothing
    appears at `folder`: the artifact goes to `<folder>.failed`, with the numbers in its `artifact.json`.

    Args:
        calibration: uint8 `[N, H, W, 3]`, images of the training domains; needed for int8, unused otherwise.
        calibration_ids: what names these images, recorded in the artifact.
        parity_images: uint8 `[M, H, W, 3]`, real images, none of them used for calibration.
        parity_keys: their content keys; with them the student's answers are kept in the artifact for `edgekd verify`.
        source: where the model comes from; JSON values.
        fp32_path: the `model.onnx` of an fp32 artifact of the same model, to start from instead of exporting again.
        options: the target's own switches.
        yardstick: how much accuracy int8 may cost; layers are kept in float until it costs no more (ONNX
            Runtime, OpenVINO, TensorRT).
        calibrator: how int8 ranges are chosen; None takes the target's own way.
        min_agreement: least top-1 agreement with `model`, 0–1, instead of the precision's own; not for fp32 and fp16.
        bank: for a `model` that ends in an embedding: the vectors of `classes`, which then lie beside the file. Parity,
            drops and thresholds are those of the logits that they make of it.
        input: what the file takes: pixels, or floats that are normalised already. Who runs it through `open_session`
            gives pixels in either case.

    Raises:
        EdgekdError: unknown target, folder exists, no calibration images, a model that ONNX cannot hold, disk full.
        GateFailed: the file does not compute what the model computes, or int8 costs more than `yardstick` allows,
            whatever stays in float.
    """
    folder = Path(folder)
    chosen = get_target(target)
    if precision not in chosen.precisions:
        raise EdgekdError(
            f"{target} has no {precision}.", f"It has {', '.join(chosen.precisions)}."
        )
    calibrated = precision in chosen.calibrated
    if calibrated and calibration is None:
        raise EdgekdError(
            f"{precision.upper()} needs calibration images.",
            "Give some of the training images, 200 or more.",
        )
    if yardstick is not None and (precision != "int8" or target not in SEARCHED):
        raise EdgekdError(
            f"A largest drop belongs to INT8 for {', '.join(SEARCHED)}, not to {target} {precision}.",
            "Leave out --max-drop-….",
        )
    check_calibrator(chosen, precision, calibrator)
    check_input(chosen, input)
    if min_agreement is not None and precision in EXACT:
        raise EdgekdError(
            f"{precision} has to agree with the student: a file that does not is wrong.",
            "Leave out --min-agreement.",
        )
    ARTIFACT.refuse(folder, overwrite=overwrite)
    metadata = {
        "preprocess": preprocess.model_dump_json(),
        "provenance": json.dumps({"edgekd": __version__, **source}, ensure_ascii=False),
    }
    if bank is None:  # else they lie beside the file, and may change
        metadata["classes"] = json.dumps(list(classes), ensure_ascii=False)
    unknown = sorted(set(options) - set(chosen.options))
    if unknown:
        takers = [other.name for other in TARGETS.values() if unknown[0] in other.options]
        raise EdgekdError(
            f"{target} has no option {unknown[0]}.",
            f"It belongs to {', '.join(takers) or 'no target'}.",
        )
    writer = importlib.import_module(WRITERS[target])
    with publishing(folder, ARTIFACT, overwrite=overwrite) as scratch:
        build = Build(
            model=model,
            folder=scratch,
            precision=precision,
            preprocess=preprocess,
            classes=tuple(classes),
            metadata=metadata,
            calibration=calibration if calibrated else None,
            fp32_onnx=fp32_path,
            options=options,
            yardstick=yardstick if precision == "int8" else None,
            calibrator=calibrator or _calibrator(target),
            bank=bank,
            input=input,
        )
        written: Written = writer.write(build)
        if len(parity_images) == 0:
            raise EdgekdError(
                "There are no images for the parity check.", "Give some real images, 64 or more."
            )
        reference = build.logits(torch_logits(model, parity_images))
        kept: tuple[str, ...] = ()
        if bank is not None:
            kept += (BANK_FILE,)
            (scratch / BANK_FILE).write_bytes(bank.to_bytes())
        if parity_keys:
            kept += (REFERENCE_FILE,)
            write_reference(scratch / REFERENCE_FILE, parity_keys, reference)
        quantization = written.quantization
        if quantization is not None and "calibration_images" in quantization:
            quantization = {**quantization, "ids": list(calibration_ids)}
        draft = Artifact(
            name=name,
            target=target,
            format=written.format,
            precision=precision,
            files={file: sha256_file(scratch / file) for file in (*written.files, *kept)},
            inputs=written.inputs,
            outputs=written.outputs,
            classes=tuple(classes),
            bank=BANK_FILE if bank is not None else None,
            preprocess=preprocess,
            quantization=quantization,
            parity={},
            details=written.details,
            source=source,
            versions=_versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        draft.write(scratch)
        candidate, run_by = _answers(build, written, parity_images)
        parity = check(compare(reference, candidate) | {"run_by": run_by}, precision, min_agreement)
        artifact = draft.model_copy(update={"parity": parity})
        artifact.write(scratch)
        if not parity["passed"]:
            _set_aside(artifact, folder, scratch, _ways_on(build, artifact))
    return artifact.model_copy(update={"folder": folder})


def torch_logits(model: torch.nn.Module, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Output float32 `[M, C]` of `model` in eval mode for uint8 `[M, H, W, 3]`, in batches."""
    was_training = model.training
    model.eval()
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    try:
        with torch.inference_mode():
            parts = [
                model(torch.from_numpy(np.array(images[start : start + _BATCH])).to(device))
                .float()
                .cpu()
                for start in range(0, len(images), _BATCH)
            ]
    finally:
        model.train(was_training)
    logits: NDArray[np.float32] = torch.cat(parts).numpy()
    return logits


def _answers(
    build: Build, written: Written, images: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], str | None]:
    """The finished artifact's logits, and who ran it."""
    if written.evaluate is not None:
        return build.logits(in_batches(written.evaluate, images)), written.evaluated_by
    session = open_session(build.folder, spinning=False)
    return in_batches(session.run, images), session.provider


def _calibrator(target: str) -> Calibrator:
    """Return the target's own way to choose int8 ranges."""
    return cast("Calibrator", get_target(target).default_calibrator)


def _set_aside(artifact: Artifact, folder: Path, scratch: Path, ways_on: str) -> None:
    parity, failed = artifact.parity, folder.with_name(folder.name + ".failed")
    with publishing(failed, ARTIFACT, overwrite=True) as place:
        place.rmdir()
        scratch.rename(place)
    kept = f"It is kept in {failed} with the report."
    if artifact.precision in EXACT:
        raise GateFailed(
            f"{artifact.name} does not compute what the student computes: {parity['reason']}, on {parity['n']} images.",
            kept,
        )
    raise GateFailed(
        f"{artifact.name} differs too much from the student: {parity['reason']}, on {parity['n']} images.",
        f"{kept} {ways_on}",
    )


def _ways_on(build: Build, artifact: Artifact) -> str:
    """What may bring a file with few bits over its threshold, or the threshold to the file; not what was tried."""
    ways, int8 = [], artifact.precision == "int8"
    if build.calibration is not None and len(build.calibration) < FEW_CALIBRATION_IMAGES:
        ways.append(
            f"measure ranges on more images than {len(build.calibration)}: --calibration-images 300"
        )
    if int8 and artifact.target in SEARCHED and build.yardstick is None:
        ways.append(
            "keep the layers that cost the most in float: --max-drop-id 1.0 --max-drop-ood 1.5"
        )
    usual = _calibrator(artifact.target)
    others = [name for name in get_target(artifact.target).calibrators if name != usual]
    if int8 and others and build.calibrator == usual:
        ways.append(f"choose ranges another way: --calibrator {' or '.join(others)}")
    if artifact.precision == "w8a8":
        ways.append("quantize the weights alone: --int8")
    if artifact.precision == "pal4":
        ways.append("take finer palettes: --palettize 6")
    ways.append(
        f"or accept it: --min-agreement {math.floor(100 * artifact.parity['top1_agreement'])}"
    )
    return "Go on like this: " + "; ".join(ways) + "."


def _versions() -> dict[str, str]:
    packages = ("torch", "timm", "onnx", "onnxruntime", "numpy")
    return {
        "edgekd": __version__,
        "python": platform.python_version(),
        "opset": str(OPSET),
        **{package: version_of(package) for package in packages},
    }
