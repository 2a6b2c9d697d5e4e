"""`edgekd train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgekd.configs.base import (
    Config,
    Items,
    OptionalPath,
    OptionalSpec,
    Spec,
    Words,
    check,
    option,
)
from edgekd.core.errors import EdgekdError, check_known
from edgekd.core.formats import MOST_BATCH
from edgekd.core.readers import read_object

LOGGERS = ("tensorboard", "csv", "wandb", "mlflow")


class SwadRule(BaseModel):
    """Start and end of SWAD's average. The defaults are the published numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patience: int = Field(default=3, ge=1)
    """Evaluations without improvement after a minimum that make it the start."""
    tolerance: int = Field(default=6, ge=1)
    """Consecutive evaluations above the threshold that end the average."""
    ratio: float = Field(default=0.3, ge=0)
    """The threshold is `1 + ratio` times the mean loss at the start."""


class DataOptions(Config):
    """Images."""

    data: Spec = option(default="toy")
    """Images: toy, a folder (class/img, domain/class/img, train|val|test/class/img), a .csv/.parquet manifest, a COCO
    .json, WebDataset shards (DIR/{000..127}.tar), or hf:NAME[:split]."""
    unlabelled: Items = option(default=())
    """Unlabelled training images: a folder (searched recursively), a .csv/.parquet manifest, shards, hf:NAME, or
    toy:STYLE; may be repeated."""
    unlabelled_share: float = option(default=0.4, gt=0, lt=1)
    """Fraction of each batch taken from the unlabelled images."""
    unlabelled_images: int | None = option(default=None, ge=1)
    """Maximum number of unlabelled images, the first by content hash. Default: all."""
    unlabelled_filter: bool = False
    """Skip unlabelled images on which the teacher is less confident than on 95 % of the validation images, since they
    probably show none of the classes."""
    balance: Literal["domains", "classes", "weights"] | None = None
    """How batches are balanced: domains (equal shares of the domains), classes (equal shares of every class of every
    domain), or weights (like domains, with rare classes weighted up in the cross-entropy). Default: the recipe's;
    domains with unlabelled images."""
    augment: Literal["plain", "restyle"] | None = option(default=None, group="Views")
    """plain (crops and colours), or restyle (half of the views in another style). Default: the recipe's; plain with
    unlabelled images."""
    mixup: float = option(default=0.0, ge=0, group="Views")
    """α of mixup: each image is mixed with another one in a proportion drawn from Beta(α, α); 0 turns it off."""
    cutmix: float = option(default=0.0, ge=0, group="Views")
    """α of CutMix: each image gets a box of another one, with an area drawn from Beta(α, α); 0 turns it off."""
    split_seed: int = option(default=0, ge=0, group="Split")
    """Seed of the train/val/test split, independent of `seed`, so that runs with different seeds use the same
    images."""


class TeacherOptions(Config):
    """The teacher and its texts."""

    teacher: str = "toy"
    """Teacher: toy, NAME:TAG (open_clip), hf-hub:ORG/MODEL, local-dir:FOLDER, or embeddings:FILE.npz."""
    teacher_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision in which the teacher computes its cached embeddings. auto: bfloat16 if the processor supports it and
    the embeddings agree."""
    weights_dir: OptionalPath = option(default=None)
    """Folder written by edgekd fetch, to load teacher and student without a network."""
    prompts: str | None = None
    """Prompt templates: photo, imagenet7, imagenet80, domain, or a file. Default: the recipe's."""
    descriptions: str | None = None
    """Descriptions of the classes to append to their prompts: a .json or text file, or command:PROGRAM."""
    captions: OptionalPath = option(default=None)
    """Captions of the training images for the term caption_nce: a .json or .csv file."""
    vocabulary: OptionalPath = option(default=None)
    """File of names to distil for, one per line, with a recipe that uses no labels."""
    views: int = option(default=4, ge=1, le=65_000)
    """Cached augmented views per image."""
    online_teacher: bool = False
    """Run the teacher at every step on new views instead of caching its embeddings."""
    centre: bool | None = None
    """Mean-centre the teacher's image and text embeddings. Default: if the recipe does and the embeddings are
    anisotropic."""


