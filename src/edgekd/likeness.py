"""A run beside its teacher: which text vectors to use, how alike the two are, what the student's features are worth."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.benchmark.agreement import angle_degrees, m_neigh, m_rel, m_vlalign, recall_at
from edgekd.benchmark.metrics import macro, top1
from edgekd.data import ImageSet
from edgekd.distill.descriptions import descriptions_for
from edgekd.distill.load import LoadedRun
from edgekd.distill.predict import pixel_batches, predict_all, student_predict
from edgekd.distill.probe import probe_scores, student_vectors
from edgekd.distill.prompts import TextBank, templates_for
from edgekd.distill.teacher import ClipTeacher, Teacher, load_teacher
from edgekd.distill.views import plain
from edgekd.errors import EdgekdError
from edgekd.measure import suites_of
from edgekd.targets.session import open_session

NEIGHBOURS = 10
TEXTS = 5
RECALL = 5


def image_bank(
    loaded: LoadedRun | None, teacher: Teacher, images: ImageSet, prompts: str | None, descriptions: str | None
) -> TextBank:
    """Text vectors for these images' classes: the run's own where they fit, else made from `prompts`."""
    own = loaded.bank if loaded else None
    if own and not prompts and not descriptions and own.teacher_id == teacher.id:
        places = {name: place for place, name in enumerate(own.classes)}
        if set(images.classes) <= set(places):
            rows = own.vectors[[places[name] for name in images.classes]]
            return dataclasses.replace(own, classes=images.classes, vectors=rows)
    described = descriptions_for(descriptions, images.classes) if descriptions else None
    return teacher.text_bank(images.classes, templates_for(prompts or "photo", images.domains), described)


def accuracy_rows(
    subject: str, scores: NDArray[np.float32], images: ImageSet, indices: NDArray[np.int64]
) -> list[dict[str, Any]]:
    """Top-1 and macro accuracy per domain of scores `[len(indices), C]`."""
    rows = []
    for d, domain in enumerate(images.domains):
        here = images.domain_of[indices] == d
        if here.any():
            labels = images.labels[indices][here]
            rows.append(
                {
                    "subject": subject,
                    "domain": domain,
                    "n": int(here.sum()),
                    "top1": top1(scores[here], labels),
                    "macro": macro(scores[here], labels),
                }
            )
    return rows


def probe_rows(loaded: LoadedRun) -> list[dict[str, Any]]:
    """Linear probe and nearest neighbours on the run's own split."""
    images, split = loaded.data()
    test = np.concatenate([split.id_test if len(split.id_test) else split.val, split.ood_test])
    scores = probe_scores(loaded.student, images, split.train, test)
    return [row for kind, found in scores.items() for row in accuracy_rows(kind, found, images, test)]


def agreement_rows(loaded: LoadedRun, data: str | None, teacher: str | None) -> list[dict[str, Any]]:
    """The student and every artifact of the run against the teacher, on its test images or all of `data`."""
    run = loaded.run
    spec = teacher or run.teacher
    if spec == "none":
        raise EdgekdError(
            f"The recipe {run.recipe} has no teacher to agree with.", "Say which one to compare with: --teacher SPEC."
        )
    model = load_teacher(spec)
    if teacher is None and model.id != run.teacher_id:
        raise EdgekdError(f"{spec} is not the teacher {run.name} was trained with.", "Restore its weights.")
    rows = []
    for suite in suites_of(loaded, data, None):
        if suite.name == "val":  # there for temperatures alone
            continue
        images, indices = suite.images, suite.indices
        if set(images.classes) != set(run.classes):
            raise EdgekdError("These images have other classes than the run.", "Leave --data out.")
        bank = image_bank(loaded, model, images, None, None)
        told = _teacher_vectors(model, images, indices)  # [N, D]
        texts = told @ bank.vectors.numpy().T
        aimed_at = bank.image_target(torch.from_numpy(told)).numpy()
        columns = [run.classes.index(name) for name in images.classes]
        # Another teacher's embeddings live in another space.
        comparable = loaded.student.embeds and model.id == run.teacher_id
        embeddings = student_vectors(loaded.student, images, indices)[1].numpy() if comparable else None
        predict = student_predict(loaded.student, loaded.vectors)
        scored = {"student": predict_all(predict, images, indices, run.preprocess)[:, columns]}
        for folder in sorted(path.parent for path in loaded.folder.glob("artifacts/*/artifact.json")):
            if not folder.name.endswith(".failed"):
                session = open_session(folder, spinning=False)
                preprocess = session.artifact.preprocess
                scored[folder.name] = predict_all(session.run, images, indices, preprocess)[:, columns]
        for subject, scores in scored.items():
            for d, domain in enumerate(images.domains):
                here = images.domain_of[indices] == d
                if here.any():
                    own = embeddings[here] if embeddings is not None and subject == "student" else None
                    place = {"subject": subject, "domain": domain, "n": int(here.sum())}
                    rows.append(place | _compare(scores[here], texts[here], own, aimed_at[here]))
    return rows


def _compare(
    scores: NDArray[np.float32], texts: NDArray[np.float32], own: NDArray[np.float32] | None, told: NDArray[np.float32]
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "top1_agreement": float((scores.argmax(axis=1) == texts.argmax(axis=1)).mean()),
        "m_vlalign": m_vlalign(scores, texts, TEXTS),
    }
    names = ("m_rel", "recall", "m_neigh", "angle")
    if own is None:
        return found | dict.fromkeys(names)
    numbers = (m_rel(own, told), recall_at(own, told, RECALL), m_neigh(own, told, NEIGHBOURS), angle_degrees(own, told))
    return found | dict(zip(names, numbers, strict=True))


def _teacher_vectors(model: Teacher, images: ImageSet, indices: NDArray[np.int64]) -> NDArray[np.float32]:
    if not isinstance(model, ClipTeacher):
        return model.lookup([images.ids[i] for i in indices]).numpy()
    batches = pixel_batches(images, indices, model.preprocess)
    return np.concatenate([model.embed_images(plain(torch.from_numpy(pixels))).numpy() for pixels in batches])
