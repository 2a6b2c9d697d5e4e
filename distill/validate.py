"""Accuracy on source validation, the only accuracy that training may look at."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy, normalize

from edgekd.data.image_set import ImageSet
from edgekd.distill.predict import predict_all, student_predict
from edgekd.distill.prompts import TextBank
from edgekd.distill.students import Student
from edgekd.distill.views import plain


def source_accuracy(
    student: Student, bank: TextBank | None, images: ImageSet, indices: NDArray[np.int64]
) -> float:
    """Unweighted mean over domains of the top-1 accuracy, 0–1."""
    return domain_mean(scores_on(student, bank, images, indices), images, indices)


def scores_on(
    student: Student, bank: TextBank | None, images: ImageSet, indices: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Scores of a student in training, where it lies, float32 `[len(indices), C]`; leaves it in eval mode."""
    vectors = bank.head.to(student.mean.device) if bank else None
    return predict_all(student_predict(student, vectors), images, indices, student.preprocess)


@torch.inference_mode()
def source_loss(
    student: Student, bank: TextBank | None, images: ImageSet, indices: NDArray[np.int64]
) -> float:
    """Cross-entropy with the label, averaged over domains without weights: what SWAD watches.

    A text head is taken as its teacher's: `logit_scale · cos`.
    """
    device = student.mean.device
    was_training = student.training
    student.eval()

    def predict(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        out = student(plain(torch.from_numpy(pixels).to(device))).float()
        if bank is not None and student.embeds and student.head is None:
            return (
                (bank.logit_scale * normalize(out, dim=-1) @ bank.head.to(device).T).cpu().numpy()
            )
        return student.classify(out).cpu().numpy()

    scores = predict_all(predict, images, indices, student.preprocess)
    student.train(was_training)
    each = cross_entropy(
        torch.from_numpy(scores), torch.from_numpy(images.labels[indices]), reduction="none"
    ).numpy()
    domains = images.domain_of[indices]
    return float(np.mean([each[domains == domain].mean() for domain in np.unique(domains)]))


def domain_mean(scores: NDArray[np.float32], images: ImageSet, indices: NDArray[np.int64]) -> float:
    """Top-1 accuracy of scores `[len(indices), C]`, 0–1, averaged over domains without weights."""
    right = scores.argmax(axis=1) == images.labels[indices]
    domains = images.domain_of[indices]
    return float(np.mean([right[domains == domain].mean() for domain in np.unique(domains)]))
