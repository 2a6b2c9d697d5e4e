"""The settings of a vision-language run, and the controls that the method has to beat."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgekd.distill.vl.token_td import Confidence, Distance, Select
from edgekd.errors import EdgekdError, did_you_mean

CONTROLS: dict[str, dict[str, Any]] = {
    "clip-td": {},
    "none": {"distil": False},
    "pooled-only": {"select": "none", "confidence": "none"},
    "uniform": {"select": "all", "confidence": "none"},
    "unweighted": {"confidence": "none"},
    "random-tokens": {"select": "random"},
    "shuffled-teacher": {"shuffle_teacher": True},
    "question-only": {"distil": False, "blind": True},
}
"""Name → what differs from the method.

- `none`: no teacher. `question-only`: no teacher, and the student does not see the picture.
- `pooled-only`: no token is matched. `uniform`: every content token and patch, all examples alike.
- `unweighted`: chosen tokens, all examples alike. `random-tokens`: as many tokens, drawn.
- `shuffled-teacher`: another example's teacher vectors.
"""


class VlConfig(BaseModel):
    """A vision-language run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str = "vqa"
    data: str = "easy-vqa"
    teacher: str = "toy"
    student: str = "mobilenetv3"
    pretrained: Literal["hub", "scratch", "toy"] = "scratch"
    student_weights: Path | None = None
    freeze_backbone: bool = False
    """Train the joint layers alone, on what the pretrained backbone sees as it is."""
    student_options: dict[str, Any] = Field(default_factory=dict)
    size: int = Field(default=96, ge=16, le=1024)
    width: int = Field(default=128, ge=8)
    layers: int = Field(default=2, ge=1, le=12)
    heads: int = Field(default=4, ge=1)
    control: str = "clip-td"
    distil: bool = True
    select: Select = "relevance"
    confidence: Confidence = "label"
    pooled: bool = True
    shuffle_teacher: bool = False
    blind: bool = False
    weight: float = Field(default=10.0, ge=0)
    """λ. The l1 distance of unit vectors is about 0.05 at 512 dimensions, hence not 1."""
    ratio: float = Field(default=0.3, gt=0, le=1)
    distance: Distance = "l1"
    fraction: float = 1.0
    test_domain: str = "none"
    steps: int = Field(default=600, ge=1)
    batch_size: int = Field(default=64, ge=2)
    lr: float = Field(default=1e-3, gt=0)
    seed: int = Field(default=0, ge=0)
    split_seed: int = Field(default=0, ge=0)


def make_config(given: dict[str, Any]) -> VlConfig:
    """Settings from what the user gave (None: not given), on top of what the control says.

    Raises:
        EdgekdError: an unknown control or a value that does not fit.
    """
    given = {name: value for name, value in given.items() if value is not None}
    control = given.get("control", "clip-td")
    if control not in CONTROLS:
        raise EdgekdError(f'There is no control "{control}".', did_you_mean(control, CONTROLS))
    if given.get("task", "vqa") != "vqa" and "data" not in given:
        given["data"] = "toy"
    try:
        config = VlConfig(**(CONTROLS[control] | given))
    except ValidationError as error:
        first = error.errors()[0]
        raise EdgekdError(
            f"The setting {'.'.join(map(str, first['loc']))} does not fit: {first['msg']}.",
            "See edgekd vl train --help.",
        ) from error
    if config.distil and "teacher" not in given and config.data not in ("toy", "easy-vqa"):
        raise EdgekdError(
            f"No teacher was named for {config.data}, and the built-in one knows drawn shapes alone.",
            "Name one: --teacher local-dir:FOLDER or NAME:TAG; --teacher toy insists on the built-in one.",
        )
    if config.width % config.heads:
        raise EdgekdError(
            f"The width {config.width} does not divide by {config.heads} heads.",
            "Change one of them.",
        )
    if config.freeze_backbone and config.pretrained == "scratch" and config.student_weights is None:
        raise EdgekdError(
            "A frozen backbone with random weights sees nothing.",
            "Give --student-weights or --pretrained hub.",
        )
    if config.distil and config.select == "none" and not config.pooled:
        raise EdgekdError(
            "With --select none and without the pooled vectors nothing is distilled.",
            "Use --control none.",
        )
    return config
