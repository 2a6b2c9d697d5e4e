"""Everything a training run can be told, from three sources in rising order: `--config` file, flags, `--set a.b=c`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgekd.errors import EdgekdError, did_you_mean
from edgekd.readers import parse_toml, printable, read_object, read_toml

_CHECK = "Check --config; docs/train.md has an example."


class SwadRule(BaseModel):
    """Where SWAD's average starts and ends; the published numbers, for every student and data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patience: int = Field(default=3, ge=1)
    """Evaluations that a low must outlast to be the start."""
    tolerance: int = Field(default=6, ge=1)
    """Evaluations in a row above the threshold that are the end."""
    ratio: float = Field(default=0.3, ge=0)
    """The threshold lies this part above the mean loss at the start."""


class TrainConfig(BaseModel):
    """A training run. `None` means: chosen from data and student when the run starts, printed and written down."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    student: str = "mobilenetv3"
    pretrained: Literal["hub", "scratch", "toy"] | None = None
    """Where the first weights come from. None: for the toy data those shipped with it, or random ones where there are
    none (said so); else the hub."""
    student_weights: Path | None = None
    student_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `timm.create_model`, such as `pad_type`."""
    data: str = "toy"
    unlabelled: tuple[str, ...] = ()
    """Images without labels that train too: folders, manifests, `toy:STYLE`."""
    unlabelled_share: float = Field(default=0.5, gt=0, lt=1)
    """Part of each batch that is unlabelled, where there are unlabelled images."""
    unlabelled_images: int | None = Field(default=None, ge=1)
    """Only so many of them, the first by content hash. None: all."""
    unlabelled_filter: bool = False
    """Leave out unlabelled images that the teacher is less sure of than of all but a twentieth of the validation
    images: pictures of nothing that the classes name."""
    adapt: int | None = Field(default=None, ge=0)
    """Images of the unseen domain that train without labels. Half of the domain is tested then, whatever the number."""
    augment: Literal["plain", "restyle"] = "plain"
    """Student's views: crops and colours, or with half of them redrawn in other styles (`distill.restyle`)."""
    teacher: str = "toy"
    teacher_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the cached embeddings. auto: bfloat16 where the processor computes in it and the embeddings stay the same."""
    prompts: str | None = None
    """Prompt templates. None: the recipe's."""
    descriptions: str | None = None
    """Sentences about each class, appended to its prompts: a JSON or text file, or `command:PROGRAM`."""
    captions: Path | None = None
    """A caption per training image (JSON or CSV), for the term `caption_nce`."""
    vocabulary: Path | None = None
    """Names, one per line, that a recipe without labels distils for, instead of the images' classes."""
    recipe: str = "vl2v-adip"
    stages: dict[str, Any] = Field(default_factory=dict)
    """Changes to the recipe's numbers, `{stage: {field: value}}`."""
    centre: bool | None = None
    """Subtract the mean of the teacher's embeddings, images and texts each their own, from what the student learns.
    None: where the recipe is for it and the images' mean is long (embeddings in a cone)."""
    test_domain: str = "auto"
    unseen_classes: tuple[str, ...] = ()
    """Classes that never train, for a zero-shot test on them; no domain is left out then."""
    shots: int = Field(default=0, ge=0)
    """Images of each unseen class that train nevertheless; the run then knows all classes."""
    start: Path | None = None
    """A finished run whose student this one starts from: backbone, projector, and a head's rows of known classes."""
    label_fraction: float = Field(default=1.0, gt=0, le=1)
    """Part of the training images of each class of each domain that trains, at least one; the tests stay whole."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    split_seed: int = Field(default=0, ge=0)
    """Seed of the train/val/test split; kept apart from `seed` so that seeds compare on the same images."""
    size: int | None = Field(default=None, ge=16, le=1024)
    batch_size: int = Field(default=64, ge=2)
    """Images per step over all processes."""
    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    lr: float | None = Field(default=None, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Part of each stage over which the learning rate rises; then it falls as a cosine."""
    views: int = Field(default=4, ge=1, le=65_000)
    """Cached augmented views per image."""
    online_teacher: bool = False
    """Ask the teacher at every step instead of caching; views are then never repeated."""
    bn: Literal["frozen", "train"] | None = None
    """BatchNorm statistics: frozen at their pretrained values, or trained. None: trained only from scratch."""
    ema: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the averaged weights that are evaluated and saved; 0 switches averaging off."""
    average: Literal["ema", "swad", "wise-ft", "none"] = "ema"
    """Which weights come out of the last stage: their moving average, SWAD's, WiSE-FT's between them and CLIP's own
    (for the student `teacher`), or the last ones."""
    swad: SwadRule = Field(default_factory=lambda: SwadRule())
    wise_ft: float = Field(default=0.5, ge=0, le=1)
    """Part of the fine-tuned weights in WiSE-FT's mixture."""
    projector: Literal["linear", "mlp", "mlp-gelu"] | None = None
    """What leads from the student's features into the teacher's space. None: the recipe's."""
    select: Literal["last", "best"] = "last"
    """Which weights are kept: the last, or those with the best mean accuracy on source validation."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    compile: bool = False
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = Field(default=1, ge=1)
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations on source validation. None: at the end, and with `select=best` eight times."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints."""
    checkpoint_minutes: float = Field(default=3.0, gt=0)
    """Minutes after which a checkpoint is due, however few steps were made."""
    out: Path | None = None
    resume: bool = False
    overwrite: bool = False
    smoke: bool = False
    """A few steps on one view per image: does it run at all?"""


