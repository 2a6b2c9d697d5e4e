"""Train a vision-language student, with or without a teacher, on one process.

No augmentation: the teacher's patch vectors are asked once per picture, so the student must see the same picture.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from edgekd.configs.vl import VlTrainConfig
from edgekd.core.console import say
from edgekd.core.errors import EdgekdError
from edgekd.core.files import write_json
from edgekd.core.folders import RUN, clear, growing
from edgekd.distill.teacher import load_teacher
from edgekd.distill.terms import weighted_mean
from edgekd.distill.vl import tokens
from edgekd.distill.vl.build import RECORD, WEIGHTS, VlRun, build_student, load_vl_run, save_weights
from edgekd.distill.vl.data import VlData, load_vl_data
from edgekd.distill.vl.evaluate import accuracy
from edgekd.distill.vl.examples import Reader, make_reader, order, training_store
from edgekd.distill.vl.frozen import frozen_maps
from edgekd.distill.vl.lessons import Lessons, ask_teacher
from edgekd.distill.vl.split import VlSplit, split_examples, spread
from edgekd.distill.vl.student import Joint, VlStudent
from edgekd.distill.vl.teacher_tokens import TokenTeacher, read_tokens
from edgekd.distill.vl.token_td import TokenMaps, confidence, token_td
from edgekd.version import __version__

_WARM_UP = 0.1
_LOG_EVERY = 50
_VAL_EXAMPLES = 1000


def train_vl(
    config: VlTrainConfig,
    out: Path,
    *,
    overwrite: bool = False,
    data: VlData | None = None,
    teacher: TokenTeacher | None = None,
) -> VlRun:
    """Train a student and write its run folder.

    Args:
        data: what `config` names, loaded already; None: loaded here. teacher: likewise.

    Raises:
        EdgekdError: anything the user can mend, before training starts wherever possible.
    """
    with growing(out, RUN, overwrite=overwrite):
        return _train(config, out, data, teacher)


def _train(
    config: VlTrainConfig, out: Path, data: VlData | None, teacher: TokenTeacher | None
) -> VlRun:
    data = data or load_vl_data(config.task, config.data, shifted=config.test_domain != "none")
    split = split_examples(
        data, test_domain=config.test_domain, fraction=config.fraction, seed=config.split_seed
    )
    if not config.distil:
        teacher = None
    elif teacher is None:
        teacher = read_tokens(load_teacher(config.teacher))
    limit = min(teacher.context, 77) if teacher else 77
    length = tokens.length_of(data.texts, limit)
    torch.manual_seed(config.seed)
    # Only words that train get rows: another word's row would stay random, and cost a device memory.
    ids = tokens.tokenize(data.texts, length)
    rows = tokens.token_rows(ids[torch.from_numpy(np.unique(data.text_of[split.train]))])
    student, preprocess, grid = build_student(config, rows, length, len(data.answers))
    reader = make_reader(data, preprocess, length)
    clear(out, RUN, marker=False)
    write_json(out / "config.json", config.model_dump(mode="json"))
    split.images.write(out / "split.json")
    tests = f"{len(split.id_test):,} test, {len(split.ood_test):,} test unseen"
    say(
        f"{data.name}: {len(split.train):,} examples on {split.train_images:,} pictures train, {tests} "
        f"({config.control})"
    )
    started = time.monotonic()
    lessons = _lessons(config, teacher, reader, split, grid)
    ready = time.monotonic()
    _fit(config, student, reader, split, lessons, out / "metrics.jsonl")
    seconds = time.monotonic() - ready
    save_weights(student, out / WEIGHTS)
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
        "counts": {
            part: len(getattr(split, part)) for part in ("train", "val", "id_test", "ood_test")
        },
        "train_pictures": split.train_images,
        "teacher_seconds": round(ready - started, 2),
        "train_seconds": round(seconds, 2),
        "selection": "last weights",
        "val_accuracy": accuracy(
            student, reader, spread(split.val, _VAL_EXAMPLES), frozen=config.freeze_backbone
        ),
    }
    write_json(out / RECORD, record)
    return load_vl_run(out)


def _lessons(
    config: VlTrainConfig,
    teacher: TokenTeacher | None,
    reader: Reader,
    split: VlSplit,
    grid: tuple[int, int],
) -> Lessons | None:
    if teacher is None:
        return None
    patches = config.select != "none" and not config.blind
    return ask_teacher(teacher, reader, split.train, grid if patches else None)


def _fit(
    config: VlTrainConfig,
    student: VlStudent,
    reader: Reader,
    split: VlSplit,
    lessons: Lessons | None,
    metrics: Path,
) -> None:
    maps = TokenMaps(config.width, lessons.pooled_image.shape[1]) if lessons else None
    trained = nn.ModuleList([student, *([maps] if maps else [])])
    if config.freeze_backbone and student.backbone is not None:
        student.backbone.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        param_groups_weight_decay(trained, 0.05), lr=config.lr, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config.steps))
    look = _looks(config, student, reader, split)
    train_mode(
        student,
        frozen_statistics=config.pretrained != "scratch" or config.student_weights is not None,
    )
    random = torch.Generator().manual_seed(config.seed)
    with open(metrics, "w", encoding="utf-8") as log:
        for step in range(config.steps):
            indices = split.train[order(len(split.train), config.batch_size, config.seed, step)]
            labels = torch.from_numpy(reader.data.labels[indices])
            joint = student.read(look(reader.data.image_of[indices]), reader.texts(indices))
            loss, values = _loss(config, joint, labels, indices, reader.data, lessons, maps, random)
            for name, value in values.items():
                if not math.isfinite(value):
                    files = ", ".join(
                        reader.data.images.ids[i] for i in reader.data.image_of[indices][:3]
                    )
                    raise EdgekdError(
                        f"The term {name} is {value} at step {step} (pictures {files}, …).",
                        "Lower --lr.",
                    )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if (step + 1) % _LOG_EVERY == 0 or step + 1 == config.steps:
                log.write(
                    json.dumps({"step": step + 1, **{n: round(v, 5) for n, v in values.items()}})
                    + "\n"
                )
    student.eval()


def _looks(
    config: VlTrainConfig, student: VlStudent, reader: Reader, split: VlSplit
) -> Callable[[NDArray[np.int64]], Tensor]:
    """Pictures of a batch → what the backbone sees, float `[B, P, c]`."""
    if config.freeze_backbone:
        pictures = np.unique(reader.data.image_of[split.train])
        maps = frozen_maps(student, reader, pictures)
        return lambda wanted: maps[torch.from_numpy(np.searchsorted(pictures, wanted))]
    store = training_store(reader)
    return lambda wanted: student.look(torch.from_numpy(np.array(store.batch(wanted))))


def _loss(
    config: VlTrainConfig,
    joint: Joint,
    labels: Tensor,
    indices: NDArray[np.int64],
    data: VlData,
    lessons: Lessons | None,
    maps: TokenMaps | None,
    random: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    task = cross_entropy(joint.logits, labels, reduction="none")  # [B]
    loss = weighted_mean(task)
    values = {"ce": loss.item()}
    if lessons is not None and maps is not None:
        if config.shuffle_teacher:
            shown = torch.roll(torch.from_numpy(indices), 1).numpy()
            asked = lessons.tokens_of(shown, torch.from_numpy(data.labels[shown]))
        else:
            shown, asked = indices, lessons.tokens_of(indices, labels)
        term = token_td(
            own_rows(joint, labels, data.task == "choice"),
            asked,
            maps,
            select=config.select,
            ratio=config.ratio,
            pooled=config.pooled,
            kind=config.distance,
            generator=random,
        )
        truth = torch.from_numpy(data.truth[shown])
        counts = confidence(config.confidence, lessons.logits(shown), truth, (-task).exp().detach())
        distilled = weighted_mean(term, confidence=counts)
        values["token_td"] = distilled.item()
        loss = loss + config.weight * distilled
    return loss, values


def own_rows(joint: Joint, labels: Tensor, choice: bool) -> Joint:
    """The hidden states of each example; of a `choice` those of the right candidate."""
    if not choice:
        return joint
    count = joint.logits.shape[1]
    rows = torch.arange(len(labels)) * count + labels
    return Joint(joint.logits, joint.cls[rows], joint.patches[rows], joint.text[rows])


def train_mode(student: VlStudent, *, frozen_statistics: bool) -> None:
    """Training mode, with BatchNorm's statistics as they are where the backbone was pretrained."""
    student.train()
    for module in student.modules():
        if frozen_statistics and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _rate(step: int, steps: int) -> float:
    """A linear warm-up, then half a cosine down to 0."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
