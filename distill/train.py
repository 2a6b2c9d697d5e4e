"""The training loop, top to bottom.

One process on a laptop, `--devices 2` here, or every process of `torchrun` runs `_train_process`; batches are a
function of the step, so any number of processes sees the same global batches and a resumed run the same numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import signal
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from edgekd.configs.train import TrainConfig
from edgekd.core.console import say, set_rank
from edgekd.core.errors import EdgekdError, Stopped
from edgekd.core.manifest import Run, read_run
from edgekd.data.image_set import ImageSet
from edgekd.data.split import Split
from edgekd.distill.checkpoint import Checkpoint, StopRequest
from edgekd.distill.descriptions import Descriptions
from edgekd.distill.estimate import Estimate, measure, outline
from edgekd.distill.finish import averaging, finish
from edgekd.distill.fitting import check_needs
from edgekd.distill.folding import Fold, find_folds, folded
from edgekd.distill.job import Job, Look, total
from edgekd.distill.launch import Fabric, find_launch, make_fabric
from edgekd.distill.lessons import class_bank, make_lessons
from edgekd.distill.loader import BatchSource, Prefetcher, RawBatch
from edgekd.distill.looking import places, show, validation_every
from edgekd.distill.memory import keep_freed_memory
from edgekd.distill.plan import begin_folder, claimed, load_data, settle, total_steps
from edgekd.distill.progress import Progress
from edgekd.distill.prompts import TextBank
from edgekd.distill.recipes import Recipe, Stage, get_recipe
from edgekd.distill.restyle import restyle
from edgekd.distill.sampling import Sampler
from edgekd.distill.start import continue_from
from edgekd.distill.students import TEACHERS_TOWER, Student
from edgekd.distill.teacher import load_teacher
from edgekd.distill.teaching import (
    batch_source,
    centre_projector,
    centred,
    run_sampler,
    say_zero_shot,
    start_head_at_texts,
    teacher_embedding,
    without_strangers,
)
from edgekd.distill.terms import Batch, objective
from edgekd.distill.tower import first_student
from edgekd.distill.views import render


def train(config: TrainConfig, look: Look | None = None) -> Run:
    """Train a student and write its run folder.

    Args:
        look: shown the weights at `looking.places` of the last stage; the run's numbers are the same without. It must
            pickle where there are several processes.

    Raises:
        EdgekdError: anything the user can mend, before training starts wherever possible.
    """
    launch = find_launch()
    config = settle(config)
    assert config.out is not None
    with claimed(config):
        images, split = load_data(config)
        fabric = make_fabric(config, launch)
        # Bound beforehand: Fabric walks through the arguments of a launch and stumbles over frozen dataclasses.
        work = functools.partial(_work, config=config, images=images, split=split, look=look)
        request = StopRequest(forward=True) if config.devices > 1 and not launch else None
        try:
            with request or contextlib.nullcontext():
                stopped = fabric.launch(work)
        except (ProcessRaisedException, ProcessExitedException) as error:
            if request and request.number:
                raise Stopped(request.number) from error
            marker = "EdgekdError: "  # a child's EdgekdError arrives as text
            if marker in str(error):
                raise EdgekdError(str(error).rsplit(marker, 1)[1].strip()) from error
            raise
        if stopped is not None:
            raise stopped
    return read_run(config.out)


def _work(
    fabric: Fabric, config: TrainConfig, images: ImageSet, split: Split, look: Look | None
) -> Stopped | None:
    """One process's part. What stopped it is returned: torch drops a KeyboardInterrupt of a process it started."""
    set_rank(fabric.global_rank)
    try:
        # The folder's name, where edgekd chooses it, is the one that process 0 has claimed.
        _train_process(fabric, fabric.broadcast(config), images, split, look)
    except Stopped as stopped:
        return stopped
    except KeyboardInterrupt:
        if fabric.world_size == 1:
            raise
        return Stopped(signal.SIGINT)
    return None


