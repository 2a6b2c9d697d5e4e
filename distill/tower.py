"""The student that is the teacher's own image tower: self-distillation (VL2V-SD) and fine-tuning of CLIP itself."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.core.preprocess import FramedPreprocess
from edgekd.distill.recipes import Recipe
from edgekd.distill.students import TEACHERS_TOWER, Student, make_student
from edgekd.distill.teacher import ClipTeacher, Teacher


def tower_student(
    teacher: Teacher | None, *, classes: int | None = None, size: int | None = None
) -> Student:
    """A student that starts as a copy of the teacher's image encoder, its own projection included.

    Args:
        teacher: must be a model and not a file of embeddings.
        classes: C for a linear classifier on the embeddings; None for the text head, without any projector.
        size: must be the teacher's own, or None.
    """
    if not isinstance(teacher, ClipTeacher):
        raise EdgekdError(
            f"The student {TEACHERS_TOWER} is a copy of the teacher's image encoder, and this run has no such model.",
            "Name a teacher that is a model, and a recipe that uses it.",
        )
    own = teacher.preprocess.size
    if isinstance(teacher.preprocess, FramedPreprocess):
        height, width = teacher.preprocess.shape
        raise EdgekdError(
            f"The image encoder of {teacher.spec} takes {width} × {height} px resized by {teacher.preprocess.resize}, "
            "and a student takes square images, squashed or cropped.",
            "Distil it into a timm student, for example with --recipe vl2v-adip.",
        )
    if size not in (None, own):
        raise EdgekdError(
            f"The teacher's image encoder takes {own} px, not {size}.", "Leave --size out."
        )
    # Parameters of a frozen teacher; the stage says which of them train.
    backbone = copy.deepcopy(cast(nn.Module, teacher.model.visual)).requires_grad_(True)
    with torch.inference_mode():
        probe = backbone(torch.zeros(1, 3, own, own))
    # A CoCa's encoder gives tokens as well, which `encode_image` drops.
    if not isinstance(probe, Tensor) or probe.shape != (1, teacher.dim):
        raise EdgekdError(
            f"The image encoder of {teacher.spec} does not end in its {teacher.dim} embedding dimensions.",
            "Choose another teacher, or distil it into a timm student with --recipe vl2v-adip.",
        )
    if classes is None:
        return Student(backbone, teacher.dim, teacher.preprocess, dim=teacher.dim, projector="none")
    return Student(backbone, teacher.dim, teacher.preprocess, classes=classes)


def first_student(
    config: TrainConfig, recipe: Recipe, teacher: Teacher | None, classes: int
) -> Student:
    """The student that a run starts from, a timm model or the teacher's tower, with the head the recipe asks for."""
    trained = classes if recipe.head != "text" else None
    if config.student == TEACHERS_TOWER:
        return tower_student(teacher, classes=trained, size=config.size)
    return make_student(
        config.student,
        pretrained=config.pretrained or "hub",
        weights=config.student_weights,
        options=config.student_options,
        size=config.size,
        dim=teacher.dim if teacher and recipe.head != "linear" else None,
        classes=trained,
        projector=config.projector or "linear",
    )


@torch.no_grad()
def interpolate_with_teacher(student: Student, teacher: ClipTeacher, part: float) -> None:
    """WiSE-FT (Wortsman et al., CVPR 2022): `part` · fine-tuned + (1 − `part`) · CLIP's own weights, in place."""
    start = cast(nn.Module, teacher.model.visual).state_dict()
    for name, value in student.backbone.state_dict().items():
        if value.is_floating_point():
            value.lerp_(start[name].to(value), 1 - part)
