"""A run beside its teacher: which text vectors to use, how alike the two are, what the student's features are worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.benchmark.evaluate.agreement import (
    angle_degrees,
    m_neigh,
    m_rel,
    m_vlalign,
    recall_at,
    squared_distance,
)
from edgekd.benchmark.evaluate.logits import columns_among
from edgekd.benchmark.evaluate.metrics import macro, top1
from edgekd.configs.benchmark import EvaluateConfig
from edgekd.core.console import warn
from edgekd.core.errors import EdgekdError, NotHere
from edgekd.data.image_set import ImageSet, load_images
from edgekd.distill.batches import pixel_batches
from edgekd.distill.classification.load import LoadedRun
from edgekd.distill.classification.predict import (
    predict_all,
    probe_scores,
    student_predict,
    student_vectors,
    teacher_predict,
)
from edgekd.distill.teachers import ClipTeacher, Teacher, load_teacher
from edgekd.distill.text_bank import TextBank, descriptions_for, templates_for
from edgekd.distill.views import plain
from edgekd.evaluation.gather import parts_of, suites_of
from edgekd.targets.session import Session, open_session

Scores = NDArray[np.float32]

NEIGHBOURS = 10
TEXTS = 5
RECALL = 5


def image_bank(
    loaded: LoadedRun | None,
    teacher: Teacher,
    images: ImageSet,
    prompts: str | None,
    descriptions: str | None,
) -> TextBank:
    """Text vectors for these images' classes: the run's own, or made as those were, unless told otherwise.

    Args:
        prompts: other templates than the run's, and then no descriptions but those given here.
        descriptions: other sentences than the run's, as `descriptions_for` takes them.
    """
    own = loaded.bank if loaded and loaded.bank and loaded.bank.teacher_id == teacher.id else None
    if own and not prompts and not descriptions:
        places = {name: place for place, name in enumerate(own.classes)}
        if set(images.classes) <= set(places):
            rows = own.vectors[[places[name] for name in images.classes]]
            return dataclasses.replace(own, classes=images.classes, vectors=rows)
    described = descriptions_for(descriptions, images.classes) if descriptions else None
    if own and loaded and not prompts and not descriptions:
        described = loaded.descriptions(images.classes)
    templates = (
        own.templates if own and not prompts else templates_for(prompts or "photo", images.domains)
    )
    return teacher.text_bank(images.classes, templates, described)


Parts = Sequence[tuple[str | None, NDArray[np.int64]]]
"""(part of a run, indices of its images), as `gather.parts_of` has them; the part of images without a run is None."""


def accuracy_rows(
    subject: str,
    scores: NDArray[np.float32],
    images: ImageSet,
    indices: NDArray[np.int64],
    parts: Parts,
) -> list[dict[str, Any]]:
    """Top-1 and macro accuracy per part and domain of scores `[len(indices), C]`."""
    rows = []
    for part, members in parts:
        inside = np.isin(indices, members)
        for d, domain in enumerate(images.domains):
            here = inside & (images.domain_of[indices] == d)
            if here.any():
                labels = images.labels[indices][here]
                rows.append(
                    {
                        "subject": subject,
                        "domain": domain,
                        "part": part,
                        "n": int(here.sum()),
                        "top1": top1(scores[here], labels),
                        "macro": macro(scores[here], labels),
                    }
                )
    return rows


def zero_shot_rows(loaded: LoadedRun | None, config: EvaluateConfig) -> list[dict[str, Any]]:
    """Return the accuracies of a teacher's zero-shot classifier on any images, and of a run's student."""
    if loaded and not config.data:
        loaded.check_labelled()
    images = loaded.images() if loaded and not config.data else load_images(config.data or "toy")
    spec = config.teacher or (loaded.run.teacher if loaded else "toy")
    everything = np.arange(len(images))
    parts: Parts = parts_of(loaded, images, config.data) if loaded else [(None, everything)]
    rows: list[dict[str, Any]] = []
    bank = None
    if spec != "none":
        model = load_teacher(spec)
        bank = image_bank(loaded, model, images, config.prompts, config.descriptions)
        if isinstance(model, ClipTeacher):
            scores = predict_all(teacher_predict(model, bank), images, everything, model.preprocess)
        else:
            scores = model.lookup(images.ids).numpy() @ bank.vectors.numpy().T
        rows += accuracy_rows("teacher", scores, images, everything, parts)
    if loaded:
        vectors, columns = loaded.vectors, list(range(len(images.classes)))
        unknown = not set(images.classes) <= set(loaded.run.classes)
        space = bank if bank is not None and bank.teacher_id == loaded.run.teacher_id else None
        if unknown and space is not None and loaded.student.embeds and loaded.student.head is None:
            # In the space the student learned, which may be the teacher's less its common part.
            vectors = dataclasses.replace(
                space, text_centre=loaded.bank.text_centre if loaded.bank else None
            ).head
        else:
            columns = columns_among(loaded.run.classes, images.classes, "the student").tolist()
        scores = predict_all(
            student_predict(loaded.student, vectors), images, everything, loaded.run.preprocess
        )
        rows += accuracy_rows("student", scores[:, columns], images, everything, parts)
    return rows


def probe_rows(loaded: LoadedRun) -> list[dict[str, Any]]:
    """Linear probe and nearest neighbours on the run's own split."""
    loaded.check_labelled()
    images, split = loaded.data()
    test = np.concatenate([split.id_test if len(split.id_test) else split.val, split.ood_test])
    scores = probe_scores(loaded.student, images, split.train, test)
    parts = parts_of(loaded, images, None)
    return [
        row
        for kind, found in scores.items()
        for row in accuracy_rows(kind, found, images, test, parts)
    ]


