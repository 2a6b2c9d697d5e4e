"""One cell of a study: train a student, ask it about its test images, remember which it got right.

Run as a program (`python -m edgekd.studies.cell FOLDER KEY`), it does one cell of a planned study in a process of its
own; `--jobs` starts it so.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.config import TrainConfig
from edgekd.data import ImageSet, load_images
from edgekd.distill.descriptions import descriptions_for
from edgekd.distill.load import LoadedRun, load_run
from edgekd.distill.predict import predict_all, student_predict
from edgekd.distill.teacher import load_teacher
from edgekd.distill.train import train
from edgekd.errors import EdgekdError
from edgekd.manifest import Run
from edgekd.scarce import unseen_test
from edgekd.studies.plan import Cell, cell_config
from edgekd.studies.store import Done, Outcome, Store


def run_cell(store: Store, cell: Cell, config: TrainConfig, *, keep: bool) -> None:
    """Train, test and record a cell; a training that was killed goes on where it stopped.

    Args:
        config: the settings of its recipe, without what the cell adds.
        keep: keep the run folder under `runs/`.
    """
    folder = store.folder / "runs" / cell.key
    loaded = trained(cell_config(config, cell, folder))
    images, split = loaded.data()
    parts = {"val": split.val, "id": split.id_test, "ood": split.ood_test}
    outcomes = {name: asked(loaded, images, part) for name, part in parts.items() if len(part)}
    if config.unseen_classes and can_zero_shot(loaded):
        outcomes["ood"] = zero_shot(loaded, load_images(config.data))
    store.add(Done(cell, outcomes, facts_of(loaded.run)))
    if not keep:
        shutil.rmtree(folder)


def trained(config: TrainConfig) -> LoadedRun:
    """The run of these settings in `config.out`: read if it is finished, resumed if it is not, else trained."""
    folder = config.out
    assert folder is not None
    if not (folder / "run.json").is_file():
        if (folder / "config.json").is_file():
            config = TrainConfig(out=folder, resume=True)
        elif folder.exists():  # killed before it had settings
            shutil.rmtree(folder)
        train(config)
    return load_run(folder)


def asked(loaded: LoadedRun, images: ImageSet, indices: NDArray[np.int64]) -> Outcome:
    """Which of these images the student classifies rightly."""
    scores = student_scores(loaded, images, indices, loaded.vectors)
    labels = images.labels[indices]
    return Outcome(scores.argmax(axis=1) == labels, labels)


def can_zero_shot(loaded: LoadedRun) -> bool:
    """Whether the student's head is the teacher's texts, which new classes have too; a trained head knows its own."""
    return loaded.student.embeds and loaded.student.head is None and loaded.bank is not None


def zero_shot(loaded: LoadedRun, images: ImageSet) -> Outcome:
    """The student on the unseen classes of `images`, choosing among these by their texts."""
    unseen = loaded.config.unseen_classes
    indices = unseen_test(images, unseen)
    scores = student_scores(loaded, images, indices, unseen_vectors(loaded))
    place = np.array([unseen.index(name) if name in unseen else -1 for name in images.classes])
    labels = place[images.labels[indices]]
    return Outcome(scores.argmax(axis=1) == labels, labels)


def unseen_vectors(loaded: LoadedRun) -> Tensor:
    """Text vectors of the unseen classes in the space that the student learned, float32 `[unseen, D]`."""
    assert loaded.bank is not None
    config = loaded.config
    unseen = config.unseen_classes
    teacher = load_teacher(config.teacher)
    described = descriptions_for(config.descriptions, unseen) if config.descriptions else None
    bank = teacher.text_bank(unseen, loaded.bank.templates, described)
    return dataclasses.replace(bank, text_centre=loaded.bank.text_centre).head


def student_scores(
    loaded: LoadedRun, images: ImageSet, indices: NDArray[np.int64], vectors: Tensor | None
) -> NDArray[np.float32]:
    """float32 `[len(indices), C]`, on the accelerator that the run may use."""
    on_gpu = loaded.config.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    predict = student_predict(loaded.student.to(device), vectors.to(device) if vectors is not None else None)
    return predict_all(predict, images, indices, loaded.run.preprocess)


def facts_of(run: Run) -> dict[str, Any]:
    """What the table says about a run besides its accuracy."""
    return {
        "split": run.split_hash,
        "selection": run.selection,
        "steps": run.steps,
        "size": run.preprocess.size,
        "seconds": run.train_seconds,
        "data_wait_percent": run.data_wait_percent,
        "teacher_id": run.teacher_id,
    }


def main(folder: str, cell: str, keep: str) -> int:
    """One cell of the study in `folder`; the cell as JSON."""
    store = Store(Path(folder))
    one = Cell(**json.loads(cell))
    try:
        settings = store.settings()
        config = TrainConfig.model_validate(
            settings["recipes"][one.recipe] | {"unseen_classes": settings["unseen_classes"]}
        )
        run_cell(store, one, config, keep=keep == "keep")
    except EdgekdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
