"""Train a vision-language student, with the loop, losses and checkpoints of `edgekd train`.

There is no augmentation, since the teacher's patch vectors are computed once per picture.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekd.configs.train import TrainConfig
from edgekd.configs.vl import VlTrainConfig
from edgekd.core.console import say, shell_word
from edgekd.core.errors import EdgekdError
from edgekd.core.files import write_json
from edgekd.core.folders import RUN, clear, growing
from edgekd.core.readers import read_object
from edgekd.core.tensors import write_tensors
from edgekd.core.version import __version__
from edgekd.distill.checkpoint import Checkpoint, Task
from edgekd.distill.classification.text_targets import evenly_spread, report_zero_shot
from edgekd.distill.inputs.batches import BalancedSampler, PixelStore, open_store
from edgekd.distill.launch import make_fabric
from edgekd.distill.losses import TermSpec
from edgekd.distill.models.teachers import load_teacher
from edgekd.distill.progress import Progress
from edgekd.distill.recipes import Stage
from edgekd.distill.train import fit
from edgekd.distill.vl import tokens
from edgekd.distill.vl.data import Reader, VlSplit, subset
from edgekd.distill.vl.run import (
    RECORD,
    WEIGHTS,
    VlRun,
    accuracy,
    build_student,
    frozen_maps,
    load_vl_run,
)
from edgekd.distill.vl.student import Joint, VlStudent
from edgekd.distill.vl.tasks import load_examples
from edgekd.distill.vl.teacher import TokenTargets, read_tokens, token_targets
from edgekd.distill.vl.token_td import TeacherTokens, TokenMaps, VlBatch

_LOG_EVERY = 50
_WEIGHT_DECAY = 0.05
_MAX_NORM = 1.0
_VAL_EXAMPLES = 1000
_SAMPLE = 512


class Trained(nn.Module):
    """The trained modules: the student, and with a teacher the maps to its width."""

    def __init__(self, student: VlStudent, maps: TokenMaps | None, frozen: bool) -> None:
        super().__init__()
        self.student, self.maps, self.frozen = student, maps, frozen

    def forward(self, pictures: Tensor, ids: Tensor) -> Joint:
        """Pictures uint8 `[B, S, S, 3]`, or a frozen backbone's maps of them `[B, P, c]`, and tokens → states."""
        maps = pictures if self.frozen else self.student.encode(pictures)
        return self.student.fuse(maps, ids)


@dataclass(frozen=True, eq=False)
class RawExamples:
    """A batch: indices of examples, and their pictures or a frozen backbone's maps of them."""

    step: int
    indices: NDArray[np.int64]
    pictures: Tensor


@dataclass(eq=False)
class TokenDistillation(Task):
    """The task of the training loop; `targets` is None without a teacher."""

    config: VlTrainConfig
    model: Trained
    reader: Reader
    split: VlSplit
    targets: TokenTargets | None

    def __post_init__(self) -> None:
        data, config = self.reader.data, self.config
        self._sampler = BalancedSampler((self.split.train,), config.batch_size, config.seed)
        self._pictures = np.unique(data.image_of[self.split.train])
        self._maps: Tensor | None = None
        self._store: PixelStore | None = None
        if config.freeze_backbone:
            self._maps = frozen_maps(self.model.student, self.reader, self._pictures)
        else:
            self._store = open_store(data.images, self.reader.preprocess.size)

    def source(self, step: int) -> RawExamples:
        indices, _ = self._sampler.step(step)
        wanted = self.reader.data.image_of[indices]
        if self._maps is not None:
            rows = np.searchsorted(self._pictures, wanted)
            return RawExamples(step, indices, self._maps[torch.from_numpy(rows)])
        assert self._store is not None
        return RawExamples(step, indices, torch.from_numpy(np.array(self._store.batch(wanted))))

    def train_only(self, parts: tuple[str, ...]) -> None:
        """Freeze the backbone if the settings require it; all other parts train."""
        backbone = self.model.student.backbone
        if backbone is not None and self.config.freeze_backbone:
            backbone.requires_grad_(False)

    def views(self, raw: RawExamples) -> Tensor:
        return raw.pictures

    def teacher_features(self, raw: RawExamples) -> TeacherTokens | None:
        """Return the teacher's token vectors of the examples, or of other examples for the control."""
        if self.targets is None:
            return None
        shuffled = self.config.shuffle_teacher
        return self.targets.of(np.roll(raw.indices, 1) if shuffled else raw.indices)

    def forward(
        self, model: nn.Module, views: Tensor, teacher: TeacherTokens | None, raw: RawExamples
    ) -> VlBatch:
        """Return the student's states and their targets; for `choice`, the states of the correct candidate."""
        data = self.reader.data
        joint: Joint = model(views, self.reader.texts(raw.indices))
        logits, labels = joint.logits, torch.from_numpy(data.labels[raw.indices])
        if data.task == "choice":
            joint = own_candidates(joint, labels)
        generator = torch.Generator().manual_seed((self.config.seed << 32) + raw.step)
        found: Any = {} if teacher is None else {"tokens": teacher, "maps": self.model.maps}
        return VlBatch(labels=labels, logits=logits, joint=joint, generator=generator, **found)

    def names(self, raw: RawExamples) -> list[str]:
        data = self.reader.data
        return [data.images.ids[i] for i in data.image_of[raw.indices]]

    def accuracy(self, model: nn.Module) -> float:
        """Return the share of right answers on a sample of the validation examples, 0–1."""
        shown = subset(self.split.val, _VAL_EXAMPLES)
        student = self.model.student.eval()
        return accuracy(student, self.reader, shown, frozen=self.config.freeze_backbone)

    def loss(self, model: nn.Module) -> float:
        """Return the error rate on validation."""
        return 1 - self.accuracy(model)

    def stage(self) -> Stage:
        """Return the loss terms."""
        config = self.config
        terms = {"ce": TermSpec(1.0)}
        if self.targets is not None:
            fields = ("select", "ratio", "pooled", "distance", "confidence")
            params = {field: getattr(config, field) for field in fields}
            terms["token_td"] = TermSpec(config.weight, params)
        return Stage("train", 1.0, terms, ("backbone", "head"))


