"""Export the student of a finished run: choose the files, and the images for calibration, search and parity check."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from edgekd.artifacts.embedding import check_embeds, embedding_with_bank
from edgekd.artifacts.kit import PICTURES, write_kit
from edgekd.configs.export import ExportConfig
from edgekd.core.console import say, warn
from edgekd.core.errors import EdgekdError
from edgekd.core.folders import ARTIFACT
from edgekd.core.manifest import Artifact, Precision, newest_run, read_artifact
from edgekd.data.corruptions import NAMES, SIZE, corrupt
from edgekd.data.image_set import ImageSet
from edgekd.data.split import Split
from edgekd.data.unlabelled import NO_DOMAIN, with_unlabelled
from edgekd.distill.classification.load_run import LoadedRun, load_run
from edgekd.distill.inputs.batches import pixel_batches
from edgekd.distill.loggers import attach_to_run
from edgekd.export.artifact import export_model
from edgekd.export.graph import Deployable, fold_head
from edgekd.export.parity import MIN_AGREEMENT
from edgekd.export.quantize.search import AccuracyBudget
from edgekd.export.writer import Source
from edgekd.targets.devices.payload import encoded_image
from edgekd.targets.profiles import follow_profile
from edgekd.targets.registry import DEFAULT_TARGET, artifact_name, get_target, target_of
from edgekd.targets.session import open_session
from edgekd.targets.timing.speed import in_words, speed_of, timed_in_turns

PARITY_IMAGES = 256
RESIZED_IMAGES = 128
"""Number of images in their original sizes for checking a file that resizes."""
BUDGET_IMAGES = 256
"""Number of images of each kind for measuring the loss of INT8; one image is 0.4 points."""


def export_run(config: ExportConfig) -> list[Artifact]:
    """Export a run's student into `<run>/artifacts/<target>-<precision>/`; see `edgekd.api.export`."""
    config = follow_profile(config, {"input", *get_target(config.target).options})
    loaded = load_run(config.run or newest_run())
    folders = _folders(config, loaded)
    if config.head == "embedding":
        check_embeds(loaded)
    source = source_of(loaded, config)
    base = _folder(config, loaded, DEFAULT_TARGET, "fp32", "uint8")
    artifacts = []
    for precision, folder in folders.items():
        one = config
        if precision != config.precision:
            unset = dict.fromkeys(("calibrator", "min_agreement", "padding"))
            one = config.model_copy(update={"precision": precision, **unset})
        fp32 = base / "model.onnx" if base.exists() and folder != base else None
        artifact = export_model(source, folder, one, fp32_path=fp32)
        artifacts.append(artifact.model_copy(update={"folder": folder}))
        attach_to_run(loaded.folder, artifact.name, "artifact", [folder])
    if config.test_kit:
        say(f"test kit: {write_kit(folder, _kit_pictures(loaded, config.data))}")
    return artifacts


def _kit_pictures(loaded: LoadedRun, data: str | None) -> list[bytes]:
    """Return test images in their encoded form, with equal shares of the domains."""
    images, split = loaded.data(data)
    chosen = spread(np.sort(np.concatenate([split.id_test, split.ood_test])), PICTURES, images)
    return [encoded_image(images, index) for index in chosen.tolist()]


def source_of(loaded: LoadedRun, config: ExportConfig) -> Source:
    """Return the graph of a run and the images for calibration, accuracy limits and parity check."""
    images, split = loaded.data(config.data)
    trained, calibration = calibration_data(loaded, images, split, config.calibration_images)
    calibrated = config.precision in get_target(config.target).calibrated
    shown, keys = parity_images(loaded, config.data)
    model, bank = (
        embedding_with_bank(loaded, config.data)
        if config.head == "embedding"
        else (deployable(loaded), None)
    )
    return Source(
        model=model,
        bank=bank,
        classes=tuple(loaded.run.classes),
        preprocess=loaded.run.preprocess,
        calibration=pixels_of(loaded, trained, calibration) if calibrated else None,
        calibration_ids=tuple(trained.ids[i] for i in calibration) if calibrated else (),
        parity_images=shown,
        parity_keys=tuple(keys),
        pictures=functools.partial(_pictures, images, split),
        budget=_budget(loaded, config) if config.limited else None,
        facts=_facts(loaded, images, split),
    )


