"""A finished run asked about classes that it never trained on: by the texts of their names, and by a few images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.core.console import warn
from edgekd.core.errors import EdgekdError, did_you_mean
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.subsets import left_to_test, take_shots
from edgekd.distill.batches import PixelStore, store_side
from edgekd.distill.classification.load import LoadedRun
from edgekd.distill.classification.predict import (
    predict_all,
    retrieval_scores,
    student_predict,
    student_vectors,
)
from edgekd.distill.teachers import ClipTeacher, load_teacher
from edgekd.distill.views import ViewPolicy, render, view_params
from edgekd.evaluation.gather import trained_of
from edgekd.evaluation.teacher_agreement import Parts, accuracy_rows, own_teacher, teacher_vectors
from edgekd.evaluation.trained import Trained

Keys = Literal["student", "teacher"]
"""Whose embeddings of the few images are kept."""
COPIES = 10
"""Of each image, where the teacher's are kept; the first is the plain one (Li et al.'s program)."""


def can_zero_shot(loaded: LoadedRun) -> bool:
    """Whether the student's head is the teacher's texts, which new classes have too; a trained head knows its own."""
    return loaded.student.embeds and loaded.student.head is None and loaded.bank is not None


def new_vectors(loaded: LoadedRun, classes: Sequence[str]) -> Tensor:
    """Text vectors of new classes in the space that the student learned, float32 `[classes, D]`."""
    assert loaded.bank is not None
    teacher = load_teacher(loaded.config.teacher)
    bank = teacher.text_bank(classes, loaded.bank.templates, loaded.descriptions(classes))
    return dataclasses.replace(bank, text_centre=loaded.bank.text_centre).head


def student_scores(
    loaded: LoadedRun, images: ImageSet, indices: NDArray[np.int64], vectors: Tensor | None
) -> NDArray[np.float32]:
    """float32 `[len(indices), C]`, on the accelerator that the run may use."""
    on_gpu = loaded.config.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    predict = student_predict(
        loaded.student.to(device), vectors.to(device) if vectors is not None else None
    )
    return predict_all(predict, images, indices, loaded.run.preprocess)


@torch.inference_mode()
def teacher_keys(loaded: LoadedRun, images: ImageSet, shots: NDArray[np.int64]) -> Tensor:
    """The teacher's embeddings of the images at `shots` as the student is to match them, `[copies · len(shots), D]`.

    As Li et al.'s program: the plain image and nine augmented copies, each a key of its own, copy after copy. The
    copies are the run's views in place of RandAugment(2, 9). A file of embeddings has one key per image.

    Raises:
        EdgekdError: the teacher is gone or another one, or the student does not embed in its space.
    """
    if not can_zero_shot(loaded):
        raise EdgekdError(
            f"The student of {loaded.run.name} ({loaded.run.recipe}) has no text head in the teacher's space.",
            "Take its own features as keys: --keys student.",
        )
    assert loaded.bank is not None
    teacher = own_teacher(loaded)
    found = [torch.from_numpy(teacher_vectors(teacher, images, shots))]
    if not isinstance(teacher, ClipTeacher):
        return loaded.bank.image_target(found[0])
    policy, size = ViewPolicy(), teacher.preprocess.size
    pixels = PixelStore(images, store_side(size), None).batch(shots)
    keys = [images.keys[i] for i in shots]
    for copy in range(COPIES - 1):
        views = render(
            torch.from_numpy(pixels), view_params(keys, [copy] * len(keys), policy), size
        )
        found.append(torch.cat([teacher.embed_images(part) for part in torch.split(views, 64)]))
    return loaded.bank.image_target(torch.cat(found))


def cached_scores(
    loaded: LoadedRun,
    images: ImageSet,
    shots: NDArray[np.int64],
    indices: NDArray[np.int64],
    classes: Sequence[str],
    texts: Tensor | None,
    keys: Keys = "student",
) -> NDArray[np.float32]:
    """Scores among `classes` by retrieval from the images at `shots`, float32 `[len(indices), classes]`.

    Args:
        texts: as `new_vectors`, or None for the cache alone.
        keys: `student`: its embeddings of the plain images, or its features where it does not embed. `teacher`: see
            `teacher_keys`.

    Raises:
        EdgekdError: as `teacher_keys`.
    """
    place = {images.classes.index(name): number for number, name in enumerate(classes)}
    labels = torch.tensor([place[label] for label in images.labels[shots].tolist()])
    which = 1 if loaded.student.embeds else 0
    cached = teacher_keys(loaded, images, shots) if keys == "teacher" else None
    if cached is None:
        cached = student_vectors(loaded.student, images, shots)[which]
    queries = student_vectors(loaded.student, images, indices)[which]
    labels = labels.repeat(len(cached) // len(labels))
    return retrieval_scores(queries, cached, labels, len(classes), texts).numpy()


def without_trained(images: ImageSet, trained: Trained) -> ImageSet:
    """The images whose content training has not seen; the others are counted aloud.

    Raises:
        EdgekdError: none is left.
    """
    kept = np.flatnonzero([key not in trained.roles for key in images.keys])
    if len(kept) == len(images):
        return images
    if not len(kept):
        raise EdgekdError(
            f"The run has seen all images of {images.name} in training.",
            "Give images that it did not see.",
        )
    warn(f"{len(images) - len(kept)} images of {images.name} are left out: the run has seen them.")
    return images.at(kept)


def few_rows(
    loaded: LoadedRun, data: str | None, count: int, keys: str = "student"
) -> list[dict[str, Any]]:
    """Accuracy per domain on new classes, of zero-shot and of retrieval from `count` images of each.

    The classes are those that the run left out, or all of `data`; which images are cached follows from their contents
    and the run's split seed, and the others are tested.

    Args:
        keys: `student` or `teacher`, whose embeddings are cached; see `cached_scores`.

    Returns:
        Rows as `accuracy_rows` with the subjects `zero-shot` (where the student has a text head) and `retrieval`.

    Raises:
        EdgekdError: no new classes, or one with too few images.
    """
    if keys not in get_args(Keys):
        raise EdgekdError(f'There are no keys of a "{keys}".', did_you_mean(keys, get_args(Keys)))
    images = load_images(data or loaded.run.data)
    if data:
        images = without_trained(images, trained_of([loaded]))
    classes = images.classes if data else loaded.config.unseen_classes
    known = [name for name in classes if name in loaded.run.classes]
    if not classes or known:
        raise EdgekdError(
            f"{loaded.run.name} trained on the class {known[0]}."
            if known
            else f"{loaded.run.name} left no class out.",
            "Give images of new classes: --data DIR, or train with --set 'unseen_classes=[…]'.",
        )
    shots = take_shots(images, classes, count, loaded.config.split_seed)
    left = left_to_test(images, classes, shots)
    asked = images.at(left).of_classes(classes)
    everything = np.arange(len(asked))
    texts = new_vectors(loaded, classes) if can_zero_shot(loaded) else None
    rows: list[dict[str, Any]] = []
    parts: Parts = [("unseen", everything)]
    if texts is not None:
        rows += accuracy_rows(
            "zero-shot", student_scores(loaded, asked, everything, texts), asked, everything, parts
        )
    scores = cached_scores(loaded, images, shots, left, classes, texts, cast(Keys, keys))
    return rows + accuracy_rows("retrieval", scores, asked, everything, parts)