def _make_job(
    fabric: Fabric, config: TrainConfig, images: ImageSet, split: Split, look: Look | None
) -> tuple[Job, Descriptions | None]:
    """Build teacher, text targets and student; also return what the prompts' descriptions are."""
    recipe = get_recipe(config.recipe, config.stages)
    check_needs(recipe, config)
    texts = bool(recipe.needs & {"teacher", "bank"}) or recipe.head == "text"
    teacher = load_teacher(config.teacher) if texts or config.student == TEACHERS_TOWER else None
    sources = [name for name in images.domains if name != split.test_domain]
    bank, described = (
        class_bank(fabric, config, recipe, teacher, images.classes, sources)
        if teacher and texts
        else (None, None)
    )
    if config.unlabelled_filter and not config.resume:
        images, split = without_strangers(fabric, teacher, bank, images, split)
    lessons = make_lessons(fabric, config, recipe, images, split, teacher, bank, described)
    fabric.seed_everything(config.seed, verbose=False)
    student = first_student(config, recipe, teacher, len(images.classes))
    return Job(
        fabric, config, recipe, images, split, student, teacher, bank, lessons, look
    ), described


def plan_run(config: TrainConfig) -> Estimate:
    """Return what `train(config)` would do, and how long it would take here; nothing is written but caches.

    Raises:
        EdgekdError: as `train`, for whatever it would refuse before training.
    """
    config = settle(config)
    images, split = load_data(config)
    fabric = make_fabric(config.model_copy(update={"devices": 1}))
    job, _ = _make_job(fabric, config, images, split, None)
    sampler = run_sampler(job)
    planned = _outline(job, sampler)

    keep_freed_memory()
    student, frozen = job.student, config.bn == "frozen"
    student.to(fabric.device).to(memory_format=torch.channels_last)
    folds = _folds(job)

    def step(stage: Stage, raw: RawBatch) -> Tensor:
        _training_mode(student, student, frozen_bn=frozen)
        with folded(folds):
            return step_loss(job, student, stage, raw)[0]

    return measure(job, planned, sampler, step)


def _outline(job: Job, sampler: Sampler) -> Estimate:
    steps = share_out(job.recipe, total_steps(job.config, sampler.epoch_steps))
    stages = {stage.name: count for stage, count in zip(job.recipe.stages, steps, strict=True)}
    return outline(job, stages, sampler.epoch_steps)


def _train_process(
    fabric: Fabric, config: TrainConfig, images: ImageSet, split: Split, look: Look | None
) -> None:
    assert config.out is not None
    assert config.lr is not None
    keep_freed_memory()
    if fabric.world_size > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // fabric.world_size))
    job, described = _make_job(fabric, config, images, split, look)
    recipe, images, student = job.recipe, job.images, job.student
    bank, lessons = job.bank, job.lessons
    if fabric.is_global_zero:
        begin_folder(config, job.split, described)
    fabric.barrier()
    _say_plan(job)

    sampler = run_sampler(job)
    steps = total_steps(config, sampler.epoch_steps)
    say(_outline(job, sampler).schedule)
    source = batch_source(job, sampler)
    checkpoint = Checkpoint(config, fabric)
    checkpoint.visual = lessons.visual
    resume_at = checkpoint.restore(student) if config.resume else 0
    if bank:
        if resume_at == 0:
            say_zero_shot(job, source)
        bank = centred(job, source)
        job = dataclasses.replace(job, bank=bank, lessons=lessons.in_space_of(bank))
    if resume_at == 0:
        start_head_at_texts(job)
        if config.start is None:
            centre_projector(job, source(0))
        else:
            continue_from(config.start, student, images.classes)
    first_step = 0
    before = checkpoint.speed_before
    with Progress(config.out, steps, config, fabric, resume_at, before) as progress:
        with StopRequest() as checkpoint.request:
            for stage, stage_steps in zip(recipe.stages, share_out(recipe, steps), strict=True):
                span = range(first_step, first_step + stage_steps)
                if resume_at < span.stop or span.stop == steps:
                    _run_stage(
                        job,
                        stage,
                        span,
                        max(resume_at, first_step),
                        source,
                        checkpoint,
                        progress,
                        steps,
                    )
                first_step = span.stop
        seconds = checkpoint.seconds_before + progress.seconds
        if fabric.is_global_zero:
            finish(job, checkpoint, steps, seconds, progress, source)
    fabric.barrier()