class StudentOptions(Config):
    """The student and its initial weights."""

    student: str = option(default="mobilenetv3", kw_only=False, flag="--student")
    """Student: a short name (edgekd list students) or a timm name."""
    pretrained: Literal["hub", "scratch", "toy"] | None = None
    """Initial weights: hub, scratch (random) or toy (shipped with edgekd). Default: hub; on toy data toy if
    available."""
    student_weights: OptionalPath = option(default=None)
    """Initial weights from a safetensors or torch file."""
    student_options: dict[str, Any] = option(default_factory=dict)
    """Further arguments of `timm.create_model`, such as `pad_type`."""
    size: int | None = option(default=None, ge=16, le=1024)
    """Input side in pixels. Default: the student's own; toy: 48."""
    projector: Literal["linear", "mlp", "mlp-gelu"] | None = None
    """Projector from the student's features to the teacher's embedding space. Default: the recipe's."""


class RecipeOptions(Config):
    """The recipe and the choice of weights."""

    stages: dict[str, Any] = option(default_factory=dict)
    """Changes to the recipe's numbers, `{stage: {field: value}}`."""
    bn: Literal["frozen", "train"] | None = None
    """BatchNorm statistics: frozen or train. Default: frozen; train from scratch."""
    ema: float = option(default=0.99, ge=0, lt=1)
    """Decay of the exponential moving average of the weights; 0 turns it off."""
    average: Literal["ema", "swad", "wise-ft", "none"] = "ema"
    """Weight averaging: ema, swad, wise-ft (interpolation with the teacher's weights, for --student teacher) or
    none."""
    swad: SwadRule = option(default_factory=SwadRule)
    """Parameters of SWAD."""
    wise_ft: float = option(default=0.5, ge=0, le=1)
    """Share of the fine-tuned weights in WiSE-FT."""
    label_smoothing: float = option(default=0.0, ge=0, lt=1)
    """Label smoothing of the cross-entropies with the label."""
    select: Literal["last", "best"] = "last"
    """Checkpoint to keep: last, or best by mean accuracy on source validation."""


class ScheduleOptions(Config):
    """Steps, batches and learning rate."""

    steps: int | None = option(default=None, ge=1)
    """Total optimizer steps of all stages."""
    epochs: float | None = option(default=None, gt=0)
    """Passes over the training images, as an alternative to --steps. Default: 40; toy: a fixed number of steps."""
    batch_size: int = option(default=64, ge=2, le=MOST_BATCH)
    """Images per step, summed over all processes. Default: 64; toy: 32."""
    lr: float | None = option(default=None, gt=0)
    """Peak learning rate. Default: 3e-4; 2e-3 on toy data and from scratch; 5e-4 for plain vision transformers."""
    weight_decay: float = option(default=0.01, ge=0)
    """Weight decay of AdamW."""
    warmup: float = option(default=0.1, ge=0, lt=1)
    """Fraction of each stage for the warm-up; the learning rate then follows a cosine."""
    eval_every: int | None = option(default=None, ge=1)
    """Steps between evaluations on source validation. Default: only at the end; eight times with --select best."""
    patience: int | None = option(default=None, ge=1)
    """Stop after this many evaluations on source validation without improvement; implies --select best."""

    @check
    def _one_length(self) -> None:
        if self.steps and self.epochs:
            raise EdgekdError("Both steps and epochs are set.", "Give one of them.")


class HardwareOptions(Config):
    """Devices and precision."""

    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """Precision of training: auto, 32-true, bf16-mixed or 16-mixed. auto: bf16-mixed if the processor supports
    bfloat16."""
    compile: bool = False
    """Compile the student with torch.compile."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on."""
    devices: int = option(default=1, ge=1)
    """Number of processes on this machine."""
    logger: Words = option(default=("tensorboard",), group="Output")
    """Loggers besides metrics.jsonl, separated by commas: tensorboard, csv, wandb, mlflow."""
    log_every: int = option(default=10, ge=1, group="Output")
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = option(default=50, ge=1, group="Output")
    """Steps between checkpoints."""
    checkpoint_minutes: float = option(default=3.0, gt=0, group="Output")
    """Maximum minutes between checkpoints."""

    @check
    def _known_loggers(self) -> None:
        for name in self.logger:
            check_known(name, LOGGERS, f'There is no logger "{name}".')


