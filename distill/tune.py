"""Fine-tuning of a finished run whose student's body has become another network, with the run's own lessons.

The terms are those of the recipe's last stage, the batches and the teacher's embeddings those of the run, from the same
cache. Nothing is written; who asked for the training keeps what he wants.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekd.console import say
from edgekd.distill.fitting import check_needs
from edgekd.distill.job import Job
from edgekd.distill.lessons import make_lessons, run_descriptions
from edgekd.distill.load import LoadedRun
from edgekd.distill.loader import BatchSource, Prefetcher
from edgekd.distill.memory import keep_freed_memory
from edgekd.distill.recipes import Stage, get_recipe
from edgekd.distill.students import Student
from edgekd.distill.teacher import load_teacher
from edgekd.distill.teaching import batch_source
from edgekd.distill.train import make_fabric, run_sampler, schedule, step_loss
from edgekd.errors import EdgekdError
from edgekd.unlabelled import with_unlabelled

LR = 0.1
"""Times the run's own: the weights need to move by about their rounding, no further."""
RANGE_LR = 2e-3
"""Of the factors on the activations' ranges, under Adam about what each moves per step."""
WARMUP = 0.1
CHECKS = 6
"""Times that the result is looked at, spread over the steps."""


@dataclass(frozen=True, eq=False)
class Tuning:
    """A run that can go on: its job, the last stage, and its batches."""

    job: Job
    stage: Stage
    source: BatchSource
    first_step: int

    @property
    def student(self) -> Student:
        return self.job.student


class _Features(nn.Module):
    """A body that takes RGB `[B, H, W, 3]` in 0–255, behind a student's views."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, views: Tensor) -> Tensor:
        """Float `[B, 3, S, S]` in 0–1 → features `[B, d]`."""
        features: Tensor = self.body(255 * views.permute(0, 2, 3, 1))
        return features


def prepare(loaded: LoadedRun, data: str | None = None) -> Tuning:
    """Gather what the run was trained with; the cache is filled again where it has been removed.

    Args:
        data: where the run's images lie now, if they have moved.

    Raises:
        EdgekdError: the teacher is gone or another one, the images or captions are gone.
    """
    config = loaded.config.model_copy(
        update={
            "out": loaded.folder,
            "resume": True,
            "devices": 1,
            "precision": "32-true",
            "compile": False,
        }
    )
    recipe = get_recipe(config.recipe, config.stages)
    check_needs(recipe, config)
    images, split = loaded.data(data)
    if config.unlabelled:
        images, split = with_unlabelled(images, split, config.unlabelled, config.unlabelled_images)
    fabric = make_fabric(config)
    fabric.launch()
    fabric.seed_everything(config.seed, verbose=False)
    teacher = load_teacher(config.teacher) if recipe.needs & {"teacher", "bank"} else None
    if teacher is not None and teacher.id != loaded.run.teacher_id:
        raise EdgekdError(
            f"{config.teacher} is not the teacher that this run learned from: its weights differ.",
            "Put the run's own teacher back, or train again.",
        )
    described = run_descriptions(config, images.classes)
    lessons = make_lessons(fabric, config, recipe, images, split, teacher, loaded.bank, described)
    if loaded.bank is not None:
        lessons = lessons.in_space_of(loaded.bank)
    student = copy.deepcopy(loaded.student)
    job = Job(fabric, config, recipe, images, split, student, teacher, loaded.bank, lessons)
    source = batch_source(job, run_sampler(job))
    return Tuning(job, recipe.stages[-1], source, loaded.run.steps)


def tune(
    tuning: Tuning,
    body: nn.Module,
    weights: Iterable[nn.Parameter],
    ranges: Iterable[nn.Parameter],
    steps: int,
    go_on: Callable[[int], bool],
) -> None:
    """Train `body`, and of the student's last layers those that the stage trains, in place.

    Args:
        body: RGB float `[B, H, W, 3]` in 0–255 → features `[B, d]`, in place of the student's own.
        weights: its parameters that learn at a tenth of the run's rate.
        ranges: its parameters near 1 that learn at `RANGE_LR`.
        go_on: asked `CHECKS` times, with the number of steps done; False ends the training.

    Raises:
        EdgekdError: the loss is not finite.
    """
    job, stage, student = tuning.job, tuning.stage, tuning.job.student
    assert job.config.lr is not None
    keep_freed_memory()
    device = job.fabric.device
    student.requires_grad_(False)
    body.to(device).requires_grad_(True)
    student.backbone, student.neck = _Features(body), None
    student.mean.zero_()  # the body normalises for itself
    student.std.fill_(1)
    student.to(device).train()
    parts = {"projector": student.projector, "head": student.head}
    learning = [part for name, part in parts.items() if part is not None and name in stage.trains]
    for part in learning:
        part.requires_grad_(True)
    last = [parameter for part in learning for parameter in part.parameters()]
    rates = (LR * job.config.lr * stage.lr, RANGE_LR)
    groups = [
        {"params": [*weights, *last], "lr": rates[0]},
        {"params": list(ranges), "lr": rates[1]},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    every = max(1, math.ceil(steps / CHECKS))
    batches = Prefetcher(tuning.source, range(tuning.first_step, tuning.first_step + steps))
    say(
        f"qat: {steps} steps of {job.config.batch_size} with {' + '.join(stage.terms)}, learning rate {rates[0]:.2g}"
    )
    for step, raw in batches:
        done = step - tuning.first_step + 1
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule((done - 1) / steps, WARMUP)
        loss, _, taught = step_loss(job, student, stage, raw)
        optimizer.zero_grad()
        job.fabric.backward(loss)
        optimizer.step()
        job.lessons.learn(job.fabric, taught)
        if (done % every == 0 or done == steps) and not go_on(done):
            break
