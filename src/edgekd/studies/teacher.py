"""The teacher's zero-shot classifier on the images of a study: the top row of its tables."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from edgekd.core.console import say
from edgekd.core.errors import EdgekdError
from edgekd.core.files import short_hash, write_bytes
from edgekd.core.readers import read_arrays
from edgekd.distill.classification.predict import predict_all, teacher_predict
from edgekd.distill.teachers import ClipTeacher, load_teacher
from edgekd.distill.text_bank import descriptions_for, templates_for
from edgekd.studies.plan import Plan, recipe_of
from edgekd.studies.store import Store


def teacher_scores(plan: Plan, store: Store) -> NDArray[np.float32] | None:
    """Zero-shot scores on all images, float32 `[N, C]`, kept in the study's folder; None if no recipe has a teacher."""
    taught = [name for name in plan.recipes if uses_teacher(plan, name)]
    if not taught:
        return None
    config = plan.configs[taught[0]]
    teacher = load_teacher(config.teacher)
    images = plan.images
    # One classifier for all cells, so no templates that differ with the domain left out.
    templates = templates_for("photo" if config.prompts in (None, "domain") else config.prompts)
    spec = config.descriptions
    bank = teacher.text_bank(
        images.classes, templates, descriptions_for(spec, images.classes) if spec else None
    )
    wanted = short_hash(teacher.id, plan.fingerprint, bank.vectors.numpy().tobytes().hex())
    path = store.folder / "teacher.npz"
    if path.exists():
        file = read_arrays(path, "teacher's scores", "Remove that file.")
        scores = file.get("scores")
        if str(file.get("made_for")) == wanted and scores is not None:
            if scores.shape != (len(images), len(images.classes)) or scores.dtype != np.float32:
                raise EdgekdError(
                    f"The teacher's scores at {path} are damaged.", "Remove that file."
                )
            return scores
    everything = np.arange(len(images))
    if isinstance(teacher, ClipTeacher):
        say(f"study: the teacher's zero-shot classifier on {len(images):,} images")
        scores = predict_all(teacher_predict(teacher, bank), images, everything, teacher.preprocess)
    else:
        scores = bank.zero_shot(teacher.lookup(images.ids)).numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, scores=scores, made_for=wanted)
    write_bytes(path, buffer.getvalue())
    return scores


def uses_teacher(plan: Plan, name: str) -> bool:
    """Whether a recipe asks the teacher anything."""
    recipe = recipe_of(plan.configs[name])
    return bool(recipe.needs & {"teacher", "bank"}) or recipe.head == "text"
