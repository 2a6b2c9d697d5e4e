"""Accuracy on source validation, the only accuracy that training may look at."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekd.data import ImageSet
from edgekd.distill.predict import predict_all, student_predict
from edgekd.distill.prompts import TextBank
from edgekd.distill.students import Student


def source_accuracy(student: Student, bank: TextBank | None, images: ImageSet, indices: NDArray[np.int64]) -> float:
    """Unweighted mean over domains of the top-1 accuracy, 0–1."""
    vectors = bank.head.to(student.mean.device) if bank else None
    scores = predict_all(student_predict(student, vectors), images, indices, student.preprocess)
    return domain_mean(scores, images, indices)


def domain_mean(scores: NDArray[np.float32], images: ImageSet, indices: NDArray[np.int64]) -> float:
    """Top-1 accuracy of scores `[len(indices), C]`, 0–1, averaged over domains without weights."""
    right = scores.argmax(axis=1) == images.labels[indices]
    domains = images.domain_of[indices]
    return float(np.mean([right[domains == domain].mean() for domain in np.unique(domains)]))
