"""What a run would do, and how long that takes here: counted, and measured by a few trial steps (`--plan`)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.distill.cache import EmbeddingCache
from edgekd.distill.job import Job
from edgekd.distill.loader import BatchSource, RawBatch
from edgekd.distill.pixels import MAX_BYTES, PixelStore, store_side
from edgekd.distill.recipes import Stage
from edgekd.distill.restyle import RestylePolicy
from edgekd.distill.sampling import Sampler
from edgekd.distill.teacher import ClipTeacher
from edgekd.distill.teaching import cached_view_counts, cached_views, caching_teacher
from edgekd.distill.views import ViewPolicy

_TRIAL_STEPS = 3
_TRIAL_IMAGES = 16

Step = Callable[[Stage, RawBatch], Tensor]
"""Loss of a batch under a stage's terms."""


@dataclass(frozen=True)
class Estimate:
    """A run before it happens. Times are None where nothing was measured."""

    images: dict[str, int]
    """Part of the data → images."""
    stages: dict[str, int]
    """Stage → steps."""
    batch: int
    epochs: float
    """Passes over the labelled training images, or the unlabelled ones where there are no others."""
    teacher_views: int
    """Embeddings that the run reads from the cache."""
    disk_mb: float
    """Of the run's folder, the cached embeddings and the decoded images at most, 10⁶ bytes."""
    teacher_passes: int | None = None
    """Of them not in the cache yet."""
    teacher_seconds: float | None = None
    decode_seconds: float | None = None
    """At most: what was decoded for an earlier run is not decoded again."""
    train_seconds: float | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(self.stages.values())

    @property
    def schedule(self) -> str:
        """The line that every run prints at its start."""
        parts = ", ".join(f"{name} {steps:,}" for name, steps in self.stages.items())
        views = f"{self.teacher_views:,} teacher embeddings" if self.teacher_views else "no teacher"
        return (
            f"plan: {self.steps:,} steps of {self.batch} images ({parts}), {self.epochs:.1f} epochs; {views}; "
            f"up to {self.disk_mb:,.0f} MB on disk"
        )

    def lines(self) -> list[str]:
        """Return the estimate for people."""
        counts = ", ".join(f"{count:,} {part}" for part, count in self.images.items() if count)
        times = {
            "teacher": self.teacher_seconds,
            "decoding": self.decode_seconds,
            "training": self.train_seconds,
        }
        known = {name: value for name, value in times.items() if value is not None}
        told = ", ".join(f"{name} {_duration(value)}" for name, value in known.items())
        passes = f"; {self.teacher_passes:,} of them to compute" if self.teacher_passes else ""
        return [
            f"images: {counts}",
            f"{self.schedule}{passes}",
            f"time: about {_duration(sum(known.values()))} here ({told}), measured by {_TRIAL_STEPS} trial steps of "
            "each stage",
        ]

    def _repr_html_(self) -> str:
        import html

        return "<br>".join(html.escape(line) for line in self.lines())


def outline(job: Job, stages: dict[str, int], epoch_steps: int) -> Estimate:
    """Count what a run will do.

    Args:
        stages: steps of each stage.
        epoch_steps: steps after which as many images were drawn as there are.
    """
    split, config = job.split, job.config
    views = 0
    if "teacher" in job.recipe.needs and not config.online_teacher:
        views = len(job.trained) * (config.views if isinstance(job.teacher, ClipTeacher) else 1)
    dim = job.teacher.dim if job.teacher is not None else 0
    weights = sum(
        tensor.numel() * tensor.element_size() for tensor in job.student.state_dict().values()
    )
    # A checkpoint holds weights, their average and AdamW's two moments; the finished student is one more copy.
    disk = 5 * weights + _decoded_bytes(job)
    disk += views * (2 * dim + 34) if isinstance(job.teacher, ClipTeacher) else 0
    return Estimate(
        images={
            "train": len(split.train),
            "unlabelled": len(split.unlabelled),
            "val": len(split.val),
            "ID test": len(split.id_test),
            "unseen test": len(split.ood_test),
        },
        stages={name: steps for name, steps in stages.items() if steps},
        batch=config.batch_size,
        epochs=sum(stages.values()) / epoch_steps,
        teacher_views=views,
        disk_mb=disk / 1e6,
    )


