"""`edgekd evaluate`: accuracy of a teacher and a student, their agreement, and probes of the student's features."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.benchmark.evaluate import agreement
from edgekd.benchmark.evaluate.metrics import macro, top1
from edgekd.benchmark.evaluate.predictions import columns_among
from edgekd.configs.benchmark import EvaluateConfig
from edgekd.core.console import warn
from edgekd.core.errors import EdgekdError, NotHere
from edgekd.core.manifest import newest_run
from edgekd.data.image_set import ImageSet, load_images
from edgekd.distill.classification.load_run import LoadedRun, load_run
from edgekd.distill.classification.predict import (
    predict_all,
    probe_scores,
    student_vectors,
)
from edgekd.distill.inputs.cache import plain_embeddings
from edgekd.distill.models.teachers import Teacher, load_teacher
from edgekd.distill.text_bank import TextBank, templates_for
from edgekd.distill.text_files import descriptions_for
from edgekd.evaluation.few_shot import can_zero_shot, few_shot_scores, student_scores
from edgekd.evaluation.gather import parts_of, suites_of
from edgekd.evaluation.subjects import artifact_folders, own_teacher
from edgekd.targets.session import open_session

Rows = list[dict[str, Any]]
Scores = NDArray[np.float32]
Parts = Sequence[tuple[str | None, NDArray[np.int64]]]
"""(part of a run, indices of its images), as in `gather.parts_of`; the part is None for images without a run."""
NEIGHBOURS = 10
TEXTS = 5
RECALL = 5


def evaluate_rows(config: EvaluateConfig) -> Rows:
    """Return one mapping per subject, part and domain; see `edgekd.evaluate`."""
    if not (config.agreement or config.probe or config.shots):
        return zero_shot_rows(load_run(config.run) if config.run else None, config)
    loaded = load_run(config.run or newest_run())
    if config.shots is not None:
        return few_rows(loaded, config)
    return agreement_rows(loaded, config) if config.agreement else probe_rows(loaded)


def zero_shot_rows(loaded: LoadedRun | None, config: EvaluateConfig) -> Rows:
    """Return the accuracies of a teacher's zero-shot classifier on any images, and of a run's student."""
    if loaded and not config.data:
        loaded.check_labelled()
    images = loaded.images() if loaded and not config.data else load_images(config.data or "toy")
    everything = np.arange(len(images))
    parts: Parts = parts_of(loaded, images, config.data) if loaded else [(None, everything)]
    rows: Rows = []
    spec, bank = config.teacher or (loaded.run.teacher if loaded else "toy"), None
    if spec != "none":
        model = load_teacher(spec)
        bank = image_bank(loaded, model, images, config.prompts, config.descriptions)
        scores = bank.zero_shot(plain_embeddings(model, images, everything)).numpy()
        rows += accuracy_rows("teacher", scores, images, everything, parts)
    if loaded:
        vectors, columns = loaded.vectors, list(range(len(images.classes)))
        unknown = not set(images.classes) <= set(loaded.run.classes)
        space = bank if bank is not None and bank.teacher_id == loaded.run.teacher_id else None
        if unknown and space is not None and can_zero_shot(loaded):
            # In the student's space, which may be mean-centred.
            centre = loaded.bank.text_centre if loaded.bank else None
            vectors = dataclasses.replace(space, text_centre=centre).head
        else:
            columns = columns_among(loaded.run.classes, images.classes, "the student").tolist()
        scores = student_scores(loaded, images, everything, vectors)[:, columns]
        rows += accuracy_rows("student", scores, images, everything, parts)
    return rows


def probe_rows(loaded: LoadedRun) -> Rows:
    """Return the accuracies of a linear probe and of nearest neighbours on the run's own split."""
    loaded.check_labelled()
    images, split = loaded.data()
    test = np.concatenate([split.id_test if len(split.id_test) else split.val, split.ood_test])
    parts, rows = parts_of(loaded, images, None), []
    for kind, scores in probe_scores(loaded.student, images, split.train, test).items():
        rows += accuracy_rows(kind, scores, images, test, parts)
    return rows


def few_rows(loaded: LoadedRun, config: EvaluateConfig) -> Rows:
    """Return the accuracies on new classes, of zero-shot (with a text head) and of retrieval from a few images."""
    assert config.shots is not None
    images, scores = few_shot_scores(loaded, config.data, config.shots, config.keys)
    everything, rows = np.arange(len(images)), []
    for subject, found in scores.items():
        rows += accuracy_rows(subject, found, images, everything, [("unseen", everything)])
    return rows


