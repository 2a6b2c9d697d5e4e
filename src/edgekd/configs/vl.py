"""Options of `edgekd vl`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from edgekd.configs.base import AnyPath, Config, OptionalPath, OptionalSpec, Spec, check, option
from edgekd.core.errors import EdgekdError, check_known
from edgekd.core.formats import MOST_BATCH

Select = Literal["relevance", "random", "all", "none"]
Confidence = Literal["label", "max", "relative", "none"]
Distance = Literal["l1", "cosine"]

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
"""Control → settings that differ from the method.

- `none`: no teacher. `question-only`: no teacher, and the student does not see the picture.
- `pooled-only`: no tokens are matched. `uniform`: every content token and patch, with equal weights of the examples.
- `unweighted`: equal weights of the examples. `random-tokens`: the same number of tokens, chosen at random.
- `shuffled-teacher`: the teacher vectors of another example.
"""


class VlDataOptions(Config):
    """The task and its examples."""

    task: Literal["vqa", "ve", "choice"] = "vqa"
    """Task: vqa, ve (entailment) or choice (multiple choice)."""
    data: Spec = option(default="easy-vqa")
    """vqa: easy-vqa. ve and choice: images as for edgekd train, whose class and domain names become synthetic
    sentences. Default: easy-vqa; toy for ve and choice."""
    test_domain: str = "none"
    """Domain to leave out as the unseen test (easy-vqa: held-out, six colour-shape pairs)."""
    fraction: float = option(default=1.0, gt=0, le=1)
    """Fraction of the training pictures, for example 0.01."""
    split_seed: int = option(default=0, ge=0)
    """Seed of the train/val/test split."""


class VlMethodOptions(Config):
    """The teacher and the distillation."""

    teacher: str = "toy"
    """Teacher: toy, NAME:TAG (open_clip), hf-hub:ORG/MODEL, or local-dir:FOLDER."""
    control: str = "clip-td"
    """clip-td (the method), or one of its controls: none, pooled-only, uniform, unweighted, random-tokens,
    shuffled-teacher, question-only."""
    select: Select = "relevance"
    """Tokens to match: relevance, random, all, none. Default: the control's; relevance for clip-td."""
    confidence: Confidence = "label"
    """Weight of an example: label, max, relative, none. Default: the control's; label for clip-td."""
    pooled: bool = True
    """Also match the teacher's pooled vectors."""
    weight: float = option(default=10.0, ge=0)
    """Weight λ of the distillation loss (the l1 distance of unit vectors is about 0.05 at 512 dimensions)."""
    ratio: float = option(default=0.3, gt=0, le=1)
    """Fraction of the content tokens to match."""
    distance: Distance = "l1"
    """Distance of token vectors: l1 or cosine."""
    distil: bool = option(default=True, flag="")
    """Whether there is a teacher; set by `control`."""
    shuffle_teacher: bool = option(default=False, flag="")
    """Match the teacher vectors of another example; set by `control`."""
    blind: bool = option(default=False, flag="")
    """The student does not see the picture; set by `control`."""


class VlStudentOptions(Config):
    """The student and its initial weights."""

    student: str = "mobilenetv3"
    """Backbone of the student, by short or timm name."""
    pretrained: Literal["hub", "scratch", "toy"] = "scratch"
    """Initial weights of the backbone: hub, scratch (random) or toy."""
    student_weights: OptionalPath = option(default=None)
    """Initial weights of the backbone from a file."""
    student_options: dict[str, Any] = option(default_factory=dict)
    """Further arguments of `timm.create_model`."""
    freeze_backbone: bool = option(default=False, flag="--freeze-backbone/--train-backbone")
    """Train only the joint layers. Each picture passes the pretrained backbone once."""
    size: int = option(default=96, ge=16, le=1024)
    """Input side in pixels."""
    layers: int = option(default=2, ge=1, le=12)
    """Layers of the joint transformer."""
    width: int = option(default=128, ge=8)
    """Width of the joint transformer."""
    heads: int = option(default=4, ge=1)
    """Attention heads of the joint transformer."""


class VlScheduleOptions(Config):
    """Steps, batches and learning rate."""

    steps: int = option(default=600, ge=1)
    """Optimizer steps."""
    batch_size: int = option(default=64, ge=2, le=MOST_BATCH)
    """Examples per step."""
    lr: float = option(default=1e-3, gt=0)
    """Peak learning rate."""
    seed: int = option(default=0, ge=0)
    """Seed of weights and data order."""


class VlTrainConfig(VlScheduleOptions, VlStudentOptions, VlMethodOptions, VlDataOptions):
    """A training of a small student that takes an image and a text."""

    out: OptionalPath = option(default=None, group="Output", exclude=True)
    """Run folder. Default: runs/vl-TASK-CONTROL."""
    overwrite: bool = option(default=False, group="Output", exclude=True)
    """Replace an earlier run in --out."""
    resume: bool = option(default=False, group="Output", exclude=True)
    """Resume the run in --out with its settings."""
    checkpoint_every: int = option(default=100, ge=1, group="Output")
    """Steps between checkpoints."""

    @property
    def folder(self) -> Path:
        """Return `out` or its default."""
        return self.out or Path(f"runs/vl-{self.task}-{self.control}")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        control = given.get("control", "clip-td")
        check_known(str(control), CONTROLS, f'There is no control "{control}".')
        data = {"data": "toy"} if given.get("task", "vqa") != "vqa" else {}
        return data | CONTROLS[control] | given

    @check
    def _teacher(self) -> None:
        named = "teacher" in self.model_fields_set
        if self.distil and not named and self.data not in ("toy", "easy-vqa"):
            raise EdgekdError(
                f"No teacher is given for {self.data}, and the built-in one is for drawn shapes only.",
                "Name one: --teacher local-dir:FOLDER or NAME:TAG; --teacher toy forces the built-in one.",
            )

    @check
    def _heads(self) -> None:
        if self.width % self.heads:
            raise EdgekdError(
                f"The width {self.width} is not a multiple of the {self.heads} heads.",
                "Change one of them.",
            )

    @check
    def _frozen(self) -> None:
        if self.freeze_backbone and self.pretrained == "scratch" and self.student_weights is None:
            raise EdgekdError(
                "A frozen backbone needs pretrained weights.",
                "Give --student-weights or --pretrained hub.",
            )

    @check
    def _something(self) -> None:
        if self.distil and self.select == "none" and not self.pooled:
            raise EdgekdError(
                "With --select none and without the pooled vectors nothing is distilled.",
                "Use --control none.",
            )


class VlRunConfig(Config):
    """A finished vision-language run."""

    run: AnyPath = option(kw_only=False)
    """Run folder of edgekd vl train."""
    data: OptionalSpec = option(default=None)
    """Current place of the run's data if it has moved. Default: the run's."""


class VlEvaluateConfig(VlRunConfig):
    """An evaluation of a vision-language student."""

    onnx: bool = False
    """Evaluate the exported file instead of the torch student."""
    most: int = option(default=10**9, ge=1, flag="")
    """Maximum number of examples."""


class VlExportConfig(VlRunConfig):
    """An export of a vision-language student."""

    overwrite: bool = False
    """Replace an earlier export."""
