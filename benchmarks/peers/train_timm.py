"""Train with timm's logit distillation. Its train.py is not in the package, so this loop uses timm's functions.

python benchmarks/peers/train_timm.py --assets ASSETS --pictures DIR --out DIR
"""

from __future__ import annotations

from itertools import cycle

import timm.data
from setting import (
    BATCH,
    DECAY,
    LABEL_WEIGHT,
    LR,
    MEAN,
    SIZE,
    STD,
    TEMPERATURE,
    WARMUP,
    Clock,
    Teacher,
    arguments,
    finish_timm,
    make_student,
)  # fmt: skip
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.task import LogitDistillationTask
from torch import nn


def main() -> None:
    given = arguments()
    clock = Clock(given)
    pictures = timm.data.create_dataset("", root=str(given.pictures / "train"))
    loader = timm.data.create_loader(
        pictures, (3, SIZE, SIZE), BATCH, is_training=True, mean=MEAN, std=STD, num_workers=0,
        use_prefetcher=False, persistent_workers=False, interpolation="bicubic",
    )  # fmt: skip
    classes = sorted(pictures.reader.class_to_idx)
    student = make_student(given.assets, len(classes))
    task = LogitDistillationTask(
        student, Teacher(given.assets, classes), nn.CrossEntropyLoss(),
        distill_loss_weight=1 - LABEL_WEIGHT, task_loss_weight=LABEL_WEIGHT, temperature=TEMPERATURE,
    ).train()  # fmt: skip
    optimizer = create_optimizer_v2(student, "adamw", lr=LR, weight_decay=DECAY)
    warmup = round(WARMUP * given.steps)
    schedule = CosineLRScheduler(
        optimizer, given.steps, warmup_t=warmup, warmup_lr_init=1e-6, t_in_epochs=False
    )
    batches = (batch for _ in cycle([0]) for batch in loader)
    for done in range(1, given.steps + 1):
        images, labels = next(batches)
        loss = task(images, labels)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step_update(done)
        clock.step(done)
        clock.snapshot(done, student.state_dict)
    finish_timm(given, "timm", clock, student)


if __name__ == "__main__":
    main()
