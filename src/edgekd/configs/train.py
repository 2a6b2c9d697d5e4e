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
from edgekd.core.errors import EdgekdError, did_you_mean
from edgekd.core.formats import MOST_BATCH
from edgekd.core.readers import read_object

LOGGERS = ("tensorboard", "csv", "wandb", "mlflow")


class SwadRule(BaseModel):
    """Where SWAD's average starts and ends; the published numbers, for every student and data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patience: int = Field(default=3, ge=1)
    """Evaluations that a minimum must outlast to be the start."""
    tolerance: int = Field(default=6, ge=1)
    """Evaluations in a row above the threshold that are the end."""
    ratio: float = Field(default=0.3, ge=0)
    """The threshold is the mean loss at the start, plus this part of it."""


class DataOptions(Config):
    """Images."""

    data: Spec = option(default="toy")
    """Images: toy, a folder (class/img, domain/class/img, train|val|test/class/img), a .csv/.parquet manifest, a COCO
    .json, WebDataset shards (DIR/{000..127}.tar), or hf:NAME[:split]."""
    unlabelled: Items = option(default=())
    """Images without labels that train too: a folder however deep, a .csv/.parquet manifest, shards, hf:NAME, or
    toy:STYLE; may be repeated."""
    unlabelled_share: float = option(default=0.4, gt=0, lt=1)
    """Part of each batch that is unlabelled, where there are unlabelled images."""
    unlabelled_images: int | None = option(default=None, ge=1)
    """Only so many of them, the first by content hash. Default: all."""
    unlabelled_filter: bool = False
    """Leave out unlabelled images on which the teacher is less confident than on all but a twentieth of the
    validation images: pictures of nothing that the classes name."""
    balance: Literal["domains", "classes", "weights"] | None = None
    """Equal shares in the batches: of the domains, or of every class of every domain, for uneven classes; weights:
    of the domains, and rare classes weigh more in the cross-entropy. Default: the recipe's; domains with unlabelled
    images."""
    augment: Literal["plain", "restyle"] | None = option(default=None, group="Views")
    """Views: plain (crops and colours), or restyle for half of them in other styles. Default: the recipe's; plain with
    unlabelled images."""
    mixup: float = option(default=0.0, ge=0, group="Views")
    """Mix every image with another: α of the part's Beta(α, α) distribution, 0 for none."""
    cutmix: float = option(default=0.0, ge=0, group="Views")
    """Put a box of another image into every image: α of the part's Beta(α, α) distribution, 0 for none."""
    split_seed: int = option(default=0, ge=0, group="Split")
    """Seed of the train/val/test split; apart from `seed`, so that seeds compare on the same images."""


class TeacherOptions(Config):
    """The teacher, and the texts that it embeds."""

    teacher: str = "toy"
    """toy, NAME:TAG (open_clip), hf-hub:ORG/MODEL, local-dir:FOLDER, embeddings:FILE.npz."""
    teacher_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the cached embeddings; auto: bfloat16 where the processor computes in it and the embeddings stay the same."""
    weights_dir: OptionalPath = option(default=None)
    """Folder that edgekd fetch wrote: teacher and student come from it, without a network."""
    prompts: str | None = None
    """photo, imagenet7, imagenet80, domain, or a file of prompt templates. Default: the recipe's."""
    descriptions: str | None = None
    """Sentences about each class for its prompts: a .json or text file, or command:PROGRAM."""
    captions: OptionalPath = option(default=None)
    """A caption per training image, for the term caption_nce: .json or .csv."""
    vocabulary: OptionalPath = option(default=None)
    """Names to distil for, one per line, with a recipe that uses no labels."""
    views: int = option(default=4, ge=1, le=65_000)
    """Cached augmented views per image."""
    online_teacher: bool = False
    """Query the teacher at every step instead of caching; views are then never repeated."""
    centre: bool | None = None
    """Subtract the mean of the teacher's embeddings, of images and of texts, from the targets. Default: where the
    recipe does and the embeddings are anisotropic."""


