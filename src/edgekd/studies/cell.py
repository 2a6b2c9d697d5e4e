"""One cell of a study: train a student, test it, and record which images it classifies correctly.

`--jobs` starts this module as a program (`python -m edgekd.studies.cell FOLDER CELL …`) to run one cell of a planned
study in a separate process.

The oracle (`edgekd study --oracle`) is the best accuracy of a run's weights on its test images. During training,
`watch` tests the weights on all unseen images and saves the best result in the run's folder. No other number uses it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from torch import nn

from edgekd.configs.train import TrainConfig, read_config
from edgekd.core.errors import EdgekdError, Stopped
from edgekd.core.folders import RUN, clear
from edgekd.core.readers import parse_json, read_arrays
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.subsets import left_to_test, take_shots, unseen_test
from edgekd.distill.classification.load_run import LoadedRun, load_run
from edgekd.distill.classification.predict import predict_all, student_predict
from edgekd.distill.classification.task import Classification
from edgekd.distill.models.students import Student
from edgekd.distill.train import Callback, train
from edgekd.evaluation.few_shot import cached_scores, can_zero_shot, new_vectors, student_scores
from edgekd.studies.plan import Plan, cell_config, with_description_file
from edgekd.studies.store import Cell, Done, Outcome, Store, write_arrays

ID, OOD, ORACLE = "id", "ood", "oracle"
"""Measures: in-domain accuracy, unseen accuracy (k-shot: unseen classes after fine-tuning), and the oracle's."""
ZERO_SHOT, RETRIEVAL, ID_TUNED = "zero_shot", "retrieval", "id_tuned"
RETRIEVAL_TEACHER = "retrieval_teacher"
"""Measures of the k-shot protocol, besides `id` (seen classes before fine-tuning) and `ood`."""
TUNING = 20 / 90
"""Ratio of fine-tuning steps to training steps (Li et al., ICCV 2023: 20 epochs after 90)."""
ORACLE_FILE = "oracle.npz"
_OF_A_CELL = ("recipe", "seed", "test_domain", "unseen_classes", "label_fraction", "shots", "adapt")
"""Settings that differ between the cells of a study."""
_AGAIN = "Train the run again with --overwrite."


def run_cell(store: Store, cell: Cell, config: TrainConfig, *, keep: bool, oracle: bool) -> None:
    """Train, test and record a cell. An interrupted training is resumed.

    Args:
        config: the settings of its recipe, without those of the cell.
        keep: keep the run folder under `runs/`.
        oracle: also test on the unseen images during training.
    """
    folder = store.folder / "runs" / cell.key
    if cell.shots:
        outcomes, facts = shots_outcomes(store, cell, config)
    else:
        run = trained(cell_config(config, cell, folder), watch if oracle else None)
        outcomes, facts = run_outcomes(run, oracle=oracle)
    store.add(Done(cell, outcomes, facts))
    if not keep:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a run, except files in its folder that edgekd did not write."""
    if folder.is_dir():
        clear(folder, RUN)
        with contextlib.suppress(OSError):
            folder.rmdir()


def trained(config: TrainConfig, callback: Callback | None = None) -> LoadedRun:
    """Return the run with these settings in `config.out`; train or resume it if it is not finished.

    Raises:
        EdgekdError: the run in `config.out` has other settings.
    """
    folder = config.folder
    begun = (folder / "config.json").is_file()
    if begun:
        stored = read_config(folder / "config.json")
        if other := [name for name in _OF_A_CELL if getattr(stored, name) != getattr(config, name)]:
            raise EdgekdError(
                f"The run at {folder} does not belong to this cell: its setting {other[0]} differs.",
                "Move that folder away; the cell is then trained again.",
            )
    if not (folder / "run.json").is_file():
        train(TrainConfig(out=folder, resume=True) if begun else config, callback)
    return load_run(folder)


def run_outcomes(loaded: LoadedRun, *, oracle: bool) -> tuple[dict[str, Outcome], dict[str, Any]]:
    """Return a run's facts and its outcomes on its own tests and, with a text head, on its unseen classes."""
    images, split = loaded.data()
    parts = {"val": split.val, ID: split.id_test, OOD: split.ood_test}
    outcomes = {name: _tested(loaded, images, part) for name, part in parts.items() if len(part)}
    unseen = loaded.config.unseen_classes
    if unseen and can_zero_shot(loaded):
        whole = load_images(loaded.run.data)
        indices = unseen_test(whole, unseen)
        scores = student_scores(loaded, whole, indices, new_vectors(loaded, unseen))
        outcomes[OOD] = _among(scores, whole, indices, unseen)
    facts = _facts(loaded)
    if oracle and (found := oracle_of(loaded, outcomes[OOD])) is not None:
        outcomes[ORACLE] = found[0]
        facts |= found[1]
    return outcomes, facts