def agreement_rows(loaded: LoadedRun, config: EvaluateConfig) -> Rows:
    """Compare the student and every artifact of the run with the teacher, on its test images or all of `data`."""
    run = loaded.run
    if (config.teacher or run.teacher) == "none":
        raise EdgekdError(
            f"The recipe {run.recipe} has no teacher to agree with.",
            "Give a teacher to compare with: --teacher SPEC.",
        )
    model = load_teacher(config.teacher) if config.teacher else own_teacher(loaded)
    rows = []
    for suite in suites_of(loaded, config.data, None):
        if suite.name == "val":  # only for temperatures
            continue
        images, indices = suite.images, suite.indices
        part = {"ood": "unseen", "adapted": "adapted"}.get(suite.name.partition(":")[0], "test")
        if set(images.classes) != set(run.classes):
            raise EdgekdError("These images have other classes than the run.", "Omit --data.")
        bank = image_bank(loaded, model, images)
        teacher = plain_embeddings(model, images, indices).numpy()  # [N, D]
        texts = teacher @ bank.vectors.numpy().T
        targets = bank.image_target(torch.from_numpy(teacher)).numpy()
        # The embeddings of another teacher are in another space.
        comparable = model.id == run.teacher_id
        for subject, scores, embeddings in _predictions(loaded, images, indices):
            for d, domain in enumerate(images.domains):
                here = images.domain_of[indices] == d
                if here.any():
                    own = embeddings[here] if embeddings is not None and comparable else None
                    row = {"subject": subject, "domain": domain, "part": part, "n": int(here.sum())}
                    rows.append(row | _compare(scores[here], texts[here], own, targets[here]))
    return rows


def accuracy_rows(
    subject: str, scores: Scores, images: ImageSet, indices: NDArray[np.int64], parts: Parts
) -> Rows:
    """Return top-1 and macro accuracy per part and domain of scores `[len(indices), C]`."""
    rows = []
    for part, members in parts:
        inside = np.isin(indices, members)
        for d, domain in enumerate(images.domains):
            here = inside & (images.domain_of[indices] == d)
            if here.any():
                given = scores[here], images.labels[indices][here]
                row = {"subject": subject, "domain": domain, "part": part, "n": int(here.sum())}
                rows.append(row | {"top1": top1(*given), "macro": macro(*given)})
    return rows


def image_bank(
    loaded: LoadedRun | None,
    teacher: Teacher,
    images: ImageSet,
    prompts: str | None = None,
    descriptions: str | None = None,
) -> TextBank:
    """Return text vectors for the classes of these images: the run's own or, by default, made in the same way.

    Args:
        prompts: templates to use in place of the run's; the run's descriptions are then not used either.
        descriptions: sentences to use in place of the run's, as in `descriptions_for`.
    """
    own = loaded.bank if loaded and loaded.bank and loaded.bank.teacher_id == teacher.id else None
    described = descriptions_for(descriptions, images.classes) if descriptions else None
    if own and loaded and not prompts and not descriptions:
        places = {name: place for place, name in enumerate(own.classes)}
        if set(images.classes) <= set(places):
            rows = own.vectors[[places[name] for name in images.classes]]
            return dataclasses.replace(own, classes=images.classes, vectors=rows)
        described = loaded.descriptions(images.classes)
    templates = (
        own.templates if own and not prompts else templates_for(prompts or "photo", images.domains)
    )
    return teacher.text_bank(images.classes, templates, described)


def _predictions(
    loaded: LoadedRun, images: ImageSet, indices: NDArray[np.int64]
) -> Iterator[tuple[str, Scores, Scores | None]]:
    """Yield subject, scores `[N, C]` in the order of the images' classes, and embeddings `[N, D]` or None."""
    columns = [loaded.run.classes.index(name) for name in images.classes]
    scores, vectors = student_scores(loaded, images, indices, loaded.vectors), None
    if loaded.student.embeds:
        vectors = student_vectors(loaded.student, images, indices)[1].numpy()
    yield "student", scores[:, columns], vectors
    for folder in artifact_folders(loaded.folder):
        try:
            session = open_session(folder, spinning=False)
        except NotHere as reason:
            warn(f"{folder.name} is left out: {reason.message}")
            continue
        artifact, bank, vectors = session.artifact, session.bank, None
        columns = [artifact.classes.index(name) for name in images.classes]
        if bank is None:
            scores = predict_all(session.run, images, indices, artifact.preprocess)
        else:
            vectors = predict_all(session.embed, images, indices, artifact.preprocess)
            scores = bank.logits(vectors)
        yield folder.name, scores[:, columns], vectors


def _compare(scores: Scores, texts: Scores, own: Scores | None, targets: Scores) -> dict[str, Any]:
    """Return the measures of agreement; those of embeddings are None if there are no embeddings to compare."""
    found: dict[str, Any] = {
        "top1_agreement": float((scores.argmax(axis=1) == texts.argmax(axis=1)).mean()),
        "m_vlalign": agreement.m_vlalign(scores, texts, TEXTS),
    }
    if own is None:
        return found | dict.fromkeys(("m_rel", "recall", "m_neigh", "angle", "distance"))
    return found | {
        "m_rel": agreement.recall_at(own, targets, 1),
        "recall": agreement.recall_at(own, targets, RECALL),
        "m_neigh": agreement.m_neigh(own, targets, NEIGHBOURS),
        "angle": agreement.angle_degrees(own, targets),
        "distance": agreement.squared_distance(own, targets),
    }
