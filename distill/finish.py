"""The end of a training run: which weights, how sure they may be, and everything written down."""

from __future__ import annotations

import platform
from datetime import UTC, datetime

import torch

from edgekd.distill.checkpoint import Checkpoint
from edgekd.distill.job import Job
from edgekd.distill.predict import predict_all, student_predict
from edgekd.distill.progress import Progress
from edgekd.distill.students import Student, fit_scale, save_student
from edgekd.distill.validate import domain_mean
from edgekd.files import sha256_file
from edgekd.manifest import Run
from edgekd.version import __version__


def finish(job: Job, checkpoint: Checkpoint, steps: int, seconds: float, progress: Progress) -> None:
    """Choose the weights, fit their scale on source validation, and write student, bank and `run.json`, last."""
    config, recipe, images, split = job.config, job.recipe, job.images, job.split
    assert config.out is not None
    out = config.out
    averaged = checkpoint.averaged
    assert isinstance(averaged, Student)
    final = averaged.cpu()
    averaging = f"EMA {config.ema:g}" if config.ema else "weights"
    selection = f"last {averaging}"
    if config.select == "best":
        final.load_state_dict(torch.load(checkpoint.best_path, map_location="cpu", weights_only=True))
        selection = f"best mean source-validation accuracy of the {averaging} (step {checkpoint.best_step})"
    vectors = job.bank.head if job.bank else None
    scores = predict_all(student_predict(final, vectors), images, split.val, final.preprocess)
    final.scale.fill_(fit_scale(torch.from_numpy(scores), torch.from_numpy(images.labels[split.val])))
    progress.evaluated(steps, domain_mean(scores, images, split.val), final=True)
    save_student(final, out / "student.safetensors", {"student": config.student, "recipe": recipe.name})
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
        versions={"edgekd": __version__, "torch": torch.__version__, "python": platform.python_version()},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    ).write(out)
    for path in (checkpoint.path, checkpoint.best_path):
        path.unlink(missing_ok=True)
