"""A run's student as a file that ends in an embedding, and the class vectors that make logits of it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize, softmax

from edgekd.core.errors import EdgekdError
from edgekd.data.unlabelled import NO_DATA
from edgekd.distill.classification.load_run import LoadedRun
from edgekd.distill.classification.predict import predict_all
from edgekd.distill.inputs.views import plain
from edgekd.distill.models.students import fit_scale
from edgekd.export.graph import Deployable, UnitHead
from edgekd.targets.bank import ClassBank

FITTED_ON = 1024
"""Validation images at most that the factor on cosines is fitted on."""


def check_embeds(loaded: LoadedRun) -> None:
    """Refuse a run whose classes are no text vectors in its teacher's space: nothing could be added to them."""
    if not loaded.student.embeds or loaded.student.head is not None or loaded.bank is None:
        raise EdgekdError(
            f"{loaded.run.name} was trained with {loaded.run.recipe}, whose classifier is trained for its classes "
            "alone, so there is no embedding to end in.",
            "Train with a recipe that has a text head, such as vl2v-adip, or export without --head embedding.",
        )


def embedding_with_bank(loaded: LoadedRun, data: str | None) -> tuple[Deployable, ClassBank]:
    """Return the graph, and the bank of the run's classes with its factor fitted on source validation.

    Cosines are not the scores that the exported classifier gives, so its temperature does not fit them.
    """
    images, split = loaded.data(data)
    order = np.random.Generator(np.random.Philox(0)).permutation(split.val)
    chosen = np.sort(order[:FITTED_ON])

    @torch.inference_mode()
    def embed(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = loaded.student(plain(torch.from_numpy(pixels))).float().numpy()
        return found

    raw = torch.from_numpy(predict_all(embed, images, chosen, loaded.run.preprocess))  # [N, D]
    vectors = loaded.vectors
    assert vectors is not None
    targets = torch.from_numpy(images.labels[chosen])
    if (
        loaded.run.data == NO_DATA
    ):  # the student's own scale stands for labels, which there are none of
        targets = softmax(float(loaded.student.scale) * raw @ vectors.T, dim=1)
    scale = fit_scale(normalize(raw, dim=1) @ vectors.T, targets)
    return embedding_model(loaded, float(raw.norm(dim=1).mean())), class_bank(loaded, scale)


def embedding_model(loaded: LoadedRun, length: float = 1.0) -> Deployable:
    """Return the graph that ends in a unit embedding; `length` as `UnitHead` takes it."""
    assert loaded.bank is not None
    dim = loaded.bank.vectors.shape[1]
    head = UnitHead(loaded.student.projector, dim, length)
    return Deployable(loaded.student.body, head, loaded.run.preprocess).eval()


def class_bank(loaded: LoadedRun, scale: float) -> ClassBank:
    """Return the run's classes as an artifact carries them; `scale` is the factor on cosines."""
    bank = loaded.bank
    assert bank is not None
    return ClassBank(
        classes=loaded.run.classes,
        vectors=bank.head.numpy().astype(np.float32),
        logit_scale=scale,
        text_mean=None if bank.text_centre is None else bank.text_centre.numpy().astype(np.float32),
        facts={
            "teacher": loaded.run.teacher,
            "teacher_id": bank.teacher_id,
            "teacher_logit_scale": bank.logit_scale,
            "templates": list(bank.templates),
            "described": bank.described,
            "added": [],
        },
    )
