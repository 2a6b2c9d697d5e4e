"""Is an artifact still what the student computes? The parity check of the export at any time, link by link."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekd.core.console import shell_word
from edgekd.core.errors import EdgekdError
from edgekd.core.files import scratch_folder
from edgekd.core.manifest import Artifact, Precision, Run, read_artifact
from edgekd.core.predictor import in_batches
from edgekd.export.parity import REFERENCE_FILE, check, compare, read_reference, runner
from edgekd.targets.bank import read_bank
from edgekd.targets.registry import DEFAULT_TARGET, artifact_name

if TYPE_CHECKING:
    from edgekd.export.graph import Deployable

ToLogits = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def verify_artifact(folder: Path, data: str | None = None) -> list[dict[str, Any]]:
    """Compare the logits along the chain torch student → fp32 ONNX → artifact, then over the whole of it.

    In its run's folder an artifact is compared with the run's student, on the images of the export. Anywhere else with
    the student's outputs on these images at its export (`parity.npz`); `data` is their folder now.

    Returns:
        One mapping per link: `link` (its name), the numbers of `parity.compare`, `passed`, and `reason` where it broke.

    Raises:
        EdgekdError: no artifact or an altered one, no images to compare on, or a runtime that does not exist here.
    """
    if (folder / "run.json").is_file() and not (folder / "artifact.json").is_file():
        beside = sorted(path.parent.name for path in folder.glob("artifacts/[!.]*/artifact.json"))
        raise EdgekdError(
            f"{folder} is a run; one of its artifacts can be verified.",
            f"It has {', '.join(beside)}, in {folder / 'artifacts'}."
            if beside
            else f"Make one: edgekd export {shell_word(folder)}",
        )
    artifact = read_artifact(folder)
    if (folder.parent.parent / "run.json").is_file() and folder.parent.name == "artifacts":
        return _in_its_run(folder, artifact, data)
    return _alone(folder, artifact, data)


def _in_its_run(folder: Path, artifact: Artifact, data: str | None) -> list[dict[str, Any]]:
    from edgekd.artifacts.embedding import class_bank, embedding_model
    from edgekd.distill.classification.load_run import load_run
    from edgekd.export.graph import torch_logits
    from edgekd.export.run import deployable, parity_images

    loaded = load_run(folder.parent.parent)
    if artifact.source.get("student_sha256") != loaded.run.student_sha256:
        raise EdgekdError(
            f"{folder} was exported from another student.", "Export again with --overwrite."
        )
    if (artifact.quantization or {}).get(
        "qat"
    ):  # trained weights of its own: compare with torch's stored outputs
        return _alone(folder, artifact, data or loaded.run.data)
    pixels, _ = parity_images(loaded, data)
    model: Deployable = deployable(loaded)
    to_logits: ToLogits = np.asarray
    if artifact.bank is not None:
        # The run's own vectors; of the sidecar only the factor, which was fitted at the export.
        bank = class_bank(loaded, read_bank(folder / artifact.bank).logit_scale)
        model, to_logits = embedding_model(loaded), bank.logits
    student = to_logits(torch_logits(model, pixels))
    candidate = _exported(in_batches(runner(folder, artifact)[0], pixels), student)
    least = artifact.parity.get("min_agreement")
    whole = _link(f"torch student → {artifact.name}", student, candidate, artifact.precision, least)
    if (artifact.target, artifact.precision) == (DEFAULT_TARGET, "fp32"):
        return [whole]
    embeds = artifact.bank is not None
    names = [
        artifact_name(DEFAULT_TARGET, "fp32", embedding=embeds, input=kind)
        for kind in (artifact.input, "uint8")
    ]
    beside = next(
        (folder.parent / name for name in names if (folder.parent / name).is_dir()),
        folder.parent / names[0],
    )
    onnx = _exported(_fp32_onnx(beside, loaded.run, model, to_logits, pixels), student)
    return [
        _link("torch student → fp32 ONNX", student, onnx, "fp32"),
        _link(f"fp32 ONNX → {artifact.name}", onnx, candidate, artifact.precision, least),
        whole,
    ]


def _alone(folder: Path, artifact: Artifact, data: str | None) -> list[dict[str, Any]]:
    from edgekd.data.image_set import load_images

    if REFERENCE_FILE not in artifact.files:
        raise EdgekdError(
            f"{folder} lies outside its run and does not hold the student's outputs.",
            "Verify it inside its run, or export it again.",
        )
    if data is None:
        raise EdgekdError(
            f"{folder} lies outside its run, so its images cannot be found.",
            "Say where: --data DIR.",
        )
    keys, student = read_reference(folder / REFERENCE_FILE)
    images = load_images(data)
    place = {key: index for index, key in enumerate(images.keys)}
    known = [row for row, key in enumerate(keys) if key in place]
    if not known:
        raise EdgekdError(
            f"None of the {len(keys)} images that {artifact.name} was checked on is among {data}.",
            "Give the images of its run.",
        )
    pixels = np.stack([artifact.preprocess.pixels(images.read(place[keys[row]])) for row in known])
    candidate = _exported(in_batches(runner(folder, artifact)[0], pixels), student)
    trained = (
        "trained network in torch" if (artifact.quantization or {}).get("qat") else "torch student"
    )
    least = artifact.parity.get("min_agreement")
    return [
        _link(f"{trained} → {artifact.name}", student[known], candidate, artifact.precision, least)
    ]


def _exported(
    candidate: NDArray[np.float32], reference: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return logits of the classes that the artifact was exported with; classes added since are behind them."""
    return candidate[:, : reference.shape[1]]


def _fp32_onnx(
    beside: Path,
    run: Run,
    model: Deployable,
    to_logits: ToLogits,
    pixels: NDArray[np.uint8],
) -> NDArray[np.float32]:
    """Return logits of the fp32 ONNX artifact of the same student, or of one made for the purpose."""
    if (beside / "artifact.json").is_file():
        artifact = read_artifact(beside)
        if artifact.source.get("student_sha256") == run.student_sha256:
            return in_batches(runner(beside, artifact)[0], pixels)
    from edgekd.export.onnx.evaluate import onnx_evaluator
    from edgekd.export.onnx.write import export_onnx

    with scratch_folder() as scratch:
        path = scratch / "fp32.onnx"
        export_onnx(model, path, size=run.preprocess.size, metadata={})
        return to_logits(in_batches(onnx_evaluator(path), pixels))


def _link(
    name: str,
    reference: NDArray[np.float32],
    candidate: NDArray[np.float32],
    precision: Precision,
    min_agreement: float | None = None,
) -> dict[str, Any]:
    return {"link": name, **check(compare(reference, candidate), precision, min_agreement)}
