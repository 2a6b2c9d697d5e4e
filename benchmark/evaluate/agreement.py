"""Agreement of student and teacher beyond their accuracies; embeddings in, numbers out, numpy only.

`M_rel`, `M_neigh` and `M_vlalign` are those of Li et al. (ICCV 2023). All distances are between unit vectors, where
`‖a − b‖² = 2 − 2cos`, so nearest means largest cosine.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.floating]


def unit_rows(vectors: Vectors) -> NDArray[np.float32]:
    """Return rows of length 1, float32; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    rows: NDArray[np.float32] = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return rows


def recall_at(student: Vectors, teacher: Vectors, k: int) -> float:
    """Return the share of images, 0–1, whose own teacher embedding is among the `k` nearest to their student embedding.

    Args:
        student: `[N, D]`. teacher: `[N, D]`, row i of the same image.
    """
    hits = 0
    for rows, cosines in _cosines(student, teacher):
        own = cosines[np.arange(len(rows)), rows]
        hits += int(((cosines > own[:, None]).sum(axis=1) < k).sum())
    return hits / max(1, len(student))


def m_rel(student: Vectors, teacher: Vectors) -> float:
    """Return `M_rel`: the student's nearest teacher embedding is the own one. 0–1, higher is better; recall at 1."""
    return recall_at(student, teacher, 1)


def m_neigh(student: Vectors, teacher: Vectors, k: int) -> float:
    """Return `M_neigh@k`: how many of an image's `k` nearest images student and teacher share. 0–1, higher is better.

    Neighbours are other images: an image itself is always its own nearest and does not count.
    """
    k = min(k, len(student) - 1)
    if k < 1:
        return float("nan")
    shared = 0
    for (rows, ours), (_, theirs) in zip(
        _cosines(student, student), _cosines(teacher, teacher), strict=True
    ):
        for cosines in (ours, theirs):
            cosines[np.arange(len(rows)), rows] = -np.inf
        best = [np.argpartition(-cosines, k - 1, axis=1)[:, :k] for cosines in (ours, theirs)]
        shared += sum(len(np.intersect1d(a, b)) for a, b in zip(*best, strict=True))
    return shared / (k * len(student))


def m_vlalign(student_scores: Vectors, teacher_scores: Vectors, k: int) -> float:
    """Return `M_vlalign@k`: inversions in the student's order of the teacher's `k` nearest texts, per image.

    0 to k(k−1)/2, lower is better.

    Args:
        student_scores, teacher_scores: `[N, C]`, larger is nearer; only each row's order counts, so logits will do.
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


def _cosines(
    a: Vectors, b: Vectors, rows: int = 512
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield row numbers and their cosines `[rows, len(b)]`, some rows at a time so that memory stays small."""
    ours, theirs = unit_rows(a), unit_rows(b)
    for start in range(0, len(ours), rows):
        part = ours[start : start + rows]
        yield np.arange(start, start + len(part)), part @ theirs.T
