"""The runs of a study's cells: trained or read back, and asked about images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.configs.train import TrainConfig
from edgekd.core.manifest import Run
from edgekd.data.image_set import ImageSet
from edgekd.distill.classification.load import LoadedRun, load_run
from edgekd.distill.train import Callback, train
from edgekd.evaluation.few_shot import student_scores
from edgekd.studies.store import Outcome


def trained(config: TrainConfig, callback: Callback | None = None) -> LoadedRun:
    """The run of these settings in `config.out`: read if it is finished, resumed if it is not, else trained.

    Args:
        callback: called with the weights during training; see `edgekd.distill.train.train`.
    """
    folder = config.out
    assert folder is not None
    if not (folder / "run.json").is_file():
        if (folder / "config.json").is_file():
            config = TrainConfig(out=folder, resume=True)
        train(config, callback)
    return load_run(folder)


def asked(loaded: LoadedRun, images: ImageSet, indices: NDArray[np.int64]) -> Outcome:
    """Which of these images the student classifies rightly."""
    scores = student_scores(loaded, images, indices, loaded.vectors)
    labels = images.labels[indices]
    return Outcome(scores.argmax(axis=1) == labels, labels)


def chosen_among(
    scores: NDArray[np.float32],
    images: ImageSet,
    indices: NDArray[np.int64],
    classes: Sequence[str],
) -> Outcome:
    """Which of these images have their highest score, float `[len(indices), classes]`, at their own class."""
    place = np.array([classes.index(name) if name in classes else -1 for name in images.classes])
    labels = place[images.labels[indices]]
    return Outcome(scores.argmax(axis=1) == labels, labels)


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