def own_candidates(joint: Joint, labels: Tensor) -> Joint:
    """Return the states of the correct candidate among the K rows of each example."""
    rows = torch.arange(len(labels)) * joint.logits.shape[1] + labels
    return Joint(joint.logits, joint.cls[rows], joint.patches[rows], joint.text[rows])


def train_vl(config: VlTrainConfig) -> VlRun:
    """Train a student and write its run folder; whatever the user can mend is an `EdgekdError`."""
    out, resume = config.folder, config.resume
    if resume:
        if (out / RECORD).exists():
            raise EdgekdError(
                f"The run at {out} is finished.",
                f"Evaluate it: edgekd vl evaluate {shell_word(out)}",
            )
        config = VlTrainConfig.restore(
            read_object(out / "config.json", "run configuration"), out / "config.json"
        )
    with growing(out, RUN, overwrite=config.overwrite, resume=resume):
        _train(config, out, resume=resume)
    return load_vl_run(out)


def _train(config: VlTrainConfig, out: Path, *, resume: bool) -> None:
    data, split = load_examples(config)
    teacher = read_tokens(load_teacher(config.teacher)) if config.distil else None
    length = tokens.length_of(data.texts, min(teacher.context, 77) if teacher else 77)
    torch.manual_seed(config.seed)
    # Only training words get rows: rows of other words would stay random and take memory on a device.
    ids = tokens.tokenize(data.texts, length)
    rows = tokens.token_rows(ids[torch.from_numpy(np.unique(data.text_of[split.train]))])
    student, preprocess, grid = build_student(config, rows, length, len(data.answers))
    reader = Reader(data, preprocess, ids)
    if not resume:
        clear(out, RUN, marker=False)
        write_json(out / "config.json", config.model_dump(mode="json"))
        split.images.write(out / "split.json")
    tested = f"{len(split.id_test):,} test, {len(split.ood_test):,} test unseen"
    say(
        f"{data.name}: {len(split.train):,} examples on {split.train_images:,} pictures train, {tested} "
        f"({config.control})"
    )
    started = time.monotonic()
    targets = maps = None
    if teacher:
        patches = config.select != "none" and not config.blind
        targets = token_targets(teacher, reader, split.train, grid if patches else None)
        maps = TokenMaps(config.width, targets.pooled_image.shape[1])
        sample = evenly_spread(split.train, _SAMPLE)
        report_zero_shot(targets.logits(sample), data.truth[sample], "examples")
    model = Trained(student, maps, config.freeze_backbone)
    task = TokenDistillation(config, model, reader, split, targets)
    teacher_seconds = time.monotonic() - started
    loop = _loop_settings(config, out)
    fabric = make_fabric(loop)
    checkpoint = Checkpoint(loop, fabric, "edgekd vl train")
    resume_at = checkpoint.restore(task) if resume else 0
    stages = [(task.stage(), range(config.steps))]
    with Progress(loop, fabric, config.steps, resume_at, checkpoint.speed_before) as progress:
        with checkpoint.request:
            fit(task, loop, fabric, stages, checkpoint, progress, max_norm=_MAX_NORM)
        seconds = checkpoint.seconds_before + progress.seconds
    write_tensors(out / WEIGHTS, student.eval().state_dict())
    parts = ("train", "val", "id_test", "ood_test")
    record = {
        "schema_version": 1,
        "edgekd": __version__,
        "config": config.model_dump(mode="json"),
        "data": data.name,
        "synthetic": data.synthetic,
        "answers": list(data.answers),
        "length": length,
        "preprocess": preprocess.model_dump(mode="json"),
        "teacher_id": teacher.teacher.id if teacher else None,
        "counts": {part: len(getattr(split, part)) for part in parts},
        "train_pictures": split.train_images,
        "teacher_seconds": round(teacher_seconds, 2),
        "train_seconds": round(seconds, 2),
        "selection": "last weights",
        "val_accuracy": task.accuracy(model),
    }
    write_json(out / RECORD, record)
    checkpoint.remove()


def _loop_settings(config: VlTrainConfig, out: Path) -> TrainConfig:
    """Return the settings of the training loop. BatchNorm statistics are frozen if the backbone is pretrained."""
    pretrained = config.pretrained != "scratch" or config.student_weights is not None
    return TrainConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        lr=config.lr,
        weight_decay=_WEIGHT_DECAY,
        seed=config.seed,
        bn="frozen" if pretrained else "train",
        average="none",
        log_every=_LOG_EVERY,
        checkpoint_every=config.checkpoint_every,
        accelerator="cpu",
        precision="32-true",
        out=out,
    )
