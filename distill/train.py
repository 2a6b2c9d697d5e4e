"""The training loop of all tasks (`fit`), and the training of an image classifier (`train`).

The loop runs in one process, in `--devices` processes, or in those of `torchrun`. Batches depend only on the step, so
any number of processes sees the same global batches, and a resumed run gives the same numbers.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from edgekd.configs.train import TrainConfig
from edgekd.core.ahead import map_ahead
from edgekd.core.console import is_main_process, say, set_rank, shell_word
from edgekd.core.errors import EdgekdError, Stopped
from edgekd.core.folders import RUN, growing
from edgekd.core.manifest import Run, read_run
from edgekd.data.image_set import ImageSet
from edgekd.data.split import Split
from edgekd.distill.averaging import Ema, LastWeights, Swad
from edgekd.distill.checkpoint import Checkpoint, StopRequest, Task
from edgekd.distill.classification.estimate import outline
from edgekd.distill.classification.finish import finish
from edgekd.distill.classification.plan import load_data, settle
from edgekd.distill.classification.setup import build, initialise, prepare
from edgekd.distill.classification.task import Classification
from edgekd.distill.launch import (
    Fabric,
    find_launch,
    keep_freed_memory,
    make_fabric,
    step_threads,
    total,
)
from edgekd.distill.losses import objective
from edgekd.distill.models.batchnorm import folded, training_mode
from edgekd.distill.progress import Progress, evaluation_steps
from edgekd.distill.recipes import Stage

SWAD_EVALUATIONS = 20
"""Number of SWAD's evaluations unless `eval_every` is set."""

Callback = Callable[[Classification, nn.Module, int, tuple[int, ...]], None]
"""Called as `callback(task, model, done, steps)` on process 0 with the weights that would be saved after `done` steps.
`steps` are all steps at which it is called. It must not change the run."""