def shots_outcomes(
    store: Store, cell: Cell, config: TrainConfig
) -> tuple[dict[str, Outcome], dict[str, Any]]:
    """Return the outcomes of a cell of the k-shot protocol, and the facts of its two runs.

    The base run is trained on the seen classes and shared by the cells of all numbers of shots. The images of unseen
    classes are then used in two ways (Li et al., ICCV 2023): retrieval caches them without training, and fine-tuning
    continues from the base run with all classes and these images.
    """
    before = dataclasses.replace(cell, shots=0)
    folder = store.folder / "runs" / before.key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # parallel cells wait for one training
        base = trained(cell_config(config, before, folder))
    whole, unseen = load_images(config.data), config.unseen_classes
    shots = take_shots(whole, unseen, cell.shots, config.split_seed)
    left = left_to_test(whole, unseen, shots)
    images, split = base.data()
    texts = new_vectors(base, unseen) if can_zero_shot(base) else None
    scores = {RETRIEVAL: cached_scores(base, whole, shots, left, unseen, texts)}
    if texts is not None:
        scores[ZERO_SHOT] = student_scores(base, whole, left, texts)
        scores[RETRIEVAL_TEACHER] = cached_scores(
            base, whole, shots, left, unseen, texts, "teacher"
        )
    tuned_config = cell_config(config, cell, store.folder / "runs" / cell.key).model_copy(
        update={
            "start": base.folder,
            "steps": max(1, round(TUNING * base.run.steps)),
            "epochs": None,
            "student_weights": None,
            "pretrained": None,
        }
    )
    tuned = trained(tuned_config)

    def after(images: ImageSet, indices: NDArray[np.int64], classes: Sequence[str]) -> Outcome:
        columns = [tuned.run.classes.index(name) for name in classes]
        scores = student_scores(tuned, images, indices, tuned.vectors)[:, columns]
        return _among(scores, images, indices, classes)

    outcomes = {
        ID: _tested(base, images, split.id_test),
        **{name: _among(found, whole, left, unseen) for name, found in scores.items()},
        OOD: after(whole, left, unseen),
        ID_TUNED: after(images, split.id_test, base.run.classes),
    }
    facts = _facts(base)
    facts["seconds"] += tuned.run.train_seconds
    return outcomes, facts | {"tuning_steps": tuned.run.steps}


def remove_bases(plan: Plan, folder: Path) -> None:
    """Remove the base runs that cells with shots share."""
    for cell in plan.cells:
        if cell.shots:
            base = folder / "runs" / dataclasses.replace(cell, shots=0).key
            _remove(base)
            Path(f"{base}.lock").unlink(missing_ok=True)


def _tested(loaded: LoadedRun, images: ImageSet, indices: NDArray[np.int64]) -> Outcome:
    scores = student_scores(loaded, images, indices, loaded.vectors)
    labels = images.labels[indices]
    return Outcome(scores.argmax(axis=1) == labels, labels)


def _among(
    scores: NDArray[np.float32],
    images: ImageSet,
    indices: NDArray[np.int64],
    classes: Sequence[str],
) -> Outcome:
    """Return the outcome of scores over `classes`, float `[len(indices), classes]`."""
    place = np.array([classes.index(name) if name in classes else -1 for name in images.classes])
    labels = place[images.labels[indices]]
    return Outcome(scores.argmax(axis=1) == labels, labels)


