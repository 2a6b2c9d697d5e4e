"""A finished run asked about classes that it never trained on: by the texts of their names, and by a few images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.data import ImageSet, load_images
from edgekd.distill.load import LoadedRun
from edgekd.distill.predict import predict_all, student_predict
from edgekd.distill.probe import student_vectors
from edgekd.distill.retrieval import retrieval_scores
from edgekd.distill.teacher import load_teacher
from edgekd.errors import EdgekdError
from edgekd.likeness import accuracy_rows
from edgekd.scarce import left_to_test, take_shots


def can_zero_shot(loaded: LoadedRun) -> bool:
    """Whether the student's head is the teacher's texts, which new classes have too; a trained head knows its own."""
    return loaded.student.embeds and loaded.student.head is None and loaded.bank is not None


def new_vectors(loaded: LoadedRun, classes: Sequence[str]) -> Tensor:
    """Text vectors of new classes in the space that the student learned, float32 `[classes, D]`."""
    assert loaded.bank is not None
    teacher = load_teacher(loaded.config.teacher)
    bank = teacher.text_bank(classes, loaded.bank.templates, loaded.described(classes))
    return dataclasses.replace(bank, text_centre=loaded.bank.text_centre).head


def student_scores(
    loaded: LoadedRun, images: ImageSet, indices: NDArray[np.int64], vectors: Tensor | None
) -> NDArray[np.float32]:
    """float32 `[len(indices), C]`, on the accelerator that the run may use."""
    on_gpu = loaded.config.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    predict = student_predict(loaded.student.to(device), vectors.to(device) if vectors is not None else None)
    return predict_all(predict, images, indices, loaded.run.preprocess)


def cached_scores(
    loaded: LoadedRun,
    images: ImageSet,
    shots: NDArray[np.int64],
    indices: NDArray[np.int64],
    classes: Sequence[str],
    texts: Tensor | None,
) -> NDArray[np.float32]:
    """Scores among `classes` by retrieval from the images at `shots`, float32 `[len(indices), classes]`.

    Keys are the student's embeddings of the plain images, or its features where it does not embed.

    Args:
        texts: as `new_vectors`, or None for the cache alone.
    """
    place = {images.classes.index(name): number for number, name in enumerate(classes)}
    labels = torch.tensor([place[label] for label in images.labels[shots].tolist()])
    which = 1 if loaded.student.embeds else 0
    keys, queries = (student_vectors(loaded.student, images, part)[which] for part in (shots, indices))
    return retrieval_scores(queries, keys, labels, len(classes), texts).numpy()


def few_rows(loaded: LoadedRun, data: str | None, count: int) -> list[dict[str, Any]]:
    """Accuracy per domain on new classes, of zero-shot and of retrieval from `count` images of each.

    The classes are those that the run left out, or all of `data`; which images are cached follows from their contents
    and the run's split seed, and the others are tested.

    Returns:
        Rows as `accuracy_rows` with the subjects `zero-shot` (where the student has a text head) and `retrieval`.

    Raises:
        EdgekdError: no new classes, or one with too few images.
    """
    images = load_images(data or loaded.run.data)
    classes = images.classes if data else loaded.config.unseen_classes
    known = [name for name in classes if name in loaded.run.classes]
    if not classes or known:
        raise EdgekdError(
            f"{loaded.run.name} trained on the class {known[0]}." if known else f"{loaded.run.name} left no class out.",
            "Give images of new classes: --data DIR, or train with --set 'unseen_classes=[…]'.",
        )
    shots = take_shots(images, classes, count, loaded.config.split_seed)
    left = left_to_test(images, classes, shots)
    asked = images.at(left).of_classes(classes)
    everything = np.arange(len(asked))
    texts = new_vectors(loaded, classes) if can_zero_shot(loaded) else None
    rows = []
    if texts is not None:
        rows += accuracy_rows("zero-shot", student_scores(loaded, asked, everything, texts), asked, everything)
    scores = cached_scores(loaded, images, shots, left, classes, texts)
    return rows + accuracy_rows("retrieval", scores, asked, everything)
