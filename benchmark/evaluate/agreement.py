"""Agreement of student and teacher beyond their accuracies; embeddings in, numbers out.

`M_rel`, `M_neigh` and `M_vlalign` are those of Li et al. (ICCV 2023). All distances are between unit vectors, where
`‖a − b‖² = 2 − 2cos`, so nearest means largest cosine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.floating]
_ROWS = 512
"""Images that are compared with all others at once, so that memory stays small."""


def unit_rows(vectors: Vectors) -> NDArray[np.float32]:
    """Return rows of length 1, float32; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    rows: NDArray[np.float32] = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return rows


def recall_at(student: Vectors, teacher: Vectors, k: int) -> float:
    """Return the share of images, 0–1, whose own teacher embedding is among the `k` nearest to their student embedding.

    At 1 it is `M_rel`. Both are `[N, D]`, row i of the same image.
    """
    hits, images, targets = 0, unit_rows(student), unit_rows(teacher)
    for start in range(0, len(images), _ROWS):
        cosines = images[start : start + _ROWS] @ targets.T
        own = np.diagonal(cosines, start)[:, None]
        hits += int(((cosines > own).sum(axis=1) < k).sum())
    return hits / max(1, len(student))


def m_neigh(student: Vectors, teacher: Vectors, k: int) -> float:
    """Return `M_neigh@k`: how many of an image's `k` nearest images student and teacher share. 0–1, higher is better.

    Neighbours are other images: an image itself is always its own nearest and does not count.
    """
    from sklearn.neighbors import NearestNeighbors

    k = min(k, len(student) - 1)
    if k < 1:
        return float("nan")
    fitted = (NearestNeighbors(n_neighbors=k, metric="cosine").fit(v) for v in (student, teacher))
    nearest = (one.kneighbors(return_distance=False) for one in fitted)  # [N, k] each
    shared = sum(len(np.intersect1d(a, b)) for a, b in zip(*nearest, strict=True))
    return shared / (k * len(student))


def m_vlalign(student_scores: Vectors, teacher_scores: Vectors, k: int) -> float:
    """Return `M_vlalign@k`: inversions in the student's order of the teacher's `k` nearest texts, per image.

    0 to k(k−1)/2, lower is better. Scores are `[N, C]`; only each row's order counts, so logits will do.
    """
    k = min(k, teacher_scores.shape[1])
    order = np.argsort(-teacher_scores, axis=1, kind="stable")[:, :k]  # [N, k]
    scores = np.take_along_axis(student_scores, order, axis=1)
    first, second = np.triu_indices(k, 1)
    return float((scores[:, first] < scores[:, second]).sum(axis=1).mean())


def angle_degrees(student: Vectors, teacher: Vectors) -> float:
    """Return the mean angle between an image's student and teacher embeddings."""
    cosines = (unit_rows(student) * unit_rows(teacher)).sum(axis=1)
    return float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).mean())


def squared_distance(student: Vectors, teacher: Vectors) -> float:
    """Return the mean `‖ŝ − t̂‖²`, 0–4."""
    return float(np.square(unit_rows(student) - unit_rows(teacher)).sum(axis=1).mean())
