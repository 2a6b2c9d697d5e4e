"""torchdistill's knowledge distillation. Its entry point is a script of its repository, so this calls its library.

python benchmarks/peers/train_torchdistill.py --assets ASSETS --pictures DIR --out DIR
"""

from __future__ import annotations

import torch
from setting import (
    BATCH,
    DECAY,
    LABEL_WEIGHT,
    LR,
    TEMPERATURE,
    WARMUP,
    Clock,
    Teacher,
    arguments,
    augmented,
    finish_timm,
    make_student,
)  # fmt: skip
from torchdistill.core.distillation import get_distillation_box


def main() -> None:
    given = arguments()
    clock = Clock(given)
    pictures = augmented(given)
    student = make_student(given.assets, len(pictures.classes))
    loss = {
        "key": "KDLoss",
        "kwargs": {
            "student_module_path": ".", "student_module_io": "output", "teacher_module_path": ".",
            "teacher_module_io": "output", "temperature": TEMPERATURE, "alpha": LABEL_WEIGHT,
        },
    }  # fmt: skip
    config = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": torch.utils.data.RandomSampler, "kwargs": {}},
            "kwargs": {"batch_size": BATCH, "num_workers": 0, "drop_last": True},
        },
        "val_data_loader": {},
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": LR, "weight_decay": DECAY}},
        "scheduler": {
            "key": "OneCycleLR",
            "kwargs": {"max_lr": LR, "total_steps": given.steps + 1, "pct_start": WARMUP},
            "scheduling_step": 1,
        },
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}},
        },
    }
    box = get_distillation_box(
        Teacher(given.assets, pictures.classes).eval(), student, {"train": pictures}, config,
        torch.device("cpu"), None, False, 1,
    )  # fmt: skip
    done = 0
    while done < given.steps:
        box.pre_epoch_process(epoch=0)
        for images, labels, extra in box.train_data_loader:
            box.pre_forward_process()
            box.post_forward_process(box.forward_process(images, labels, extra))
            done += 1
            clock.step(done)
            clock.snapshot(done, student.state_dict)
            if done == given.steps:
                break
    finish_timm(given, "torchdistill", clock, student)


if __name__ == "__main__":
    main()
