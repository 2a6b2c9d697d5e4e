"""Students: any timm model, with weights from the hub, a file or random ones, or the teacher's image encoder."""

from __future__ import annotations

import copy
import importlib.resources
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from edgekd.core.errors import EdgekdError, did_you_mean, first_line
from edgekd.core.hub import NoNetwork, hub_reachable, prefer_local_cache
from edgekd.core.preprocess import FramedPreprocess, Interpolation, Preprocess
from edgekd.distill.models.teachers import ClipTeacher, Teacher
from edgekd.distill.models.weights import load_backbone, load_weights

Pretrained = Literal["hub", "scratch", "toy"]
Projector = Literal["linear", "mlp", "mlp-gelu", "none"]

TEACHER_ENCODER = "teacher"
"""Name of the student that is a copy of the teacher's image encoder."""

FRIENDLY = {
    "mobilenetv3": "mobilenetv3_large_100",
    "mobilenetv3_small": "mobilenetv3_small_100",
    "mobilenetv4": "mobilenetv4_conv_small",
    "mobilenetv2": "mobilenetv2_100",
    "efficientnet": "efficientnet_b0",
    "efficientnet_lite0": "tf_efficientnet_lite0",
    "vit_tiny": "vit_tiny_patch16_224",
    "deit_tiny": "deit_tiny_patch16_224",
    "fastvit": "fastvit_t8",
    "repvit": "repvit_m1_0",
    "resnet18": "resnet18",
}

RESERVED = (
    "num_classes", "in_chans", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
)  # fmt: skip
"""Arguments of `timm.create_model` that edgekd sets itself, or that would load weights beside its own checks."""


def timm_name(student: str) -> str:
    """Return timm's name, `mobilenetv3` → `mobilenetv3_large_100`; raise `EdgekdError` for an unknown name."""
    name = FRIENDLY.get(student, student)
    if not timm.is_model(name):
        raise EdgekdError(
            f'There is no student "{student}".',
            did_you_mean(student, [*FRIENDLY, *timm.list_models()]) + " See: edgekd list students.",
        )
    return name


class Student(nn.Module):
    """A backbone, followed by a projector to the teacher's space (text head), a linear classifier, or both.

    Args:
        backbone: timm model with `num_classes=0`, float `[B, 3, S, S]` → `[B, d]`.
        features: d.
        dim: the teacher's D for a text head, else None.
        classes: number of classes for a linear head, else None. With `dim`, the rows of the head are trained class
            vectors in the teacher's space.
        preprocess: preprocessing, with the mean and std for normalisation.
        projector: `linear`, `mlp` (with a hidden layer of width d and a ReLU), `mlp-gelu`, or `none` for a backbone
            whose features are already in the teacher's space.
    """

    mean: Tensor
    std: Tensor
    scale: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        features: int,
        preprocess: Preprocess,
        *,
        dim: int | None = None,
        classes: int | None = None,
        projector: Projector = "linear",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        activation = {"mlp": nn.ReLU, "mlp-gelu": nn.GELU}.get(projector) if dim else None
        self.neck = (
            nn.Sequential(nn.Linear(features, features), activation()) if activation else None
        )
        self.projector = nn.Linear(features, dim) if dim and projector != "none" else None
        self.head = nn.Linear(dim or features, classes, bias=not dim) if classes else None
        self.preprocess = preprocess
        self.register_buffer("mean", torch.tensor(preprocess.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std)[:, None, None], persistent=False)
        # Factor on the raw scores that calibrates their softmax on ID validation, fitted after training.
        self.register_buffer("scale", torch.ones(()))

    @property
    def embeds(self) -> bool:
        """Return whether `forward` returns embeddings in the teacher's space rather than logits."""
        return self.projector is not None or self.head is None

    @property
    def body(self) -> nn.Module:
        """Return the module before the last linear layer: normalised pixels → float `[B, d]`."""
        return nn.Sequential(self.backbone, self.neck) if self.neck is not None else self.backbone

    def normalised(self, views: Tensor) -> Tensor:
        """Normalise views `[B, 3, S, S]` in 0–1 with the student's own statistics."""
        # In place, to avoid allocating another batch of floats.
        return (views - self.mean).div_(self.std)

    def forward(self, views: Tensor) -> Tensor:
        """Float `[B, 3, S, S]` in 0–1 → embedding `[B, D]` if it `embeds`, else logits `[B, C]`."""
        return self.above(self.backbone(self.normalised(views)))

    def above(self, features: Tensor) -> Tensor:
        """Return the output of `forward` for the backbone's features `[B, d]`."""
        if self.neck is not None:
            features = self.neck(features)
        last = self.projector if self.projector is not None else self.head
        return features if last is None else last(features)

    def classify(self, out: Tensor) -> Tensor:
        """Return the trained head's logits `[B, C]` for the output of `forward`."""
        return self.head(out) if self.embeds and self.head is not None else out

    def scores(self, views: Tensor, bank: Tensor | None) -> Tensor:
        """Return class scores, float `[B, C]`: `scale · s·T`, or `scale ·` the trained head's logits.

        `s` is not normalised, so the product folds into one layer and has the argmax of the cosine head (METHODS §9.4).
        """
        out = self(views).float()
        text_head = self.embeds and self.head is None and bank is not None
        return torch.mul(out @ bank.T if text_head else self.classify(out), self.scale)  # type: ignore[union-attr]


