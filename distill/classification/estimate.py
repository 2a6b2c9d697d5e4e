"""Estimate of a run: its work, and its time by a few trial steps (`--plan`)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.configs.train import TrainConfig
from edgekd.distill.classification.plan import load_data, settle
from edgekd.distill.classification.setup import (
    augmentation_of,
    build,
    cached_view_counts,
    mixing_of,
)
from edgekd.distill.classification.task import Classification
from edgekd.distill.inputs.batches import MAX_BYTES, BatchSource, PixelStore, store_side
from edgekd.distill.inputs.cache import Embed, EmbeddingCache, caching_teacher
from edgekd.distill.launch import keep_freed_memory, make_fabric, step_threads
from edgekd.distill.losses import objective
from edgekd.distill.models.batchnorm import Fold, folded, training_mode
from edgekd.distill.models.teachers import ClipTeacher
from edgekd.distill.recipes import Stage

_TRIAL_STEPS = 3
_TRIAL_IMAGES = 16


@dataclass(frozen=True)
class Estimate:
    """An estimate of a run. Times are None if they were not measured."""

    images: dict[str, int]
    """Part of the data → number of images."""
    stages: dict[str, int]
    """Stage → number of steps."""
    batch: int
    epochs: float
    """Passes over the labelled training images, or over the unlabelled ones if there are no labelled ones."""
    teacher_views: int
    """Number of cached embeddings used by the run."""
    disk_mb: float
    """Maximum size of run folder, cached embeddings and decoded images, in 10⁶ bytes."""
    teacher_passes: int | None = None
    """Number of embeddings that are not in the cache yet."""
    teacher_seconds: float | None = None
    decode_seconds: float | None = None
    """Upper limit, since images of earlier runs are not decoded again."""
    train_seconds: float | None = None
    test_domain: str | None = None
    """Domain that is left out of training."""

    @property
    def steps(self) -> int:
        """Return the optimizer steps of all stages."""
        return sum(self.stages.values())

    @property
    def schedule(self) -> str:
        """Return the line that every run prints at its start."""
        parts = ", ".join(f"{name} {steps:,}" for name, steps in self.stages.items())
        views = f"{self.teacher_views:,} teacher embeddings" if self.teacher_views else "no teacher"
        return (
            f"plan: {self.steps:,} steps of {self.batch} images ({parts}), {self.epochs:.1f} epochs; {views}; "
            f"up to {self.disk_mb:,.0f} MB on disk"
        )

    def lines(self) -> list[str]:
        """Return the estimate as text."""
        counts = ", ".join(f"{count:,} {part}" for part, count in self.images.items() if count)
        unseen = f"; unseen domain: {self.test_domain}" if self.test_domain else ""
        times = {
            f"{self.teacher_passes or 0:,} teacher passes": self.teacher_seconds,
            "decoding": self.decode_seconds,
            "training": self.train_seconds,
        }
        known = {name: value for name, value in times.items() if value is not None}
        shown = ", ".join(f"{name} {_duration(value)}" for name, value in known.items())
        return [
            f"images: {counts}{unseen}",
            self.schedule,
            f"time: about {_duration(sum(known.values()))} on this machine ({shown}), measured by {_TRIAL_STEPS} trial "
            "steps of each stage",
        ]


def plan_run(config: TrainConfig) -> Estimate:
    """Return what `train(config)` would do and how long that takes here, or its error; only caches are written."""
    config = settle(config)
    fabric = make_fabric(config.model_copy(update={"devices": 1}))
    task = build(fabric, config, *load_data(config))
    keep_freed_memory()
    return measure(task, outline(task))


def outline(task: Classification) -> Estimate:
    """Count the work of a run."""
    split, config, teacher = task.split, task.config, task.teacher
    views = 0
    if task.needs_teacher and not config.online_teacher:
        counts = cached_view_counts(task)[task.trained]
        views = int(counts.sum()) if isinstance(teacher, ClipTeacher) else len(task.trained)
    state = task.student.state_dict().values()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in state)
    # A checkpoint has the weights, their average and AdamW's two moments; the finished student is one more copy.
    disk = 5 * weights + _decoded_bytes(task)
    disk += views * (2 * teacher.dim + 34) if isinstance(teacher, ClipTeacher) else 0
    return Estimate(
        images={
            "train": len(split.train),
            "unlabelled": len(split.unlabelled),
            "val": len(split.val),
            "ID test": len(split.id_test),
            "unseen test": len(split.ood_test),
        },
        stages={
            stage.name: len(span) for stage, span in task.recipe.spans(task.steps) if len(span)
        },
        batch=config.batch_size,
        epochs=task.steps / task.sampler.epoch_steps,
        teacher_views=views,
        disk_mb=disk / 1e6,
        test_domain=split.test_domain,
    )


def measure(task: Classification, planned: Estimate) -> Estimate:
    """Add times to an estimate: trial steps of every stage, a teacher pass, decoding. This changes the student."""
    config, teacher, images, device = task.config, task.teacher, task.images, task.fabric.device
    augmentation, counts = augmentation_of(config), cached_view_counts(task)
    chosen = task.trained[:: max(1, len(task.trained) // _TRIAL_IMAGES)][:_TRIAL_IMAGES]
    store = PixelStore(images, store_side(task.student.preprocess.size), None)
    decoded = len(images) * _seconds(lambda: store.batch(chosen), 1) / len(chosen)
    passes = teacher_s = online = None
    dim = teacher.dim if teacher else 0
    embeddings: Embed | None = (lambda i, _: _random(len(i), dim)) if teacher else None
    if task.needs_teacher and isinstance(teacher, ClipTeacher):
        if config.online_teacher:
            online, embeddings = PixelStore(images, store_side(teacher.preprocess.size), None), None
            teacher.model.to(device)
        else:
            seen = augmentation.id
            filler = caching_teacher(task.fabric, config, teacher, images, task.trained, seen)
            cache = EmbeddingCache(filler.cache_id, seen, filler.dim)
            passes = sum(
                len(cache.missing([images.keys[i]], range(counts[i]))) for i in task.trained
            )
            noise = torch.rand(_TRIAL_IMAGES, 3, *teacher.preprocess.shape)
            filler.model.to(device)
            trial = _seconds(lambda: filler.embed_images(noise.to(device)).cpu(), _TRIAL_STEPS)
            teacher_s = passes * trial / _TRIAL_IMAGES
            decoded *= 2 if passes else 1
    mixing = mixing_of(config, task.student.preprocess.size)
    task.source = BatchSource(
        store, task.sampler, augmentation, counts, embeddings, online, mixing=mixing
    )
    task.student.to(device).to(memory_format=torch.channels_last)
    model: Any = task.fabric.setup_module(task.student)
    folds = task.folds() if config.bn == "frozen" and not config.compile else []
    steps = [(stage, planned.stages.get(stage.name, 0)) for stage in task.recipe.stages]
    return replace(
        planned,
        teacher_passes=passes,
        teacher_seconds=teacher_s,
        decode_seconds=decoded,
        train_seconds=sum(_step_seconds(task, model, stage, folds) * n for stage, n in steps if n),
    )


def _random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _step_seconds(task: Classification, model: Any, stage: Stage, folds: list[Fold]) -> float:
    """Return the seconds of one optimizer step on a batch in memory."""
    optimizer = torch.optim.AdamW(task.student.parameters(), lr=1e-6, fused=True)
    raw = task.source(0)

    def once() -> None:
        training_mode(model, frozen_bn=task.config.bn == "frozen")
        optimizer.zero_grad()
        views, teacher = task.views(raw), task.teacher_features(raw)
        with folded(folds):
            batch = task.forward(model, views, teacher, raw)
        task.fabric.backward(objective(batch, stage.terms)[0])
        optimizer.step()
        if task.fabric.device.type == "cuda":
            torch.cuda.synchronize()

    with step_threads(task.fabric, task.step_pixels):
        return _seconds(once, _TRIAL_STEPS)


def _seconds(work: Callable[[], Any], times: int) -> float:
    """Return the median time of `work` after an untimed first run."""
    work()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _decoded_bytes(task: Classification) -> int:
    """Return the bytes of the stored decoded images for student and teacher."""
    sides = {store_side(task.student.preprocess.size)}
    if isinstance(task.teacher, ClipTeacher) and task.needs_teacher:
        sides.add(store_side(task.teacher.preprocess.size))
    sizes = [3 * side**2 * len(task.images) for side in sides]
    return sum(size for size in sizes if size <= MAX_BYTES)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
