"""Train with LightlyTrain: distillation without labels for half of the steps, then training with labels.

    python benchmarks/peers/train_lightly.py --assets ASSETS --pictures DIR --out DIR

Its own teachers are DINOv2 and DINOv3, whose weights it downloads. They are replaced by CLIP's image encoder. With
`model="timm/tf_efficientnet_lite0"`, its distillation and fine-tuning (`train_image_classification`) fail with "mat1
and mat2 shapes cannot be multiplied (32x320 and 1280x1280)", since they use the features before timm's last convolution
with the number of channels after it. `Encoder` uses those after it, and the second half is a plain torch loop.
"""

from __future__ import annotations

import math
import os
from itertools import islice

os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"

import lightly_train
import torch
from lightly_train._models.timm.timm import TIMMModelWrapper
from setting import (
    BATCH,
    DECAY,
    LR,
    MEAN,
    SIZE,
    STD,
    WARMUP,
    Clock,
    Teacher,
    arguments,
    augmented,
    finish_timm,
    make_student,
)  # fmt: skip
from torch import Tensor, nn
from torch.utils.data import DataLoader

SHARED = {
    "batch_size": BATCH, "num_workers": 0, "precision": "32-true", "accelerator": "cpu", "devices": 1,
    "overwrite": True,
}  # fmt: skip


class Encoder(TIMMModelWrapper):
    """A timm network that returns its last feature map."""

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": self._model.forward_features(x)}


class TeacherEncoder(Encoder):
    """The teacher on the student's tensors. It runs once per step, which the clock uses to count steps."""

    def __init__(self, teacher: Teacher, clock: Clock) -> None:
        super().__init__(teacher.visual.trunk)
        self.prepared, self.clock, self.steps = teacher.prepared, clock, 0

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        self.steps += 1
        self.clock.step(self.steps)
        return super().forward_features(self.prepared(x))


def main() -> None:
    given = arguments()
    clock = Clock(given)
    pictures = augmented(given)
    student = make_student(given.assets, len(pictures.classes))
    distils = given.steps // 2
    epochs = math.ceil(distils * BATCH / len(pictures))
    views = {"image_size": (SIZE, SIZE), "normalize": {"mean": MEAN, "std": STD}}
    lightly_train.pretrain(
        out=given.out / "distilled", data=given.pictures / "train", method="distillation", epochs=epochs,
        model=Encoder(student), transform_args=views, loggers={"tensorboard": {}},
        method_args={"teacher": TeacherEncoder(Teacher(given.assets, pictures.classes), clock)},
        trainer_args={"max_steps": distils}, **SHARED,
    )  # fmt: skip
    distilled = clock.images_per_second
    loader = DataLoader(pictures, BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=DECAY)
    labels_only = given.steps - distils
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, labels_only, pct_start=WARMUP)
    student.train().requires_grad_(True)
    for done, (images, labels) in enumerate(islice(loader, labels_only), distils + 1):
        loss = nn.functional.cross_entropy(student(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        clock.step(done)
        clock.snapshot(done, student.state_dict)
    clock.images_per_second = distilled
    finish_timm(given, "LightlyTrain", clock, student)


if __name__ == "__main__":
    main()