class StudentOptions(Config):
    """The student, and where its weights start."""

    student: str = option(default="mobilenetv3", kw_only=False, flag="--student")
    """Friendly or timm name: mobilenetv3, vit_tiny, …"""
    pretrained: Literal["hub", "scratch", "toy"] | None = None
    """First weights: hub, scratch or toy (shipped). Default: hub; on toy data toy, where there are some."""
    student_weights: OptionalPath = option(default=None)
    """Start from this safetensors or torch file."""
    student_options: dict[str, Any] = option(default_factory=dict)
    """Further arguments of `timm.create_model`, such as `pad_type`."""
    size: int | None = option(default=None, ge=16, le=1024)
    """Input side in pixels. Default: the student's own; toy: 48."""
    projector: Literal["linear", "mlp", "mlp-gelu"] | None = None
    """Layers from the student's features to the teacher's space. Default: the recipe's."""


class RecipeOptions(Config):
    """The method, and which weights it keeps."""

    stages: dict[str, Any] = option(default_factory=dict)
    """Changes to the recipe's numbers, `{stage: {field: value}}`."""
    bn: Literal["frozen", "train"] | None = None
    """BatchNorm statistics: frozen or train. Default: frozen; from scratch: train."""
    ema: float = option(default=0.99, ge=0, lt=1)
    """Decay of the averaged weights, 0 for none."""
    average: Literal["ema", "swad", "wise-ft", "none"] = "ema"
    """Weights to keep: ema, swad, wise-ft (between fine-tuned and CLIP's own, for --student teacher) or none."""
    swad: SwadRule = option(default_factory=SwadRule)
    """SWAD's three numbers."""
    wise_ft: float = option(default=0.5, ge=0, le=1)
    """Part of the fine-tuned weights in WiSE-FT's mixture."""
    label_smoothing: float = option(default=0.0, ge=0, lt=1)
    """Part of the label that is spread over all classes, in cross-entropies with the label."""
    select: Literal["last", "best"] = "last"
    """Which step's weights are kept: last, or best by mean accuracy on source validation."""


class ScheduleOptions(Config):
    """Steps, batches and learning rate."""

    steps: int | None = option(default=None, ge=1)
    """Optimizer steps of all stages together."""
    epochs: float | None = option(default=None, gt=0)
    """Passes over the training images, instead of steps. Default: 40; toy: a fixed number of steps."""
    batch_size: int = option(default=64, ge=2, le=MOST_BATCH)
    """Images per step over all processes. Default: 64; toy: 32."""
    lr: float | None = option(default=None, gt=0)
    """Peak learning rate. Default: 3e-4; on toy data and from scratch 2e-3, for plain vision transformers 5e-4."""
    weight_decay: float = option(default=0.01, ge=0)
    """Weight decay of AdamW."""
    warmup: float = option(default=0.1, ge=0, lt=1)
    """Part of each stage over which the learning rate rises; then it falls as a cosine."""
    eval_every: int | None = option(default=None, ge=1)
    """Steps between evaluations on source validation. Default: at the end; with --select best eight times."""
    patience: int | None = option(default=None, ge=1)
    """Stop after so many evaluations on source validation without a better one; implies --select best."""

    @check
    def _one_length(self) -> None:
        if self.steps and self.epochs:
            raise EdgekdError("Both steps and epochs are set.", "Give one of them.")


class HardwareOptions(Config):
    """Devices and precision."""

    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """auto, 32-true, bf16-mixed or 16-mixed; auto: bf16-mixed on a processor that computes in bfloat16."""
    compile: bool = False
    """Compile the student with torch.compile."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda."""
    devices: int = option(default=1, ge=1)
    """Processes on this machine."""
    logger: Words = option(default=("tensorboard",), group="Output")
    """Where numbers go besides metrics.jsonl, with commas: tensorboard, csv, wandb, mlflow."""
    log_every: int = option(default=10, ge=1, group="Output")
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = option(default=50, ge=1, group="Output")
    """Steps between checkpoints."""
    checkpoint_minutes: float = option(default=3.0, gt=0, group="Output")
    """Minutes after which a checkpoint is due, however few steps were made."""

    @check
    def _known_loggers(self) -> None:
        for name in self.logger:
            if name not in LOGGERS:
                raise EdgekdError(f'There is no logger "{name}".', did_you_mean(name, LOGGERS))


