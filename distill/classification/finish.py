"""The end of a training run: choose and calibrate the weights, and write the run."""

from __future__ import annotations

import platform
import shutil
from datetime import UTC, datetime
from typing import cast

import numpy as np
import torch
from torch.nn.functional import softmax
from torch.optim.swa_utils import update_bn

from edgekd.core.console import say
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import Run
from edgekd.core.readers import sha256_file
from edgekd.core.tensors import loaded_from, read_torch, write_tensors
from edgekd.core.version import __version__
from edgekd.data.unlabelled import NO_DATA
from edgekd.distill.averaging import LastWeights
from edgekd.distill.checkpoint import Checkpoint
from edgekd.distill.classification.predict import domain_mean, predict_all, student_predict
from edgekd.distill.classification.task import Classification
from edgekd.distill.inputs.cache import plain_embeddings
from edgekd.distill.inputs.views import render
from edgekd.distill.models.students import Student, fit_scale, interpolate_with_teacher
from edgekd.distill.models.teachers import ClipTeacher
from edgekd.distill.progress import Progress

STATISTICS_BATCHES = 20


def finish(
    task: Classification,
    average: LastWeights,
    checkpoint: Checkpoint,
    progress: Progress,
) -> None:
    """Choose the weights, fit the scale on source validation, and write student, bank and finally `run.json`.

    Scores that are not finite, which the last step may have caused, are an `EdgekdError`.
    """
    config, images, split, out = task.config, task.images, task.split, checkpoint.out
    final, selection = _chosen_weights(task, average, checkpoint)
    predict = student_predict(final, task.bank.head if task.bank else None)
    scores = predict_all(predict, images, split.val, final.preprocess)
    if not np.isfinite(scores).all():
        raise EdgekdError(
            f"The trained student's scores are not finite, because its weights diverged ({selection}).",
            "Lower --lr. Nothing was saved from this run.",
        )
    if config.data == NO_DATA:
        selection += "; scale fitted to the teacher's probabilities, as no image has a label"
        assert task.bank is not None
        assert task.teacher is not None
        held_out = plain_embeddings(task.teacher, images, split.val, task.fabric.device)
        targets = softmax(task.bank.zero_shot(held_out), dim=-1)
        agreement = float((scores.argmax(axis=1) == targets.argmax(dim=1).numpy()).mean())
        say(f"agreement with the teacher: {100 * agreement:.1f} % of {len(scores)} held-out images")
    else:
        targets = torch.from_numpy(images.labels[split.val])
        right = scores.argmax(axis=1) == images.labels[split.val]
        accuracy = domain_mean(right, images.domain_of[split.val])
        progress.evaluated(checkpoint.done, accuracy, final=True)
    final.scale.fill_(fit_scale(torch.from_numpy(scores), targets))
    path = out / "student.safetensors"
    facts = {"student": config.student, "recipe": task.recipe.name}
    write_tensors(path, final.state_dict(), facts)
    if task.bank:
        task.bank.write(out / "text_bank.safetensors")
    Run(
        name=out.name,
        student=config.student,
        recipe=task.recipe.name,
        data=config.data,
        teacher=config.teacher if task.teacher else "none",
        teacher_id=task.teacher.id if task.teacher else "none",
        classes=images.classes,
        preprocess=final.preprocess,
        split_hash=split.hash,
        test_domain=split.test_domain,
        seed=config.seed,
        steps=checkpoint.done,
        train_seconds=round(checkpoint.seconds_before + progress.seconds, 2),
        images_per_second=round(progress.images_per_second, 1),
        data_wait_percent=round(progress.data_wait_percent, 1),
        selection=selection,
        student_sha256=sha256_file(path),
        versions={
            "edgekd": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    ).write(out)
    progress.attach(out.name, "model", [path, out / "run.json", out / "config.json"])
    shutil.rmtree(out / "swad", ignore_errors=True)
    checkpoint.remove()


def _chosen_weights(
    task: Classification, average: LastWeights, checkpoint: Checkpoint
) -> tuple[Student, str]:
    """Return the student with the weights to save, on the CPU, and the selection rule."""
    config = task.config
    final = cast(Student, average.result())
    selection = average.label if config.average == "swad" else f"last {average.label}"
    if config.average == "wise-ft":
        assert isinstance(task.teacher, ClipTeacher)
        part = config.wise_ft
        interpolate_with_teacher(final, task.teacher, part)
        selection = f"WiSE-FT: {part:g} of the last weights, {1 - part:g} of the teacher's"
    if config.average in ("swad", "wise-ft") and config.bn == "train":
        device, size = task.fabric.device, final.preprocess.size
        batches = map(task.source, range(STATISTICS_BATCHES))
        views = (render(raw.pixels.to(device), raw.params, size) for raw in batches)
        with torch.no_grad():  # the averaged statistics are those of other weights
            update_bn(views, final.to(device))
        selection += "; BatchNorm statistics recomputed on training views"
    final = final.cpu()
    if config.select == "best":
        with loaded_from(checkpoint.best_path):
            final.load_state_dict(read_torch(checkpoint.best_path, "best weights"))
        step, label = checkpoint.best_step, average.label
        selection = f"best mean source-validation accuracy of the {label} (step {step})"
    return final, selection
