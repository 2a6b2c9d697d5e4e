"""A cell of the k-shot protocol: one run on the seen classes, then a few images of the unseen ones in both ways.

Li et al., ICCV 2023: retrieval caches the images and trains nothing; fine-tuning goes on from the run, on the union of
its classes and the few images, for 20 epochs after 90.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from edgekd.configs.train import TrainConfig
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.subsets import left_to_test, take_shots
from edgekd.distill.classification.load import LoadedRun
from edgekd.evaluation.few_shot import cached_scores, can_zero_shot, new_vectors, student_scores
from edgekd.studies.numbers import ID, OOD
from edgekd.studies.plan import Cell, Plan, cell_config
from edgekd.studies.runs import asked, chosen_among, facts_of, trained
from edgekd.studies.store import Done, Outcome, Store

ZERO_SHOT, RETRIEVAL, ID_TUNED = "zero_shot", "retrieval", "id_tuned"
RETRIEVAL_TEACHER = "retrieval_teacher"
"""Measures besides `id` (seen classes before) and `ood` (unseen classes after fine-tuning)."""
TUNING = 20 / 90
"""Steps of fine-tuning for each step before it."""


def shots_cell(
    store: Store, cell: Cell, config: TrainConfig
) -> tuple[dict[str, Outcome], dict[str, Any]]:
    """What came of a cell, and the facts of its two runs."""
    base = _base(store, cell, config)
    whole = load_images(config.data)
    unseen = config.unseen_classes
    shots = take_shots(whole, unseen, cell.shots, config.split_seed)
    left = left_to_test(whole, unseen, shots)
    images, split = base.data()
    outcomes = {ID: asked(base, images, split.id_test)}
    texts = new_vectors(base, unseen) if can_zero_shot(base) else None
    if texts is not None:
        outcomes[ZERO_SHOT] = chosen_among(
            student_scores(base, whole, left, texts), whole, left, unseen
        )
    cached = cached_scores(base, whole, shots, left, unseen, texts)
    outcomes[RETRIEVAL] = chosen_among(cached, whole, left, unseen)
    if texts is not None:
        cached = cached_scores(base, whole, shots, left, unseen, texts, "teacher")
        outcomes[RETRIEVAL_TEACHER] = chosen_among(cached, whole, left, unseen)

    changes = {
        "start": base.folder,
        "steps": max(1, round(TUNING * base.run.steps)),
        "epochs": None,
        "student_weights": None,
        "pretrained": None,
    }
    tuned = trained(
        cell_config(config, cell, store.folder / "runs" / cell.key).model_copy(update=changes)
    )
    outcomes[OOD] = _among(tuned, whole, left, unseen)
    outcomes[ID_TUNED] = _among(tuned, images, split.id_test, base.run.classes)
    facts = facts_of(base.run)
    return outcomes, facts | {
        "seconds": facts["seconds"] + tuned.run.train_seconds,
        "tuning_steps": tuned.run.steps,
    }


def _base(store: Store, cell: Cell, config: TrainConfig) -> LoadedRun:
    """The run on the seen classes, which the cells of all numbers of shots share."""
    before = dataclasses.replace(cell, shots=0)
    folder = store.folder / "runs" / before.key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # cells side by side wait for one training
        return trained(cell_config(config, before, folder))


def _among(
    loaded: LoadedRun, images: ImageSet, indices: NDArray[np.int64], classes: Sequence[str]
) -> Outcome:
    columns = [loaded.run.classes.index(name) for name in classes]
    scores = student_scores(loaded, images, indices, loaded.vectors)[:, columns]
    return chosen_among(scores, images, indices, classes)


def remove_bases(plan: Plan, folder: Path) -> None:
    """Remove the runs that cells with shots have shared."""
    for cell in plan.cells:
        if cell.shots:
            base = folder / "runs" / dataclasses.replace(cell, shots=0).key
            shutil.rmtree(base, ignore_errors=True)
            Path(f"{base}.lock").unlink(missing_ok=True)


def on_common_images(plan: Plan, done: Done) -> Done:
    """The cell's answers about the images that are left after the largest number of shots of the study."""
    if not done.cell.shots:
        return done
    seed = plan.configs[done.cell.recipe].split_seed
    left = left_to_test(
        plan.images, plan.unseen, take_shots(plan.images, plan.unseen, done.cell.shots, seed)
    )
    common = np.isin(left, plan.tests[done.cell.table, done.cell.column].ood)
    outcomes = {
        name: outcome
        if name in (ID, ID_TUNED)
        else Outcome(outcome.correct[common], outcome.labels[common])
        for name, outcome in done.outcomes.items()
    }  # fmt: skip
    return dataclasses.replace(done, outcomes=outcomes)
