"""The end of a training run: which weights, how sure they may be, and everything written down."""

from __future__ import annotations

import functools
import platform
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softmax
from torch.optim.swa_utils import update_bn

from edgekd.core.console import say
from edgekd.core.errors import EdgekdError
from edgekd.core.files import sha256_file
from edgekd.core.manifest import Run
from edgekd.core.readers import read_torch
from edgekd.data.unlabelled import NO_DATA
from edgekd.distill.averaging import Ema, LastWeights, Swad
from edgekd.distill.checkpoint import Checkpoint
from edgekd.distill.job import Job
from edgekd.distill.loader import BatchSource
from edgekd.distill.predict import predict_all, student_predict
from edgekd.distill.progress import Progress
from edgekd.distill.students import Student, fit_scale, save_student
from edgekd.distill.teacher import ClipTeacher
from edgekd.distill.teaching import plain_embeddings
from edgekd.distill.tower import interpolate_with_teacher
from edgekd.distill.validate import domain_mean, source_loss
from edgekd.distill.views import render
from edgekd.version import __version__

SWAD_EVALUATIONS = 20
"""Unless `eval_every` says otherwise."""

STATISTICS_BATCHES = 20


def averaging(job: Job, stage_steps: int, *, final: bool) -> LastWeights:
    """What the configuration says about averaging; SWAD and WiSE-FT look at the last stage alone."""
    config, student = job.config, job.student
    assert config.out is not None
    if config.average == "swad" and final:
        bank, images, split = job.bank, job.images, job.split
        loss = functools.partial(source_loss, bank=bank, images=images, indices=split.val)
        return Swad(
            student,
            config.out / "swad",
            config.eval_every or max(1, stage_steps // SWAD_EVALUATIONS),
            stage_steps,
            loss if job.fabric.is_global_zero else None,
            config.swad.model_dump(),
        )
    if config.average == "ema" and config.ema:
        return Ema(student, config.ema)
    return LastWeights(student)


def finish(
    job: Job,
    checkpoint: Checkpoint,
    steps: int,
    seconds: float,
    progress: Progress,
    source: BatchSource,
) -> None:
    """Choose the weights, fit their scale on source validation, and write student, bank and `run.json`, last.

    Raises:
        EdgekdError: weights whose scores are not finite, which the last step may have made.
    """
    config, recipe, images, split = job.config, job.recipe, job.images, job.split
    assert config.out is not None
    out = config.out
    assert checkpoint.average is not None
    final = checkpoint.average.result()
    averaging = checkpoint.average.label
    selection = averaging if config.average == "swad" else f"last {averaging}"
    if config.average == "wise-ft":
        assert isinstance(job.teacher, ClipTeacher)
        interpolate_with_teacher(final, job.teacher, config.wise_ft)
        selection = f"WiSE-FT: {config.wise_ft:g} of the last weights, {1 - config.wise_ft:g} of the teacher's"
    if config.average in ("swad", "wise-ft") and config.bn == "train":
        recompute_statistics(final, source, job.fabric.device)
        selection += "; BatchNorm statistics recomputed on training views"
    final = final.cpu()
    if config.select == "best":
        final.load_state_dict(read_torch(checkpoint.best_path, "best weights"))
        selection = (
            f"best mean source-validation accuracy of the {averaging} (step {checkpoint.best_step})"
        )
    vectors = job.bank.head if job.bank else None
    scores = predict_all(student_predict(final, vectors), images, split.val, final.preprocess)
    if not np.isfinite(scores).all():
        raise EdgekdError(
            f"The trained student's scores are not finite: its weights grew without bound ({selection}).",
            "Lower --lr; nothing was saved from this run.",
        )
    if config.data == NO_DATA:
        selection += "; scale fitted to the teacher's probabilities, as no image has a label"
        targets = _teacher_probabilities(job)
        agreement = float((scores.argmax(axis=1) == targets.argmax(dim=1).numpy()).mean())
        say(f"the teacher's class on {100 * agreement:.1f} % of {len(scores)} held-out images")
    else:
        targets = torch.from_numpy(images.labels[split.val])
        progress.evaluated(steps, domain_mean(scores, images, split.val), final=True)
    final.scale.fill_(fit_scale(torch.from_numpy(scores), targets))
    save_student(
        final, out / "student.safetensors", {"student": config.student, "recipe": recipe.name}
    )
    if job.bank:
        job.bank.write(out / "text_bank.safetensors")
    Run(
        name=out.name,
        student=config.student,
        recipe=recipe.name,
        data=config.data,
        teacher=config.teacher if job.teacher else "none",
        teacher_id=job.teacher.id if job.teacher else "none",
        classes=images.classes,
        preprocess=final.preprocess,
        split_hash=split.hash,
        test_domain=split.test_domain,
        seed=config.seed,
        steps=steps,
        train_seconds=round(seconds, 2),
        images_per_second=round(progress.images_per_second, 1),
        data_wait_percent=round(progress.data_wait_percent, 1),
        selection=selection,
        student_sha256=sha256_file(out / "student.safetensors"),
        versions={
            "edgekd": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    ).write(out)
    shutil.rmtree(out / "swad", ignore_errors=True)
    for path in (checkpoint.path, checkpoint.best_path):
        path.unlink(missing_ok=True)


def _teacher_probabilities(job: Job) -> Tensor:
    """The teacher's zero-shot probabilities on the held-out images, float `[len(val), C]`."""
    assert job.teacher is not None
    assert job.bank is not None
    found = plain_embeddings(job.fabric, job.teacher, job.images, job.split.val)
    return softmax(job.bank.zero_shot(found), dim=-1)


@torch.no_grad()
def recompute_statistics(student: Student, source: BatchSource, device: torch.device) -> None:
    """BatchNorm statistics of averaged weights: those of none of the weights that went into the average."""

    def views() -> Iterator[Tensor]:
        for step in range(STATISTICS_BATCHES):
            raw = source(step)
            yield render(raw.pixels.to(device), raw.params, student.preprocess.size)

    update_bn(views(), student.to(device))