def fit(
    task: Task,
    config: TrainConfig,
    fabric: Fabric,
    stages: Sequence[tuple[Stage, range]],
    checkpoint: Checkpoint,
    progress: Progress,
    callback: Callable[[nn.Module, int, tuple[int, ...]], None] | None = None,
    max_norm: float | None = None,
) -> LastWeights:
    """Train through all stages, starting at the checkpoint.

    Args:
        stages: each with its range of steps in the whole run.
        max_norm: maximum norm of the gradients; None is no limit.

    Returns:
        The average of the last stage, with the weights to save.

    Raises:
        EdgekdError: the loss is not finite.
        Stopped: a signal stopped the run, after a checkpoint was written.
    """
    assert config.lr is not None
    steps, frozen_bn = stages[-1][1].stop, config.bn == "frozen"
    for stage, span in stages:
        final, start = span.stop == steps, max(checkpoint.done, span.start)
        if start >= span.stop and not final:
            continue
        # Parts to train in this stage, their optimizer, and the average, which is updated at every step.
        task.train_only(stage.trains)
        base_lr = config.lr * stage.lr
        groups = param_groups_weight_decay(task.model, config.weight_decay)
        raw_optimizer = torch.optim.AdamW(groups, lr=base_lr, fused=True)
        task.model.to(fabric.device).to(memory_format=torch.channels_last)
        compiled: Any = torch.compile(task.model) if config.compile else task.model
        model: Any = fabric.setup_module(compiled)
        optimizer: Any = fabric.setup_optimizers(raw_optimizer)
        # torch.compile fuses by itself, and would recompile for every changed forward pass.
        folds = task.folds() if frozen_bn and not config.compile else []
        average = make_average(task, config, fabric, len(span), final=final)
        if start > span.start:
            checkpoint.restore_stage(raw_optimizer, average)
        validate_every = config.eval_every or (
            max(1, len(span) // 8) if config.select == "best" else None
        )
        evaluations = evaluation_steps(span, validate_every) if final else ()

        # The student's views, float [b, 3, S, S] in 0–1, are made ahead too, beside the step before.
        todo = range(start, start if checkpoint.patience_over else span.stop)
        batches = map_ahead(partial(_with_views, task), todo, ahead=1)
        done, stopping = start, False
        for step in todo:
            since = time.perf_counter()
            raw, views = next(batches)
            waited_s = time.perf_counter() - since
            # Mode and learning rate of this step.
            training_mode(model, frozen_bn=frozen_bn)
            constant = config.average == "swad" and final
            position = (step - span.start) / len(span)
            lr = base_lr * schedule(position, config.warmup, constant=constant)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # The teacher's features of the same views, and the loss.
            teacher = task.teacher_features(raw)  # float [b, D], None without a teacher
            with folded(folds):
                batch = task.forward(model, views, teacher, raw)
            sum_over = partial(total, fabric)
            loss, values = objective(batch, stage.terms, sum_over, fabric.world_size)
            stop_if_not_finite(loss, values, task.names(raw))

            # One step, of the weights, their average and the visual bank.
            optimizer.zero_grad()
            fabric.backward(loss)
            if max_norm is not None:
                fabric.clip_gradients(model, optimizer, max_norm=max_norm)
            optimizer.step()
            average.update(task.model, step - span.start)
            task.update(teacher)

            # Log, validate, checkpoint.
            done = step + 1
            images = len(batch.labels) * fabric.world_size
            progress.step(step, stage.name, loss, values, lr, images, waited_s)
            if validate_every and done in evaluations:
                checkpoint.evaluate(done, task, average, progress)
            if callback and done in evaluations:
                with progress.paused():
                    if fabric.is_global_zero:
                        callback(average.module, done, evaluations)
                    fabric.barrier()
            due, stopping = checkpoint.due(done)
            if due and done < span.stop:
                checkpoint.save(done, task, average, raw_optimizer, progress)
            if stopping or checkpoint.patience_over:
                break
        # Write a checkpoint at the end of a stage; the next stage only needs the weights.
        if start < done and (done == span.stop or checkpoint.patience_over):
            kept, state = (average, raw_optimizer) if final else (None, None)
            checkpoint.save(done, task, kept, state, progress)
        if stopping:
            raise checkpoint.stopped(done, steps)
    return average


def _with_views(task: Task, step: int) -> tuple[Any, Any]:
    raw = task.source(step)
    return raw, task.views(raw)


def make_average(
    task: Task, config: TrainConfig, fabric: Fabric, steps: int, *, final: bool
) -> LastWeights:
    """Return the average of a stage of `steps`; SWAD and WiSE-FT apply only to the last stage."""
    if config.average == "swad" and final:
        every = config.eval_every or max(1, steps // SWAD_EVALUATIONS)
        loss = task.loss if fabric.is_global_zero else None
        rule = config.swad.model_dump()
        return Swad(task.model, config.folder / "swad", every, steps, loss, rule)
    if config.average == "ema" and config.ema:
        return Ema(task.model, config.ema)
    return LastWeights(task.model)


def schedule(part: float, warmup: float, *, constant: bool = False) -> float:
    """Return the learning rate factor at `part` (0–1) of a stage: linear warm-up, then half a cosine to 0.

    With `constant` (for SWAD), it rises to the mean of the cosine and stays there, because weights that no longer
    change leave nothing to average.
    """
    if constant:
        return 0.5 * min(1.0, (part + 1e-3) / warmup if warmup else 1.0)
    if part < warmup:
        return (part + 1e-3) / warmup if warmup else 1.0
    return 0.5 * (1 + math.cos(math.pi * (part - warmup) / (1 - warmup)))


def stop_if_not_finite(loss: Tensor, values: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raise an `EdgekdError` with the term and the images if the loss is not finite."""
    if torch.isfinite(loss):
        return
    term = next((name for name, value in values.items() if not torch.isfinite(value)), "the sum")
    raise EdgekdError(
        f"The loss is not finite: {term}, on a batch with {', '.join(names[:4])}, ….",
        "Lower --lr, or check these images. Nothing was saved from this step.",
    )


def train(config: TrainConfig, callback: Callback | None = None) -> Run:
    """Train a student and write its run folder.

    Args:
        callback: called at the evaluation steps of the last stage, without effect on the run. With several processes
            it must be picklable.

    Raises:
        EdgekdError: a user error, before training starts whenever possible.
    """
    launch = find_launch()
    config = settle(config)
    # Process 0 locks the run folder for the whole training.
    folder = growing(config.folder, RUN, overwrite=config.overwrite, resume=config.resume)
    with folder if is_main_process() else contextlib.nullcontext():
        images, split = load_data(config)
        fabric = make_fabric(config, launch)
        # Bound with partial, because Fabric traverses the arguments of a launch and fails on frozen dataclasses.
        work = partial(_work, config=config, images=images, split=split, callback=callback)
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
            if isinstance(error, ProcessExitedException):
                how = error.signal_name or f"exit code {error.exit_code}"
                raise EdgekdError(
                    f"Process {error.error_index} of {config.devices} died ({how}), and the others were stopped.",
                    f"Resume, if needed with fewer --devices: edgekd train --resume --out {shell_word(config.folder)}",
                ) from error
            raise
        if stopped is not None:
            raise stopped
    return read_run(config.folder)


def _work(
    fabric: Fabric,
    config: TrainConfig,
    images: ImageSet,
    split: Split,
    callback: Callback | None,
) -> Stopped | None:
    """Run one process of a training. Return its `Stopped`, since torch drops a KeyboardInterrupt of a child process."""
    set_rank(fabric.global_rank)
    try:
        # If edgekd chooses the folder's name, it is the one that process 0 has locked.
        _train_process(fabric, fabric.broadcast(config), images, split, callback)
    except Stopped as stopped:
        return stopped
    except KeyboardInterrupt:
        if fabric.world_size == 1:
            raise
        return Stopped(signal.SIGINT)
    return None


def _train_process(
    fabric: Fabric,
    config: TrainConfig,
    images: ImageSet,
    split: Split,
    callback: Callback | None,
) -> None:
    keep_freed_memory()
    if fabric.world_size > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // fabric.world_size))
    task = build(fabric, config, images, split)
    prepare(task)
    say(outline(task).schedule)
    checkpoint = Checkpoint(config, fabric)
    resume_at = checkpoint.restore(task) if config.resume else 0
    initialise(task, resumed=resume_at > 0)
    spans = task.recipe.spans(task.steps)
    stages = [stage.name for stage, span in spans if len(span)]
    before = checkpoint.speed_before
    with Progress(config, fabric, task.steps, resume_at, before, stages) as progress:
        with checkpoint.request, step_threads(fabric, task.step_pixels):
            average = fit(
                task,
                config,
                fabric,
                spans,
                checkpoint,
                progress,
                partial(callback, task) if callback else None,
            )
        if fabric.is_global_zero:
            finish(task, average, checkpoint, progress)
    fabric.barrier()