def read_config(path: Path) -> TrainConfig:
    """The settled configuration a run wrote down; a missing or damaged one is an `EdgekdError`."""
    settings = read_object(path, "run configuration")
    try:
        return TrainConfig.model_validate(settings)
    except ValidationError as error:
        raise EdgekdError(
            f"The run configuration at {path} is damaged ({printable(error.errors()[0]['msg'].lower())}).",
            "Restore it, or train again with --overwrite.",
        ) from error


def load_config(
    flags: Mapping[str, Any], *, file: Path | None = None, settings: Iterable[str] = ()
) -> TrainConfig:
    """Merge a TOML file, flags that were given (not None) and `a.b=c` settings into one validated configuration.

    Raises:
        EdgekdError: every problem of the three sources in one message.
    """
    merged: dict[str, Any] = {}
    if file is not None:
        merged |= _toml(file)
    merged |= {name: copy.deepcopy(value) for name, value in flags.items() if value is not None}
    for setting in settings:
        _put(merged, setting)
    try:
        config = TrainConfig.model_validate(merged)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                problems.append(
                    f'unknown setting "{name}". {did_you_mean(name, TrainConfig.model_fields)}'
                )
            else:
                problems.append(f"{name}: {problem['msg'].lower()}")
        raise EdgekdError(
            "The configuration does not hold: " + "; ".join(problems) + ".",
            "See: edgekd train --help.",
        ) from error
    if config.steps and config.epochs:
        raise EdgekdError("Both steps and epochs are set.", "Give one of them.")
    return config


def gates_of_file(path: Path) -> dict[str, Any]:
    """The `[gates]` table of a TOML file, metric → limit; see `edgekd.benchmark.gates`.

    Raises:
        EdgekdError: no such file, not TOML, no such table.
    """
    table = read_toml(path, "configuration file", _CHECK).get("gates")
    if not isinstance(table, dict) or not table:
        raise EdgekdError(
            f"{path} has no [gates].", 'Write a table: [gates], then lines such as p90_ms = "<=20".'
        )
    return table


def _toml(path: Path) -> dict[str, Any]:
    values = read_toml(path, "configuration file", _CHECK)
    # A [train] table leaves room for other commands' settings in the same file.
    table = values.get("train", {name: value for name, value in values.items() if name != "gates"})
    if not isinstance(table, dict):
        raise EdgekdError(f"{path} has a value train, not a table [train].", _CHECK)
    if str(table.get("descriptions", "")).startswith("command:"):
        raise EdgekdError(
            f"{path} names a command for descriptions; edgekd runs one from the command line only.",
            "Give it there: --descriptions command:PROGRAM.",
        )
    return dict(table)


def _put(target: dict[str, Any], setting: str) -> None:
    path, equals, text = setting.partition("=")
    if not equals or not path.strip():
        raise EdgekdError(
            f'"{setting}" is not a setting.', "Write --set name=value or --set a.b=value."
        )
    try:
        value = parse_toml(f"value = {text}")["value"]
    except ValueError:
        value = text
    *parents, last = path.strip().split(".")
    for parent in parents:
        inner = target.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise EdgekdError(
                f'"{setting}" cannot be set: {parent} is a value, not a table.', "Check the name."
            )
        target = inner
    target[last] = value