def agreement_rows(
    loaded: LoadedRun, data: str | None, teacher: str | None
) -> list[dict[str, Any]]:
    """The student and every artifact of the run against the teacher, on its test images or all of `data`."""
    run = loaded.run
    if (teacher or run.teacher) == "none":
        raise EdgekdError(
            f"The recipe {run.recipe} has no teacher to agree with.",
            "Say which one to compare with: --teacher SPEC.",
        )
    model = load_teacher(teacher) if teacher else own_teacher(loaded)
    rows = []
    sessions = _open_artifacts(loaded.folder)
    for suite in suites_of(loaded, data, None):
        if suite.name == "val":  # there for temperatures alone
            continue
        images, indices = suite.images, suite.indices
        part = {"ood": "unseen", "adapted": "adapted"}.get(suite.name.partition(":")[0], "test")
        if set(images.classes) != set(run.classes):
            raise EdgekdError("These images have other classes than the run.", "Leave --data out.")
        bank = image_bank(loaded, model, images, None, None)
        told = teacher_vectors(model, images, indices)  # [N, D]
        texts = told @ bank.vectors.numpy().T
        aimed_at = bank.image_target(torch.from_numpy(told)).numpy()
        # Another teacher's embeddings live in another space.
        comparable = model.id == run.teacher_id
        for subject, scores, embeddings in _answers(loaded, sessions, images, indices):
            for d, domain in enumerate(images.domains):
                here = images.domain_of[indices] == d
                if here.any():
                    own = embeddings[here] if embeddings is not None and comparable else None
                    place = {
                        "subject": subject,
                        "domain": domain,
                        "part": part,
                        "n": int(here.sum()),
                    }
                    rows.append(place | _compare(scores[here], texts[here], own, aimed_at[here]))
    return rows


def _open_artifacts(run: Path) -> dict[str, Session]:
    """The run's exported files by name; those whose runtime is not here are left out, and it is said."""
    found = {}
    for folder in sorted(path.parent for path in run.glob("artifacts/*/artifact.json")):
        if folder.name.endswith(".failed"):
            continue
        try:
            found[folder.name] = open_session(folder, spinning=False)
        except NotHere as reason:
            warn(f"{folder.name} is left out: {reason.message}")
    return found


def _answers(
    loaded: LoadedRun, sessions: Mapping[str, Session], images: ImageSet, indices: NDArray[np.int64]
) -> Iterator[tuple[str, Scores, Scores | None]]:
    """Subject, scores `[N, C]` in the order of the images' classes, and embeddings `[N, D]` of those that embed."""
    student, preprocess = loaded.student, loaded.run.preprocess
    columns = [loaded.run.classes.index(name) for name in images.classes]
    predict = student_predict(student, loaded.vectors)
    vectors = student_vectors(student, images, indices)[1].numpy() if student.embeds else None
    yield "student", predict_all(predict, images, indices, preprocess)[:, columns], vectors
    for name, session in sessions.items():
        columns = [session.artifact.classes.index(cls) for cls in images.classes]
        preprocess = session.artifact.preprocess
        if session.bank is None:
            yield name, predict_all(session.run, images, indices, preprocess)[:, columns], None
        else:
            vectors = predict_all(session.embed, images, indices, preprocess)
            yield name, session.bank.logits(vectors)[:, columns], vectors


def _compare(scores: Scores, texts: Scores, own: Scores | None, told: Scores) -> dict[str, Any]:
    found: dict[str, Any] = {
        "top1_agreement": float((scores.argmax(axis=1) == texts.argmax(axis=1)).mean()),
        "m_vlalign": m_vlalign(scores, texts, TEXTS),
    }
    names = ("m_rel", "recall", "m_neigh", "angle", "distance")
    if own is None:
        return found | dict.fromkeys(names)
    numbers = (
        m_rel(own, told),
        recall_at(own, told, RECALL),
        m_neigh(own, told, NEIGHBOURS),
        angle_degrees(own, told),
        squared_distance(own, told),
    )
    return found | dict(zip(names, numbers, strict=True))


def own_teacher(loaded: LoadedRun) -> Teacher:
    """The teacher of the run.

    Raises:
        EdgekdError: it is gone, or its weights are others by now.
    """
    model, run = load_teacher(loaded.run.teacher), loaded.run
    if model.id != run.teacher_id:
        raise EdgekdError(
            f"{run.teacher} is not the teacher {run.name} was trained with.", "Restore its weights."
        )
    return model


def teacher_vectors(
    model: Teacher, images: ImageSet, indices: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The teacher's embeddings of the plain images, `[len(indices), D]`."""
    if not isinstance(model, ClipTeacher):
        return model.lookup([images.ids[i] for i in indices]).numpy()
    batches = pixel_batches(images, indices, model.preprocess)
    return np.concatenate(
        [model.embed_images(plain(torch.from_numpy(pixels))).numpy() for pixels in batches]
    )