def measure(job: Job, planned: Estimate, sampler: Sampler, step: Step) -> Estimate:
    """Add times to an estimate: trial steps of every stage, a teacher pass, decoded images. The student is spoilt."""
    config, teacher = job.config, job.teacher
    restyling = RestylePolicy() if config.augment == "restyle" else None
    chosen = job.trained[:: max(1, len(job.trained) // _TRIAL_IMAGES)][:_TRIAL_IMAGES]
    student_pixels = PixelStore(job.images, store_side(job.student.preprocess.size), None)
    each = _seconds(lambda: student_pixels.batch(chosen), 1) / len(chosen)
    decoded = len(job.images) * each
    passes, teacher_s = None, None
    teacher_store, stand_in, views = None, None, None
    if "teacher" in job.recipe.needs and isinstance(teacher, ClipTeacher):
        store = PixelStore(job.images, store_side(teacher.preprocess.size), None)
        if config.online_teacher:
            teacher_store = store
            teacher.model.to(job.fabric.device)
        else:
            seen = cached_views(ViewPolicy(), restyling)
            filler = caching_teacher(job.fabric, config, teacher, job.images, job.trained, seen)
            cache = EmbeddingCache(filler.cache_id, seen, filler.dim)
            views = cached_view_counts(job, sampler)
            passes = sum(
                len(cache.missing([job.images.keys[i]], range(int(views[i])))) for i in job.trained
            )
            noise = torch.rand(_TRIAL_IMAGES, 3, *teacher.preprocess.shape)
            filler.model.to(job.fabric.device)
            device = job.fabric.device
            trial = _seconds(lambda: filler.embed_images(noise.to(device)).cpu(), _TRIAL_STEPS)
            teacher_s = passes * trial / _TRIAL_IMAGES
            decoded *= 2 if passes else 1
    if teacher is not None and teacher_store is None:
        stand_in = _random_embeddings(teacher.dim)
    source = BatchSource(
        student_pixels, sampler, ViewPolicy(), views, stand_in, teacher_store,
        job.fabric.global_rank, job.fabric.world_size, restyling,
    )  # fmt: skip
    trained = sum(
        _step_seconds(job, stage, source, step) * planned.stages[stage.name]
        for stage in job.recipe.stages
        if planned.stages.get(stage.name)
    )
    return replace(
        planned,
        teacher_passes=passes,
        teacher_seconds=teacher_s,
        decode_seconds=decoded,
        train_seconds=trained,
    )


def _step_seconds(job: Job, stage: Stage, source: BatchSource, step: Step) -> float:
    """Return the seconds of one optimizer step on a batch that is there already."""
    optimizer = torch.optim.AdamW(job.student.parameters(), lr=1e-6, fused=True)
    batch = source(0)

    def once() -> None:
        optimizer.zero_grad()
        step(stage, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if job.fabric.device.type == "cuda":
            torch.cuda.synchronize()

    return _seconds(once, _TRIAL_STEPS)


def _seconds(work: Callable[[], Any], times: int) -> float:
    """Return the median time of `work` after a first run that does not count."""
    work()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _random_embeddings(
    dim: int,
) -> Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]:
    def embed(indices: NDArray[np.int64], _: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.random.default_rng(0).normal(size=(len(indices), dim)).astype(np.float32)

    return embed


def _decoded_bytes(job: Job) -> int:
    """Return the bytes of the images that are decoded once and kept, for student and teacher."""
    sides = {store_side(job.student.preprocess.size)}
    if isinstance(job.teacher, ClipTeacher) and "teacher" in job.recipe.needs:
        sides.add(store_side(job.teacher.preprocess.size))
    sizes = [3 * side**2 * len(job.images) for side in sides]
    return sum(size for size in sizes if size <= MAX_BYTES)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