def make_student(
    student: str,
    *,
    pretrained: Pretrained,
    weights: Path | None = None,
    options: Mapping[str, Any] | None = None,
    size: int | None = None,
    dim: int | None = None,
    classes: int | None = None,
    projector: Projector = "linear",
) -> Student:
    """Build a student.

    Args:
        student: short or timm name (a timm `name.tag` selects the weights).
        pretrained: `hub` downloads timm's weights, `toy` loads those shipped for the toy images, and `scratch` uses
            random ones. Ignored with `weights`.
        weights: safetensors or torch file with this architecture's parameters, loaded without running any code.
        options: further arguments of `timm.create_model`.
        size: input side in pixels; None for the model's own.
        dim: D for a text head. classes: C for a linear head, with `dim` for one on embeddings.
        projector: layers from the features to D.

    Raises:
        EdgekdError: a name or option is unknown, the hub cannot be reached, or the weights do not match.
    """
    name = timm_name(student)
    if weights is None and pretrained == "toy":
        weights = toy_weights(name)
        if weights is None:
            raise EdgekdError(
                f"No toy weights are shipped for {name}.",
                "Use --pretrained scratch, or --student mobilenetv3.",
            )
    state = load_weights(weights) if weights else None
    arguments = _timm_arguments(name, options or {}, size)
    backbone = _create(name, arguments)
    if weights is not None and state is not None:
        load_backbone(
            backbone, state, weights, lambda: _create(name, arguments | {"num_classes": 8})
        )
    elif pretrained == "hub":
        backbone = _from_hub(name, arguments)
    preprocess = _preprocess(backbone, name, size)
    features = _feature_count(backbone.eval(), name, arguments, preprocess)
    return Student(backbone, features, preprocess, dim=dim, classes=classes, projector=projector)


def _timm_arguments(name: str, options: Mapping[str, Any], size: int | None) -> dict[str, Any]:
    for reserved in RESERVED:
        if reserved in options:
            raise EdgekdError(
                f"student_options cannot set {reserved}.",
                "edgekd sets it: weights come from --pretrained or --student-weights, the head from the recipe.",
            )
    arguments = dict(options) | {"num_classes": 0}
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise EdgekdError(
            f"{name} cannot be built ({first_line(error)}).", "Check its tag: edgekd list students."
        ) from error
    if size and config and config.fixed_input_size:
        arguments["img_size"] = size
    return arguments