def _run_stage(
    job: Job,
    stage: Stage,
    span: range,
    start: int,
    source: BatchSource,
    checkpoint: Checkpoint,
    progress: Progress,
    steps: int,
) -> None:
    """Steps `start` to the end of `span`, the stage's part of the run's `steps`."""
    fabric, config, student = job.fabric, job.config, job.student
    assert config.lr is not None
    parts = (
        ("backbone", student.backbone),
        ("projector", student.neck),
        ("projector", student.projector),
    )
    for name, part in (*parts, ("head", student.head)):
        if part is not None:
            part.requires_grad_(name in stage.trains)
    raw_optimizer = torch.optim.AdamW(
        param_groups_weight_decay(student, config.weight_decay), lr=config.lr * stage.lr, fused=True
    )
    student.to(fabric.device).to(memory_format=torch.channels_last)
    model: Any = fabric.setup_module(
        cast(nn.Module, torch.compile(student)) if config.compile else student
    )
    optimizer: Any = fabric.setup_optimizers(raw_optimizer)
    folds = _folds(job)
    final = span.stop == steps
    average = averaging(job, len(span), final=final)
    if start > span.start:
        checkpoint.restore_stage(raw_optimizer, average)
    checkpoint.average = average
    every = validation_every(config, len(span))
    validated = places(span, every) if final and every else ()
    shown = places(span, every) if final and job.look else ()

    batches = Prefetcher(source, range(start, span.stop))
    done, stopping = start, False
    for step, raw in batches:
        _training_mode(model, student, frozen_bn=config.bn == "frozen")
        rate = (
            config.lr
            * stage.lr
            * schedule(
                (step - span.start) / len(span),
                config.warmup,
                constant=config.average == "swad" and final,
            )
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        with folded(folds):
            loss, values, taught = step_loss(job, model, stage, raw)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        average.update(student, step - span.start)
        job.lessons.learn(fabric, taught)
        progress.step(
            step, stage.name, loss, values, rate, len(raw.indices) * fabric.world_size, batches
        )
        done = step + 1
        if done in validated:
            checkpoint.evaluate(job, done, progress)
        if done in shown:
            show(job, average.module, done, shown, progress)
        due, stopping = checkpoint.after_step(done)
        if due and done < span.stop:
            checkpoint.save(done, student, average, raw_optimizer, progress)
        if stopping:
            break
    # The end of a stage is a checkpoint: the next stage needs the weights and nothing else.
    if start < done == span.stop:
        kept, optimizer = (average, raw_optimizer) if final else (None, None)
        checkpoint.save(done, student, kept, optimizer, progress)
    if stopping:
        raise checkpoint.stopped(done, steps)


def step_loss(
    job: Job, model: nn.Module, stage: Stage, raw: RawBatch
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """Views, teacher and objective of one process's share of a batch.

    Args:
        model: the job's student, wrapped for compilation or several processes.

    Returns:
        Loss and values as `stage_loss`, and the teacher's embeddings of the views, float `[b, D]`, where it was asked.

    Raises:
        EdgekdError: the loss is not finite.
    """
    fabric, student = job.fabric, job.student
    views = render(
        raw.pixels.to(fabric.device, non_blocking=True), raw.params, student.preprocess.size
    )
    taught = teacher_embedding(raw, job.teacher, fabric.device)
    if raw.restyle is not None:
        views = restyle(views, raw.restyle)
    fields = job.lessons.fields(raw.indices, fabric.device)
    loss, values = stage_loss(
        fabric, model, student, stage, views, raw.labels, taught, job.lessons.bank, fields
    )
    _stop_if_not_finite(loss, values, raw, job.images)
    return loss, values, taught


def stage_loss(
    fabric: Fabric,
    model: nn.Module,
    student: Student,
    stage: Stage,
    views: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
    bank: TextBank | None,
    fields: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward pass and objective of one process's share of a batch.

    Args:
        model: `student`, wrapped for compilation or several processes.
        views: float `[B, 3, S, S]` in 0–1.
        labels: int64 `[B]`.
        teacher: teacher's embeddings of these views, float `[B, D]`.
        bank: what the terms compare with.
        fields: further fields of `Batch`.

    Returns:
        As `edgekd.distill.terms.objective`.
    """
    out = model(views)
    batch = Batch(
        labels=labels.to(fabric.device),
        embedding=out if student.embeds else None,
        logits=student.classify(out) if student.head is not None else None,
        teacher=bank.image_target(teacher) if bank and teacher is not None else teacher,
        bank=bank.head.to(fabric.device) if bank else None,
        logit_scale=bank.logit_scale if bank else 1.0,
        zero_shot=bank.zero_shot(teacher) if bank and teacher is not None else None,
        **(fields or {}),  # type: ignore[arg-type]
    )
    if fabric.world_size > 1:
        batch = dataclasses.replace(
            batch,
            gather=lambda own: cast(
                Tensor, fabric.all_gather(own, sync_grads=own.requires_grad)
            ).flatten(0, 1),
            first=fabric.global_rank * len(labels),
        )
    return objective(batch, stage.terms, lambda count: total(fabric, count), fabric.world_size)


def share_out(recipe: Recipe, steps: int) -> list[int]:
    """Whole steps of each stage; they add up to `steps`."""
    edges = np.rint(np.cumsum([0.0, *(stage.share for stage in recipe.stages)]) * steps).astype(int)
    return [int(part) for part in np.diff(edges)]


def schedule(part: float, warmup: float, *, constant: bool = False) -> float:
    """Factor on the learning rate at `part` (0–1) of a stage: a linear rise, then half a cosine down to 0.

    `constant`, for SWAD: a rise to the cosine's mean, then no change; weights at rest leave nothing to average.
    """
    if constant:
        return 0.5 * min(1.0, (part + 1e-3) / warmup if warmup else 1.0)
    if part < warmup:
        return (part + 1e-3) / warmup if warmup else 1.0
    return 0.5 * (1 + math.cos(math.pi * (part - warmup) / (1 - warmup)))


def _folds(job: Job) -> list[Fold]:
    """Return the layers whose frozen BatchNorm is folded while training."""
    # A compiler fuses for itself, and would compile again for every pass that changes.
    if job.config.bn != "frozen" or job.config.compile:
        return []
    side = job.student.preprocess.size
    example = torch.linspace(0, 1, 6 * side**2, device=job.fabric.device)
    return find_folds(job.student, example.reshape(2, 3, side, side))


def _training_mode(model: nn.Module, student: Student, *, frozen_bn: bool) -> None:
    """Dropout and the like on; BatchNorm statistics as the policy says, also in parts that do not train."""
    model.train()
    if frozen_bn:
        for module in student.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _stop_if_not_finite(
    loss: Tensor, values: Mapping[str, Tensor], raw: RawBatch, images: ImageSet
) -> None:
    if torch.isfinite(loss):
        return
    term = next((name for name, value in values.items() if not torch.isfinite(value)), "the sum")
    files = ", ".join(images.ids[i] for i in raw.indices[:4])
    raise EdgekdError(
        f"The loss is not finite: {term}, on a batch with {files}, ….",
        "Lower --lr, or look at these images; nothing was saved from this step.",
    )


def _say_plan(job: Job) -> None:
    config, recipe, images, split = job.config, job.recipe, job.images, job.split
    unlabelled = f"{len(split.unlabelled):,} unlabelled, " if split.unlabelled else ""
    unseen = (
        f"unseen domain {split.test_domain} ({len(split.ood_test):,})"
        if split.test_domain
        else "no unseen domain"
    )
    say(
        f"data: {len(images.classes)} classes; {len(split.train):,} train, {unlabelled}{len(split.val):,} val, "
        f"{len(split.id_test):,} ID test; {unseen}"
    )
    stages = " → ".join(f"{stage.name} ({' + '.join(stage.terms)})" for stage in recipe.stages)
    averaged = f"EMA {config.ema:g}" if config.average == "ema" else f"average {config.average}"
    say(
        f"recipe: {recipe.name}: {stages}; lr {config.lr:g}, batch {config.batch_size}, BatchNorm {config.bn}, "
        f"{averaged}, {job.student.preprocess.size} px"
    )