def _folder(
    config: ExportConfig, loaded: LoadedRun, target: str, precision: Precision, input: Any
) -> Path:
    embeds, padding = config.head == "embedding", config.padding if precision == "int8" else None
    name = artifact_name(target, precision, embedding=embeds, input=input, padding=padding)
    return loaded.folder / "artifacts" / name


def _folders(config: ExportConfig, loaded: LoadedRun) -> dict[Precision, Path]:
    """Return precision → folder of the files to write, the requested one last.

    For ONNX Runtime other precisions are made from the FP32 file, which is also written if it does not exist.
    """
    kind = config.input or "uint8"
    base = _folder(config, loaded, DEFAULT_TARGET, "fp32", "uint8")
    beside = _folder(config, loaded, DEFAULT_TARGET, "fp32", kind)
    for place in {base, beside}:
        if place.exists() and (
            read_artifact(place).source.get("student_sha256") != loaded.run.student_sha256
        ):
            raise EdgekdError(
                f"{place} was exported from another student.",
                f"Remove {place.parent} and export again.",
            )
    wanted: list[Precision] = [config.precision]
    if config.precision != "fp32" and config.target == DEFAULT_TARGET and not beside.exists():
        wanted.insert(0, "fp32")
    folders = {
        precision: _folder(config, loaded, config.target, precision, kind) for precision in wanted
    }
    for place in folders.values():
        ARTIFACT.refuse(place, overwrite=config.overwrite)
    return folders


def deployable(loaded: LoadedRun) -> Deployable:
    """Return the deployable graph of a run's student."""
    scale = float(loaded.student.scale)
    if loaded.vectors is not None:
        head = fold_head(loaded.student.projector, loaded.vectors, scale)
    else:
        assert loaded.student.head is not None
        head = fold_head(loaded.student.head, torch.eye(len(loaded.run.classes)), scale)
    return Deployable(loaded.student.body, head, loaded.run.preprocess).eval()


def calibration_data(
    loaded: LoadedRun, images: ImageSet, split: Split, count: int
) -> tuple[ImageSet, NDArray[np.int64]]:
    """Return the images for calibration, and `count` indices of them.

    Unlabelled images are included if their sources are available, since they come from the place of use.
    """
    config, indices = loaded.config, split.train
    if split.unlabelled:
        try:
            images, split = with_unlabelled(
                images, split, config.unlabelled, config.unlabelled_images, config.adapt
            )
            first = len(images) - len(split.unlabelled)
            indices = np.concatenate([split.train, np.arange(first, len(images))])
        except EdgekdError as error:
            warn(f"INT8 ranges are measured on labelled images only: {error.message}")
    return images, spread(indices, count, images)


def parity_images(loaded: LoadedRun, data: str | None) -> tuple[NDArray[np.uint8], list[str]]:
    """Return images of validation and test, uint8 `[M, H, W, 3]`, and their content keys."""
    images, split = loaded.data(data)
    chosen = _held_out(images, split, PARITY_IMAGES)
    return pixels_of(loaded, images, chosen), [images.keys[index] for index in chosen]


def _held_out(images: ImageSet, split: Split, count: int) -> NDArray[np.int64]:
    held_out = np.sort(np.concatenate([split.val, split.id_test, split.ood_test]))
    return spread(held_out, count, images)


def _pictures(images: ImageSet, split: Split) -> Iterator[NDArray[np.uint8]]:
    """Yield images of validation and test in their original sizes, uint8 `[h, w, 3]`."""
    for index in _held_out(images, split, RESIZED_IMAGES).tolist():
        yield np.asarray(images.read(index), dtype=np.uint8)


