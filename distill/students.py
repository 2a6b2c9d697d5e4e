"""The students: any timm model by name, with weights from the hub, from a file, or none, and never by silent choice."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from edgekd.core.errors import EdgekdError, did_you_mean, first_line
from edgekd.core.files import write_tensors
from edgekd.core.hub import hub_reachable, no_network, prefer_local_cache
from edgekd.core.preprocess import Interpolation, Preprocess
from edgekd.distill.weights import load_backbone, load_weights

Pretrained = Literal["hub", "scratch", "toy"]
Projector = Literal["linear", "mlp", "mlp-gelu", "none"]

TEACHERS_TOWER = "teacher"
"""The student's name when it is the teacher's own image tower."""

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


def timm_name(student: str) -> str:
    """`mobilenetv3` → `mobilenetv3_large_100`; timm's own names pass. Unknown names raise with the closest one."""
    name = FRIENDLY.get(student, student)
    if not timm.is_model(name):
        raise EdgekdError(
            f'There is no student "{student}".',
            did_you_mean(student, [*FRIENDLY, *timm.list_models()]) + " See: edgekd list students.",
        )
    return name


class Student(nn.Module):
    """Backbone, then a projector into the teacher's space (text head), a linear classifier, or one behind the other.

    Args:
        backbone: timm model with `num_classes=0`, float `[B, 3, S, S]` → `[B, d]`.
        features: d.
        dim: the teacher's D for a text head, else None.
        classes: number of classes for a linear head, else None. With `dim` as well, the head's rows are class vectors
            in the teacher's space that train.
        preprocess: whose mean and std the student normalises with.
        projector: `linear`, `mlp` (a hidden layer of width d and a ReLU before it), `mlp-gelu`, or `none` for a
            backbone whose features already live in the teacher's space.
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
        activation = {"mlp": nn.ReLU, "mlp-gelu": nn.GELU}.get(projector)
        self.neck = (
            nn.Sequential(nn.Linear(features, features), activation())
            if dim and activation
            else None
        )
        self.projector = nn.Linear(features, dim) if dim and projector != "none" else None
        self.head = nn.Linear(dim or features, classes, bias=not dim) if classes else None
        self.preprocess = preprocess
        self.register_buffer("mean", torch.tensor(preprocess.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std)[:, None, None], persistent=False)
        # Factor on the raw scores that makes their softmax calibrated on ID validation; fitted after training.
        self.register_buffer("scale", torch.ones(()))

    @property
    def embeds(self) -> bool:
        """Whether `forward` gives embeddings in the teacher's space, and not logits."""
        return self.projector is not None or self.head is None

    @property
    def body(self) -> nn.Module:
        """Everything before the last linear layer: normalised pixels → float `[B, d]`."""
        return nn.Sequential(self.backbone, self.neck) if self.neck is not None else self.backbone

    def normalised(self, views: Tensor) -> Tensor:
        """Views `[B, 3, S, S]` in 0–1 with the student's own statistics taken out."""
        return (views - self.mean).div_(
            self.std
        )  # in place: one batch of floats less to allocate at every step

    def forward(self, views: Tensor) -> Tensor:
        """Float `[B, 3, S, S]` in 0–1 → embedding `[B, D]` where it `embeds`, else logits `[B, C]`."""
        return self.above(self.backbone(self.normalised(views)))

    def above(self, features: Tensor) -> Tensor:
        """The backbone's features `[B, d]` → what `forward` gives."""
        if self.neck is not None:
            features = self.neck(features)
        last = self.projector if self.projector is not None else self.head
        return features if last is None else last(features)

    def classify(self, out: Tensor) -> Tensor:
        """What `forward` gave → the trained head's logits `[B, C]`."""
        return self.head(out) if self.embeds and self.head is not None else out

    def scores(self, views: Tensor, bank: Tensor | None) -> Tensor:
        """Class scores, float `[B, C]`: `scale · s·T` without normalising `s`, which folds into one layer and has
        the cosine head's argmax (METHODS §9.4), or `scale ·` the trained head's logits."""
        out = self(views).float()
        raw = (
            out @ bank.T
            if self.embeds and self.head is None and bank is not None
            else self.classify(out)
        )
        return torch.mul(raw, self.scale)


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
        student: friendly or timm name (a timm `name.tag` picks the weights).
        pretrained: `hub` downloads timm's weights; `toy` takes the ones shipped for the toy images; `scratch` starts
            from random ones. Ignored with `weights`.
        weights: safetensors or torch file with this architecture's parameters; loaded without running any code.
        options: further arguments of `timm.create_model`.
        size: input side in pixels; None takes the model's own.
        dim: D for a text head. classes: C for a linear head, with `dim` for one on embeddings.
        projector: what leads from features to D.

    Raises:
        EdgekdError: unknown name or option, hub out of reach, weights that do not fit.
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
        backbone = _from_hub(name, arguments, student)
    config = getattr(backbone, "pretrained_cfg", {})
    smooth: dict[Any, Interpolation] = {"bilinear": "bilinear", "bicubic": "bicubic"}
    try:
        preprocess = Preprocess(
            size=size or config["input_size"][-1],
            interpolation=smooth.get(config.get("interpolation"), "bicubic"),
            mean=config["mean"],
            std=config["std"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise EdgekdError(
            f"{name} takes no RGB images as timm describes it ({first_line(error)}).",
            "Choose another student: edgekd list students.",
        ) from error
    features = _feature_count(backbone.eval(), name, arguments, preprocess)
    return Student(backbone, features, preprocess, dim=dim, classes=classes, projector=projector)


RESERVED = (
    "num_classes",
    "in_chans",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
)
"""Arguments of `timm.create_model` that edgekd sets itself, or that would load weights beside its own checks."""


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
    except Exception as error:  # whatever the architecture raises for arguments it does not take
        raise EdgekdError(
            f"{name} cannot be built with {dict(arguments)} ({first_line(error)}).",
            "Check its tag, --size and student_options.",
        ) from error
    return model


@torch.inference_mode()
def _feature_count(
    backbone: nn.Module, name: str, arguments: Mapping[str, Any], preprocess: Preprocess
) -> int:
    """Run the backbone once and return the length d of its feature vector.

    Raises:
        EdgekdError: it does not take such images, or gives something else than `[B, d]`.
    """
    try:
        found = backbone(torch.zeros(2, 3, preprocess.size, preprocess.size))
    except Exception as error:  # whatever the architecture raises
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
    """The shipped first weights for the toy images (scripts/make_toy_student.py), where there are any."""
    path = (
        Path(str(importlib.resources.files("edgekd.data.toy_student")))
        / f"{timm_name(student)}.safetensors"
    )
    return path if path.is_file() else None


def _from_hub(name: str, arguments: Mapping[str, Any], student: str) -> nn.Module:
    prefer_local_cache()
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:  # the hub's client, safetensors and timm raise their own kinds
        if hub_reachable():
            raise EdgekdError(
                f"The pretrained weights of {name} could not be loaded ({first_line(error)}).",
                "Use --student-weights FILE, or start from random weights with --pretrained scratch.",
            ) from error
        raise no_network(f"The student {name}", student=name) from error
    return model


def save_student(student: Student, path: Path, metadata: Mapping[str, str]) -> None:
    """Write all parameters and buffers as safetensors."""
    write_tensors(path, student.state_dict(), metadata)


@torch.inference_mode()
def fit_scale(scores: Tensor, targets: Tensor) -> float:
    """Return the factor on raw scores with the least cross-entropy (temperature scaling, Guo et al. 2017).

    Golden-section search over ln(factor): the loss is unimodal in it. Targets are smoothed by 1/(N+2) as in Platt
    1999; otherwise a validation set without a mistake would ask for an infinite factor.

    Args:
        scores: float `[N, C]`.
        targets: labels, int64 `[N]`, or probabilities, float `[N, C]`.
    """
    smoothing = 1 / (len(targets) + 2)
    low, high = math.log(1e-3), math.log(1e4)
    ratio = (math.sqrt(5) - 1) / 2

    def loss(log_factor: float) -> float:
        return float(
            nn.functional.cross_entropy(
                scores.double() * math.exp(log_factor), targets, label_smoothing=smoothing
            )
        )

    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)
