"""The oracle of `edgekd study --oracle`: the best that a run's weights ever were on the images it is tested on.

A run's training shows its weights on their way to `watch`, which tests them on all unseen images and keeps the best
answers in the run's folder. Nothing that a run does, and no number but this one, depends on them.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from edgekd.core.errors import EdgekdError
from edgekd.core.files import write_bytes
from edgekd.core.readers import read_arrays
from edgekd.distill.classification.load import LoadedRun
from edgekd.distill.classification.predict import predict_all, student_predict
from edgekd.distill.classification.task import Classification
from edgekd.distill.students import Student
from edgekd.studies.store import Outcome

_FILE = "oracle.npz"
_ARRAYS = ("places", "seen", "step", "correct")
_AGAIN = "Train the run again with --overwrite."


def watch(task: Classification, model: nn.Module, done: int, places: tuple[int, ...]) -> None:
    """Test the weights after `done` steps on the unseen domain; a callback of `train`.

    `oracle.npz` in the run's folder: `places` and those `seen`, int64; `step` of the best, the earliest of equals;
    which images it classifies rightly, `correct`, bool `[n]`. A resumed run may come by a place twice, with the same
    weights.
    """
    assert isinstance(model, Student)
    assert task.config.out is not None
    images, indices = task.images, task.split.ood_test
    predict = student_predict(model, task.bank.head if task.bank else None)
    scores = predict_all(predict, images, indices, model.preprocess)
    right = scores.argmax(axis=1) == images.labels[indices]
    path = task.config.out / _FILE
    best = {"step": np.int64(done), "correct": right}
    seen = {done}
    if path.exists():
        file = _read(path)
        seen |= set(file["seen"].tolist())
        if file["correct"].sum() >= right.sum():
            best = {"step": file["step"], "correct": file["correct"]}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, places=np.array(places), seen=np.array(sorted(seen)), **best)
    write_bytes(path, buffer.getvalue())


def _read(path: Path) -> dict[str, NDArray[Any]]:
    file = read_arrays(path, "oracle's answers", _AGAIN)
    if (
        set(file) != set(_ARRAYS)
        or any(file[name].dtype.kind not in "iu" for name in ("places", "seen", "step"))
        or any(file[name].ndim != 1 for name in ("places", "seen", "correct"))
        or file["step"].ndim
        or file["correct"].dtype != np.bool_
    ):
        raise _damaged(path)
    return file


def _damaged(path: Path) -> EdgekdError:
    return EdgekdError(f"The oracle's answers at {path} are of another run.", _AGAIN)


def oracle_of(loaded: LoadedRun, kept: Outcome) -> tuple[Outcome, dict[str, Any]] | None:
    """The best answers, those of the weights that the run kept (`kept`) among them, and facts about them.

    Returns:
        None if `watch` did not see every place: a part of the training ran without it. The facts: `oracle_places`, how
        many it saw; `oracle_step`, the steps after which the weights were better than those kept, None if never.
    """
    path = loaded.folder / _FILE
    if not path.exists():
        return None
    file = _read(path)
    places, seen, step, correct = (file[name] for name in _ARRAYS)
    if correct.shape != kept.correct.shape:
        raise _damaged(path)
    if not np.array_equal(places, seen):
        return None
    better = correct.sum() > kept.correct.sum()
    facts = {"oracle_places": len(places), "oracle_step": int(step) if better else None}
    return (Outcome(correct, kept.labels) if better else kept), facts