def _budget(loaded: LoadedRun, config: ExportConfig) -> AccuracyBudget:
    """Return the budget with validation images of the training domains, and the same corrupted (severity 3)."""
    loaded.check_labelled()
    images, split = loaded.data(config.data)
    chosen = spread(split.val, BUDGET_IMAGES, images)
    if len(chosen) == 0:
        raise EdgekdError(
            "The run has no validation images to measure the drop on.",
            "Leave out --max-drop-id and --max-drop-ood.",
        )
    pixels = pixels_of(loaded, images, chosen)

    def corrupted(number: int) -> NDArray[np.uint8]:
        image, bicubic = Image.fromarray(pixels[number]), Image.Resampling.BICUBIC
        wide = np.asarray(image.resize((SIZE, SIZE), bicubic))
        spoilt = corrupt(wide, NAMES[number % len(NAMES)], 3, images.keys[chosen[number]])
        return np.asarray(Image.fromarray(spoilt).resize(image.size, bicubic))

    limit_id, limit_ood = (
        math.inf if limit is None else limit for limit in (config.max_drop_id, config.max_drop_ood)
    )
    least = config.min_agreement
    return AccuracyBudget(
        pixels,
        images.labels[chosen],
        np.stack([corrupted(number) for number in range(len(pixels))]),
        limit_id,
        limit_ood,
        search_seconds=config.search_seconds,
        min_agreement=MIN_AGREEMENT[config.precision] if least is None else least / 100,
    )


def spread(indices: NDArray[np.int64], count: int, images: ImageSet) -> NDArray[np.int64]:
    """Return `count` of the indices with equal shares of the domains, as far as possible, in a fixed order."""
    rng = np.random.Generator(np.random.Philox(0))
    queues = [
        rng.permutation(indices[images.domain_of[indices] == domain]).tolist()
        for domain in (*range(len(images.domains)), NO_DOMAIN)
    ]
    chosen: list[int] = []
    while any(queues) and len(chosen) < count:
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(queue.pop())
    return np.array(sorted(chosen), dtype=np.int64)


def pixels_of(loaded: LoadedRun, images: ImageSet, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return images preprocessed for the run's student, uint8 `[N, H, W, 3]`."""
    return np.concatenate(list(pixel_batches(images, indices, loaded.run.preprocess)))


def _facts(loaded: LoadedRun, images: ImageSet, split: Split) -> dict[str, Any]:
    """Return the provenance of an artifact, and the facts of the split needed to find its test images."""
    run = loaded.run
    trained = {images.domains[domain] for domain in images.domain_of[split.train].tolist()}
    return {
        "run": run.name,
        "student": run.student,
        "recipe": run.recipe,
        "teacher": run.teacher,
        "split_hash": run.split_hash,
        "split_seed": split.seed,
        "test_domain": run.test_domain,
        "train_domains": sorted(trained),
        "unlabelled_domains": list(split.unlabelled_domains),
        "student_sha256": run.student_sha256,
    }


def int8_speed(artifact: Artifact) -> str | None:
    """Compare the latency of an INT8 artifact with the FP32 artifact: one image, one thread.

    Returns:
        A predicate with its interval, or the reason why no claim is made (`speed.in_words`). None if neither the target
        nor ONNX Runtime has an FP32 artifact, and for formats whose runtime may not be on this machine.
    """
    folder, timed = artifact.folder, target_of(artifact.format).timed_at_export
    if folder is None or artifact.precision != "int8" or not timed:
        return None
    own = artifact.name.replace("int8", "fp32")
    names = (own, own.replace(artifact.target, DEFAULT_TARGET))
    places = [folder.with_name(name) for name in names]
    beside = next((place for place in places if (place / "artifact.json").is_file()), None)
    if beside is None:
        return None
    size = artifact.preprocess.size
    images = np.random.default_rng(0).integers(0, 256, (8, size, size, 3), dtype=np.uint8)
    runs = {
        place.name: open_session(place, threads=1, spinning=False).run for place in (folder, beside)
    }
    found = timed_in_turns(runs, images)
    return in_words(speed_of(folder.name, beside.name, found), beside.name)
