"""Evaluate a finished run on unseen classes, from texts or from a few images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.core.console import warn
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.subsets import left_to_test, take_shots
from edgekd.distill.classification.load_run import LoadedRun
from edgekd.distill.classification.predict import (
    predict_all,
    retrieval_scores,
    student_predict,
    student_vectors,
)
from edgekd.distill.inputs.batches import PixelStore, store_side
from edgekd.distill.inputs.cache import plain_embeddings
from edgekd.distill.inputs.views import ViewPolicy, render, view_params
from edgekd.distill.models.teachers import ClipTeacher, load_teacher
from edgekd.evaluation.gather import trained_of
from edgekd.evaluation.subjects import own_teacher

Keys = Literal["student", "teacher"]
"""Model that embeds the few-shot images for the cache."""
COPIES = 10
"""Number of cached teacher embeddings per image; the first is of the plain image (code of Li et al.)."""


def can_zero_shot(loaded: LoadedRun) -> bool:
    """Return whether the student has a text head, to which classes can be added."""
    return loaded.student.embeds and loaded.student.head is None and loaded.bank is not None


def new_vectors(loaded: LoadedRun, classes: Sequence[str]) -> Tensor:
    """Return text vectors of new classes in the student's space, float32 `[classes, D]`."""
    assert loaded.bank is not None
    teacher = load_teacher(loaded.config.teacher)
    bank = teacher.text_bank(classes, loaded.bank.templates, loaded.descriptions(classes))
    return dataclasses.replace(bank, text_centre=loaded.bank.text_centre).head


def student_scores(
    loaded: LoadedRun, images: ImageSet, indices: NDArray[np.int64], vectors: Tensor | None
) -> NDArray[np.float32]:
    """Return scores float32 `[len(indices), C]`, computed on the run's accelerator."""
    on_gpu = loaded.config.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    bank = None if vectors is None else vectors.to(device)
    predict = student_predict(loaded.student.to(device), bank)
    return predict_all(predict, images, indices, loaded.run.preprocess)


@torch.inference_mode()
def teacher_keys(loaded: LoadedRun, images: ImageSet, shots: NDArray[np.int64]) -> Tensor:
    """Return the teacher's embeddings of the images at `shots`, in the student's space.

    As in the code of Li et al., there is a key for the plain image and for each of nine augmented copies, ordered by
    copy: `[copies · len(shots), D]`. Here the copies are the run's views. A file of embeddings has one key per image.

    Raises:
        EdgekdError: the teacher is missing or has changed, or the student does not embed in its space.
    """
    if not can_zero_shot(loaded):
        raise EdgekdError(
            f"The student of {loaded.run.name} ({loaded.run.recipe}) has no text head in the teacher's space.",
            "Use the student's features as keys: --keys student.",
        )
    assert loaded.bank is not None
    teacher = own_teacher(loaded)
    found = [plain_embeddings(teacher, images, shots)]
    if isinstance(teacher, ClipTeacher):
        size = teacher.preprocess.size
        pixels = torch.from_numpy(PixelStore(images, store_side(size), None).batch(shots))
        keys = [images.keys[i] for i in shots]
        for copy in range(COPIES - 1):
            views = render(pixels, view_params(keys, [copy] * len(keys), ViewPolicy()), size)
            found += [teacher.embed_images(part) for part in torch.split(views, 64)]
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
    """Return scores for `classes` by retrieval from the images at `shots`, float32 `[len(indices), classes]`.

    Args:
        texts: as `new_vectors`, or None to use only the cache.
        keys: `student`: its embeddings of the plain images, or its features if it has no embeddings. `teacher`: see
            `teacher_keys`, which may raise.
    """
    place = {images.classes.index(name): number for number, name in enumerate(classes)}
    labels = torch.tensor([place[label] for label in images.labels[shots].tolist()])
    which = 1 if loaded.student.embeds else 0
    queries = student_vectors(loaded.student, images, indices)[which]
    if keys == "teacher":
        cached = teacher_keys(loaded, images, shots)
    else:
        cached = student_vectors(loaded.student, images, shots)[which]
    labels = labels.repeat(len(cached) // len(labels))
    return retrieval_scores(queries, cached, labels, len(classes), texts).numpy()


def few_shot_scores(
    loaded: LoadedRun, data: str | None, count: int, keys: Keys = "student"
) -> tuple[ImageSet, dict[str, NDArray[np.float32]]]:
    """Score images of new classes, the unseen ones of the run or all of `data`, with `count` shots per class.

    Returns:
        The tested images, and scores float32 `[N, C]` by method: `zero-shot` (if the student has a text head) and
        `retrieval`.

    Raises:
        EdgekdError: there are no new classes, or one has too few images.
    """
    images = load_images(data or loaded.run.data)
    if data:
        images = _without_trained(images, loaded)
    classes = images.classes if data else loaded.config.unseen_classes
    known = [name for name in classes if name in loaded.run.classes]
    if not classes or known:
        what = f"was trained on the class {known[0]}" if known else "has no unseen classes"
        raise EdgekdError(
            f"{loaded.run.name} {what}.",
            "Give images of new classes: --data DIR, or train with --set 'unseen_classes=[…]'.",
        )
    shots = take_shots(images, classes, count, loaded.config.split_seed)
    left = left_to_test(images, classes, shots)
    tested = images.at(left).of_classes(classes)
    scores, texts = {}, None
    if can_zero_shot(loaded):
        texts = new_vectors(loaded, classes)
        scores["zero-shot"] = student_scores(loaded, tested, np.arange(len(tested)), texts)
    scores["retrieval"] = cached_scores(loaded, images, shots, left, classes, texts, keys)
    return tested, scores


def _without_trained(images: ImageSet, loaded: LoadedRun) -> ImageSet:
    """Return the images that were not used in training, and warn about the number of the others."""
    seen = trained_of([loaded]).roles
    kept = np.flatnonzero([key not in seen for key in images.keys])
    if len(kept) == len(images):
        return images
    if not len(kept):
        raise EdgekdError(
            f"All images of {images.name} were used in training.",
            "Give images that were not.",
        )
    warn(f"{len(images) - len(kept)} images of {images.name}, used in training, are left out.")
    return images.at(kept)