def _create(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # architectures raise anything for unknown arguments
        raise EdgekdError(
            f"{name} cannot be built with {dict(arguments)} ({first_line(error)}).",
            "Check its tag, --size and student_options.",
        ) from error
    return model


def _from_hub(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    prefer_local_cache()
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:  # the hub's client, safetensors and timm raise their own errors
        if hub_reachable():
            raise EdgekdError(
                f"The pretrained weights of {name} could not be loaded ({first_line(error)}).",
                "Use --student-weights FILE, or start from random weights with --pretrained scratch.",
            ) from error
        raise NoNetwork(f"The student {name}", student=name) from error
    return model


def _preprocess(backbone: nn.Module, name: str, size: int | None) -> Preprocess:
    config: Any = getattr(backbone, "pretrained_cfg", {})
    smooth: dict[Any, Interpolation] = {"bilinear": "bilinear", "bicubic": "bicubic"}
    try:
        return Preprocess(
            size=size or config["input_size"][-1],
            interpolation=smooth.get(config.get("interpolation"), "bicubic"),
            mean=config["mean"],
            std=config["std"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise EdgekdError(
            f"{name} does not take RGB images ({first_line(error)}).",
            "Choose another student: edgekd list students.",
        ) from error


@torch.inference_mode()
def _feature_count(
    backbone: nn.Module, name: str, arguments: Mapping[str, Any], preprocess: Preprocess
) -> int:
    """Run the backbone once and return the length d of its feature vector."""
    try:
        found = backbone(torch.zeros(2, 3, preprocess.size, preprocess.size))
    except Exception as error:  # architectures raise anything
        raise EdgekdError(
            f"{name} cannot take {preprocess.size} px images ({first_line(error)}).",
            f"Leave --size out, or use {backbone.pretrained_cfg['input_size'][-1]}.",  # type: ignore[index]
        ) from error
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 2 or not found.shape[1]:
        given = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        options = {key: value for key, value in arguments.items() if key != "num_classes"}
        raise EdgekdError(
            f"{name} with {options or 'its defaults'} gives {given} for two images, not one feature vector each.",
            "Leave out the student_options that change its output, such as features_only and global_pool.",
        )
    return int(found.shape[1])


def toy_weights(student: str) -> Path | None:
    """Return the shipped file of initial weights for the toy images (scripts/make_toy_student.py), if there is one."""
    folder = Path(str(importlib.resources.files("edgekd.data.toy.student")))
    path = folder / f"{timm_name(student)}.safetensors"
    return path if path.is_file() else None


def encoder_student(
    teacher: Teacher | None, *, classes: int | None = None, size: int | None = None
) -> Student:
    """Build a student that is a copy of the teacher's image encoder, including its projection.

    For self-distillation (VL2V-SD) and fine-tuning of CLIP itself. With `classes` it has a linear classifier on the
    embeddings, else the text head without any projector; `size` must be the teacher's own, or None.
    """
    if not isinstance(teacher, ClipTeacher):
        raise EdgekdError(
            f"The student {TEACHER_ENCODER} is a copy of the teacher's image encoder, and this run has none.",
            "Use a teacher model, and a recipe with a teacher.",
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
    # The stage sets which parameters train.
    backbone = copy.deepcopy(cast(nn.Module, teacher.model.visual)).requires_grad_(True)
    with torch.inference_mode():
        probe = backbone(torch.zeros(1, 3, own, own))
    # A CoCa's encoder returns tokens as well, which `encode_image` drops.
    if not isinstance(probe, Tensor) or probe.shape != (1, teacher.dim):
        raise EdgekdError(
            f"The image encoder of {teacher.spec} does not end in its {teacher.dim} embedding dimensions.",
            "Choose another teacher, or distil it into a timm student with --recipe vl2v-adip.",
        )
    if classes is None:
        return Student(backbone, teacher.dim, teacher.preprocess, dim=teacher.dim, projector="none")
    return Student(backbone, teacher.dim, teacher.preprocess, classes=classes)


@torch.no_grad()
def interpolate_with_teacher(student: Student, teacher: ClipTeacher, part: float) -> None:
    """Apply WiSE-FT (Wortsman et al., CVPR 2022): `part` · fine-tuned + (1 − `part`) · original weights, in place."""
    start = cast(nn.Module, teacher.model.visual).state_dict()
    for name, value in student.backbone.state_dict().items():
        if value.is_floating_point():
            value.lerp_(start[name].to(value), 1 - part)


@torch.inference_mode()
def fit_scale(scores: Tensor, targets: Tensor) -> float:
    """Return the factor on raw scores with the least cross-entropy (temperature scaling, Guo et al. 2017).

    The loss is unimodal in ln(factor). Targets are smoothed by 1/(N+2) as in Platt 1999, since the best factor for a
    validation set without errors would otherwise be infinite.

    Args:
        scores: float `[N, C]`.
        targets: labels, int64 `[N]`, or probabilities, float `[N, C]`.
    """
    from scipy.optimize import minimize_scalar

    smoothing = 1 / (len(targets) + 2)

    def loss(log_factor: float) -> float:
        scaled = scores.double() * math.exp(log_factor)
        return float(cross_entropy(scaled, targets, label_smoothing=smoothing))

    bounds = math.log(1e-3), math.log(1e4)
    return math.exp(
        minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-9}).x
    )