class RunOptions(
    HardwareOptions, ScheduleOptions, RecipeOptions, StudentOptions, TeacherOptions, DataOptions
):
    """What a single training and every training of a study can be given."""

    @check
    def _one_selection(self) -> None:
        if self.average in ("swad", "wise-ft") and (self.select == "best" or self.patience):
            raise EdgekdError(
                f"{self.average} chooses the weights itself, so --select best and --patience have nothing to choose.",
                "Leave one of them out.",
            )


class TrainConfig(RunOptions):
    """A training run. `None` means: chosen from data and student when the run starts, printed and written down."""

    whole_file: ClassVar[bool] = True

    recipe: str = option(default="edgekd", group="Recipe")
    """See edgekd list recipes."""
    test_domain: str = option(default="auto", group="Split")
    """Domain to leave out as unseen; auto is the last by name, none leaves none out."""
    unseen_classes: Words = option(default=(), group="Split")
    """Classes that never train, with commas, for a zero-shot test on them; no domain is left out then."""
    shots: int = option(default=0, ge=0, group="Split")
    """Images of each unseen class that train nevertheless; the run then has all classes."""
    label_fraction: float = option(default=1.0, gt=0, le=1, group="Split")
    """Part of the training images of each class of each domain that trains, at least one; the tests stay whole."""
    adapt: int | None = option(default=None, ge=0, group="Split")
    """Images of the unseen domain that train without labels; half of the domain is tested then, whatever the number."""
    start: OptionalPath = option(default=None, group="Student")
    """A finished run to start from: backbone, projector, and the head's rows of known classes."""
    seed: int = option(default=0, ge=0, lt=2**31, group="Schedule")
    """Seed of weights, order and dropout."""
    out: OptionalPath = option(default=None, group="Output")
    """Run folder. Default: runs/STUDENT-RECIPE-DATA."""
    resume: bool = option(default=False, group="Output")
    """Go on where a killed run stopped: the one in --out, else the newest unfinished."""
    overwrite: bool = option(default=False, group="Output")
    """Replace an earlier run in --out."""
    smoke: bool = option(default=False, group="Schedule")
    """A few steps on one view per image: does it run at all?"""
    plan: bool = option(default=False, group="Schedule")
    """Train nothing: print steps, teacher passes, disk, and the time it would take here."""

    @property
    def folder(self) -> Path:
        """`out`, which a settled configuration has."""
        assert self.out is not None
        return self.out

    @check
    def _shots(self) -> None:
        if self.shots and not self.unseen_classes:
            raise EdgekdError(
                f"{self.shots} images of each unseen class are to train, and no class is unseen.",
                "Name some: --unseen-classes dog,horse.",
            )

    @check
    def _one_test(self) -> None:
        if self.unseen_classes and self.test_domain not in ("auto", "none"):
            raise EdgekdError(
                f"Both the domain {self.test_domain} and {len(self.unseen_classes)} classes are to be unseen.",
                "These are two tests: leave one of them out.",
            )


class MissingConfig(Config):
    """A search for the images that a file of precomputed embeddings lacks."""

    teacher: str = option(kw_only=False)
    """embeddings:FILE.npz"""
    data: OptionalSpec = option(default=None)
    """Labelled images, as for edgekd train."""
    unlabelled: Items = option(default=())
    """Images without labels, as for edgekd train; may be repeated."""


def read_config(path: Path) -> TrainConfig:
    """Read the settled configuration that a run wrote down; a missing or damaged one is an `EdgekdError`."""
    return TrainConfig.restore(read_object(path, "run configuration"), path)
