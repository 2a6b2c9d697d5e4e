"""The classification task of the training loop: student, batches, views, and targets of the loss terms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekd.configs.train import TrainConfig
from edgekd.data.image_set import ImageSet
from edgekd.data.split import Split
from edgekd.distill.checkpoint import Task
from edgekd.distill.classification.predict import source_accuracy, source_loss
from edgekd.distill.classification.text_targets import TextTargets
from edgekd.distill.inputs.batches import BatchSource, RawBatch, Sampler
from edgekd.distill.inputs.cache import plain_embeddings
from edgekd.distill.inputs.restyle import restyle
from edgekd.distill.inputs.views import render
from edgekd.distill.launch import Fabric, gathered
from edgekd.distill.losses import Batch
from edgekd.distill.models.batchnorm import Fold, find_folds
from edgekd.distill.models.students import Student
from edgekd.distill.models.teachers import ClipTeacher, Teacher
from edgekd.distill.recipes import Recipe
from edgekd.distill.text_bank import TextBank
from edgekd.distill.text_files import Descriptions


@dataclass(eq=False)
class Classification(Task):
    """One process's part of a run; `teacher`, `bank` and `targets` are None for recipes that need neither."""

    fabric: Fabric
    config: TrainConfig
    recipe: Recipe
    images: ImageSet
    """The labelled images, followed by the unlabelled ones."""
    split: Split
    student: Student
    teacher: Teacher | None
    bank: TextBank | None
    """Text bank of the classes, used by a text head."""
    targets: TextTargets | None
    described: Descriptions | None
    """Descriptions of the classes in the prompts."""
    sampler: Sampler
    steps: int
    """Number of steps of all stages."""
    class_weights: Tensor | None
    """Class weights of cross-entropies with the label, float `[C]`."""
    source: BatchSource = field(init=False)
    """Set by `prepare`, which may run the teacher for hours."""

    def __post_init__(self) -> None:
        self.model = self.student

    @property
    def unlabelled(self) -> NDArray[np.int64]:
        """Return the indices of the unlabelled images."""
        return np.arange(len(self.images) - len(self.split.unlabelled), len(self.images))

    @property
    def trained(self) -> NDArray[np.int64]:
        """Return the indices of all training images, labelled or not."""
        return np.concatenate([self.split.train, self.unlabelled])

    @property
    def needs_teacher(self) -> bool:
        """Return whether a term uses the teacher's image embeddings."""
        return "teacher" in self.recipe.needs

    @property
    def step_pixels(self) -> int:
        """Return the pixels per step of one process, for the student and for an online teacher."""
        pixels = self.student.preprocess.size**2
        if self.source.teacher_store is not None and isinstance(self.teacher, ClipTeacher):
            pixels += math.prod(self.teacher.preprocess.shape)
        return self.config.batch_size // self.fabric.world_size * pixels

    def train_only(self, parts: tuple[str, ...]) -> None:
        student = self.student
        for name in ("backbone", "neck", "projector", "head"):
            module: nn.Module | None = getattr(student, name)
            if module is not None:
                module.requires_grad_({"neck": "projector"}.get(name, name) in parts)

    def folds(self) -> list[Fold]:
        side = self.student.preprocess.size
        example = torch.linspace(0, 1, 6 * side**2, device=self.fabric.device)
        return find_folds(self.student, example.reshape(2, 3, side, side))

    def views(self, raw: RawBatch) -> Tensor:
        """Return the student's views of a batch, float32 `[b, 3, S, S]` in 0–1."""
        pixels = raw.pixels.to(self.fabric.device, non_blocking=True)
        views = render(pixels, raw.params, self.student.preprocess.size)
        if raw.restyle is not None:
            views = restyle(views, raw.restyle)
        if raw.partner is None or raw.own is None:
            return views
        return torch.lerp(self.views(raw.partner), views, raw.own.to(views.device))

    def teacher_features(self, raw: RawBatch) -> Tensor | None:
        """Return the teacher's embeddings of the same views, float32 `[b, D]`: cached, or computed now."""
        if raw.teacher is not None:
            return raw.teacher.to(self.fabric.device)
        if raw.teacher_pixels is None:
            return None
        assert isinstance(self.teacher, ClipTeacher)
        pixels = raw.teacher_pixels.to(self.fabric.device)
        views = render(pixels, raw.params, self.teacher.preprocess.size)
        if raw.restyle is not None:
            views = restyle(views, raw.restyle.for_teacher())
        return self.teacher.embed_images(views).clone()  # out of inference mode

    def forward(
        self, model: nn.Module, views: Tensor, teacher: Tensor | None, raw: RawBatch
    ) -> Batch:
        """Return the student's output and its targets, for `losses.objective`."""
        out = model(views)
        batch = self._batch(out, teacher, raw)
        if raw.partner is None or raw.own is None:
            return batch
        partner = self._batch(out, self.teacher_features(raw.partner), raw.partner)
        own = raw.own.mean(dim=(1, 2, 3)).to(self.fabric.device)
        return replace(batch, partner=partner, own=own)

    def _batch(self, out: Tensor, teacher: Tensor | None, raw: RawBatch) -> Batch:
        """Return the student's output with the targets of the images of `raw`."""
        targets, device = self.targets, self.fabric.device
        fields: dict[str, Any] = targets.fields(raw.indices, device) if targets else {}
        fields["smoothing"] = self.config.label_smoothing
        if self.class_weights is not None:
            fields["class_weights"] = self.class_weights.to(device)
        labels, bank = raw.labels.to(device), targets.bank if targets else None
        batch = make_batch(self.student, out, labels, teacher, bank, fields)
        if self.fabric.world_size == 1:
            return batch
        first = self.fabric.global_rank * len(labels)
        return replace(batch, gather=partial(gathered, self.fabric), first=first)

    def update(self, teacher: Tensor | None) -> None:
        if self.targets:
            self.targets.update(self.fabric, teacher)

    def state_dict(self) -> dict[str, Any]:
        return self.targets.visual.state_dict() if self.targets and self.targets.visual else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.targets and self.targets.visual:
            self.targets.visual.load_state_dict(state)

    def names(self, raw: RawBatch) -> list[str]:
        return [self.images.ids[i] for i in raw.indices]

    def accuracy(self, model: nn.Module) -> float:
        return source_accuracy(cast(Student, model), self.bank, self.images, self.split.val)

    def loss(self, model: nn.Module) -> float:
        return source_loss(cast(Student, model), self.bank, self.images, self.split.val)

    def sample_embeddings(self, indices: NDArray[np.int64]) -> Tensor:
        """Return the teacher's embeddings of images, float32 `[n, D]`, of their first cached view if there is one."""
        if self.source.embeddings is not None:
            return torch.from_numpy(self.source.embeddings(indices, np.zeros_like(indices)))
        assert self.teacher is not None
        return plain_embeddings(self.teacher, self.images, indices, self.fabric.device)


def make_batch(
    student: Student,
    out: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
    bank: TextBank | None,
    fields: Mapping[str, Any] | None = None,
) -> Batch:
    """Return the student's output and its targets as a `Batch`.

    Args:
        out: the student's output, float `[b, D]` or `[b, C]`.
        teacher: the teacher's embeddings of the same views, float `[b, D]`.
        bank: text bank of the terms. fields: further fields of `Batch`.
    """
    found: dict[str, Any] = dict(fields or {})
    if student.embeds:
        found["embedding"] = out
    if student.head is not None:
        found["logits"] = student.classify(out)
    if teacher is not None:
        found["teacher"] = bank.image_target(teacher) if bank else teacher
    if bank:
        found |= {"bank": bank.head.to(labels.device), "logit_scale": bank.logit_scale}
        if teacher is not None:
            found["zero_shot"] = bank.zero_shot(teacher)
    return Batch(labels=labels, **found)