def _facts(loaded: LoadedRun) -> dict[str, Any]:
    """Return the facts about a run that the table shows besides its accuracy."""
    run = loaded.run
    return {
        "split": run.split_hash,
        "selection": run.selection,
        "steps": run.steps,
        "size": run.preprocess.size,
        "seconds": run.train_seconds,
        "data_wait_percent": run.data_wait_percent,
        "teacher_id": run.teacher_id,
    }


def watch(task: Classification, model: nn.Module, done: int, steps: tuple[int, ...]) -> None:
    """Test the weights after `done` steps on the unseen domain; a callback of `train`.

    Writes `oracle.npz` into the run's folder: `places`, the evaluation steps, int64; `seen`, the finished ones, int64;
    `step`, the best one (the earliest of equals); and `correct`, which images it classifies correctly, bool `[n]`.
    A resumed run may test a step twice, with the same weights.
    """
    assert isinstance(model, Student)
    images, indices = task.images, task.split.ood_test
    predict = student_predict(model, task.bank.head if task.bank else None)
    scores = predict_all(predict, images, indices, model.preprocess)
    right = scores.argmax(axis=1) == images.labels[indices]
    path = task.config.folder / ORACLE_FILE
    best, seen = {"step": np.int64(done), "correct": right}, {done}
    if path.exists():
        file = _read_oracle(path)
        seen |= set(file["seen"].tolist())
        if file["correct"].sum() >= right.sum():
            best = {"step": file["step"], "correct": file["correct"]}
    write_arrays(path, {"places": np.array(steps), "seen": np.array(sorted(seen)), **best})


def _read_oracle(path: Path) -> dict[str, NDArray[Any]]:
    file = read_arrays(path, "oracle's results", _AGAIN)
    kinds = {"places": ("iu", 1), "seen": ("iu", 1), "step": ("iu", 0), "correct": ("b", 1)}
    if file.keys() != kinds.keys() or any(
        file[name].dtype.kind not in kind or file[name].ndim != ndim
        for name, (kind, ndim) in kinds.items()
    ):
        raise EdgekdError(f"The oracle's results at {path} are of another run.", _AGAIN)
    return file


def oracle_of(loaded: LoadedRun, kept: Outcome) -> tuple[Outcome, dict[str, Any]] | None:
    """Return the best outcome, including `kept`, that of the selected weights, and facts about it.

    The facts are `oracle_places`, the number of tested steps, and `oracle_step`, the step whose weights were better
    than the selected ones (None: none were). Return None if a part of the training ran without `watch`.
    """
    path = loaded.folder / ORACLE_FILE
    if not path.exists():
        return None
    file = _read_oracle(path)
    if file["correct"].shape != kept.correct.shape:
        raise EdgekdError(f"The oracle's results at {path} are of another run.", _AGAIN)
    if not np.array_equal(file["places"], file["seen"]):
        return None
    better = file["correct"].sum() > kept.correct.sum()
    facts = {
        "oracle_places": len(file["places"]),
        "oracle_step": int(file["step"]) if better else None,
    }
    return (Outcome(file["correct"], kept.labels) if better else kept), facts


def main(folder: str, cell: str, keep: str, oracle: str) -> int:
    """Run one cell, given as JSON, of the study in `folder`; return the exit code."""
    store = Store(Path(folder))
    one = Cell(**parse_json(cell))
    try:
        settings = store.settings()
        try:
            own = settings["recipes"][one.recipe] | {"unseen_classes": settings["unseen_classes"]}
            config = TrainConfig.model_validate({"recipe": one.recipe} | own)
        except (KeyError, TypeError, ValueError) as error:
            raise EdgekdError(
                f"The study at {store.folder} is damaged.", "Start it again in another folder."
            ) from error
        config = with_description_file(config, store.folder)
        run_cell(store, one, config, keep=keep == "keep", oracle=oracle == "oracle")
    except (EdgekdError, Stopped) as error:
        print(f"error: {error.message} {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
