"""Train with edgekd, with the recipe `kd` or another one, and an empty cache.

    python benchmarks/peers/train_edgekd.py --assets ASSETS --pictures DIR --out DIR [--recipe edgekd]

There are as many views as the steps need. The seconds include the teacher's passes, but images/s does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from setting import BATCH, SIZE, STUDENT, Clock, arguments, finish
from torch import Tensor

from edgekd.configs.train import TrainConfig
from edgekd.data.image_set import load_images
from edgekd.distill.classification.load_run import load_run
from edgekd.distill.classification.predict import predict_all, student_predict
from edgekd.distill.progress import Progress
from edgekd.distill.train import train

PARTS = {"val": "val", "test": "id_test", "unseen": "ood_test"}


def count_steps(clock: Clock) -> None:
    """Measure the steps of the following trainings with a clock."""
    record = Progress.step

    def counted(self: Progress, number: int, *given: Any) -> None:
        record(self, number, *given)
        clock.step(number + 1)

    Progress.step = counted  # type: ignore[method-assign, assignment]


def main() -> None:
    given = arguments()
    images = load_images(str(given.assets / "pacs"))
    trains = len(list((given.pictures / "train").glob("*/*")))
    run = given.out / "run"
    settings = {
        "student": STUDENT, "student_weights": given.assets / "students" / f"{STUDENT}.safetensors",
        "data": str(given.assets / "pacs"), "test_domain": "sketch", "size": SIZE,
        "teacher": f"local-dir:{given.assets / 'teachers' / 'miniclip'}", "recipe": given.recipe,
        "batch_size": BATCH, "precision": "32-true", "logger": "csv", "overwrite": True, "out": run,
        "accelerator": "cpu", "steps": given.steps, "views": math.ceil(given.steps * BATCH / trains),
    }  # fmt: skip
    clock = Clock(given)
    count_steps(clock)
    train(
        TrainConfig.load(**settings, eval_every=given.every),
        lambda _, model, done, steps: clock.snapshot(done, model.state_dict),
    )
    loaded = load_run(run)
    _, split = loaded.data()

    def accuracy(state: Mapping[str, Tensor], part: str) -> float:
        loaded.student.load_state_dict(state)
        chosen = getattr(split, PARTS[part])
        scores = predict_all(
            student_predict(loaded.student, loaded.vectors), images, chosen, loaded.run.preprocess
        )
        return 100 * float(np.mean(scores.argmax(axis=1) == images.labels[chosen]))

    finish(given, f"edgekd {given.recipe}", clock, accuracy)


if __name__ == "__main__":
    main()