class RunOptions(
    HardwareOptions, ScheduleOptions, RecipeOptions, StudentOptions, TeacherOptions, DataOptions
):
    """Options of a single training, and of every training of a study."""

    @check
    def _one_selection(self) -> None:
        if self.average in ("swad", "wise-ft") and (self.select == "best" or self.patience):
            raise EdgekdError(
                f"--average {self.average} cannot be combined with --select best or --patience.",
                "Leave one of them out.",
            )


class TrainConfig(RunOptions):
    """A training run. Options that are None are chosen from data and student when the run starts, and recorded."""

    whole_file: ClassVar[bool] = True

    recipe: str = option(default="edgekd", group="Recipe")
    """Recipe (see edgekd list recipes)."""
    test_domain: str = option(default="auto", group="Split")
    """Domain to leave out as the unseen test; auto: the last by name; none: no domain."""
    unseen_classes: Words = option(default=(), group="Split")
    """Classes to leave out of training for a zero-shot test, separated by commas. No domain is left out then."""
    shots: int = option(default=0, ge=0, group="Split")
    """Images of each unseen class to train on. The run then has all classes."""
    label_fraction: float = option(default=1.0, gt=0, le=1, group="Split")
    """Fraction of the training images of each class of each domain to train on, at least one. The tests are not
    reduced."""
    adapt: int | None = option(default=None, ge=0, group="Split")
    """Images of the unseen domain to train on without labels. The other half of the domain is then the test."""
    start: OptionalPath = option(default=None, group="Student")
    """Finished run to take initial weights from: backbone, projector, and the head's rows of shared classes."""
    seed: int = option(default=0, ge=0, lt=2**31, group="Schedule")
    """Seed of weights, data order and dropout."""
    out: OptionalPath = option(default=None, group="Output")
    """Run folder. Default: runs/STUDENT-RECIPE-DATA."""
    resume: bool = option(default=False, group="Output")
    """Resume the run in --out, or the newest unfinished run."""
    overwrite: bool = option(default=False, group="Output")
    """Replace an earlier run in --out."""
    smoke: bool = option(default=False, group="Schedule")
    """Train a few steps on one view per image, to check that the command works."""
    plan: bool = option(default=False, group="Schedule")
    """Do not train; print steps, teacher passes, disk space and the expected time."""

    @property
    def folder(self) -> Path:
        """Return `out`, which is always set in a settled configuration."""
        assert self.out is not None
        return self.out

    @check
    def _shots(self) -> None:
        if self.shots and not self.unseen_classes:
            raise EdgekdError(
                "--shots needs unseen classes, and none are named.",
                "Name some: --unseen-classes dog,horse.",
            )

    @check
    def _one_test(self) -> None:
        if self.unseen_classes and self.test_domain not in ("auto", "none"):
            raise EdgekdError(
                f"Both the domain {self.test_domain} and {len(self.unseen_classes)} classes are left out.",
                "These are two different tests; choose one of them.",
            )


class MissingConfig(Config):
    """Images that are missing from a file of precomputed embeddings."""

    teacher: str = option(kw_only=False)
    """File of embeddings, as embeddings:FILE.npz."""
    data: OptionalSpec = option(default=None)
    """Labelled images, as for edgekd train."""
    unlabelled: Items = option(default=())
    """Unlabelled images, as for edgekd train; may be repeated."""


def read_config(path: Path) -> TrainConfig:
    """Read the settled configuration of a run; raise `EdgekdError` if it is missing or damaged."""
    return TrainConfig.restore(read_object(path, "run configuration"), path)
