"""How well one number per image tells images of known classes from images of unknown ones.

Every function takes scores of known images, float `[N]`, and of unknown images, float `[M]`, N, M > 0, of a model that
is to be surer of the known ones: a larger score says "known". Results are 0–1. Equal scores are one threshold, never
an order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

REPLICATES = 2000
"""Draws of `auroc_draws`."""


def auroc(known: Scores, unknown: Scores) -> float:
    """Return the area under the receiver operating characteristic; 0.5 is chance.

    It is the probability that a known image scores higher than an unknown one, ties counting one half (Mann–Whitney's
    U over N·M; Hanley & McNeil 1982), and the same whichever of both is called positive.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*_labelled(known, unknown)))


def average_precision(positive: Scores, negative: Scores) -> float:
    """Return Σ over distinct thresholds of (recall gained · precision there): the area under precision over recall.

    Chance is the share of positives among all images, so values compare between equal shares only. No line is drawn
    between thresholds: it would be too favourable (Davis & Goadrich 2006).

    Args:
        positive: scores that should be higher. For `aupr_in` those of known images, for `aupr_out` the negated ones of
            unknown images, as Hendrycks et al. 2021 do.
        negative: the other images' scores.
    """
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(*_labelled(positive, negative)))


def _labelled(positive: Scores, negative: Scores) -> tuple[NDArray[np.bool_], Scores]:
    """Labels `[N + M]`, true for the positive ones, and all scores; ValueError where either group is empty."""
    if not (len(positive) and len(negative)):
        raise ValueError("images of one group alone cannot be told apart")
    labels = np.repeat([True, False], [len(positive), len(negative)])
    return labels, np.concatenate([positive, negative])


def fpr_at_95(known: Scores, unknown: Scores) -> float:
    """Share of unknown images that pass the highest threshold which at least 95 % of the known images pass.

    Known images are positive, as in OpenOOD (Yang et al. 2022). A score equal to the threshold passes.
    """
    kept = -(-19 * len(known) // 20)  # ⌈0.95 N⌉ without rounding errors
    threshold = np.sort(known)[-kept]
    return float((unknown >= threshold).mean())


def auroc_draws(
    known: Scores, unknown: Scores, *, replicates: int = REPLICATES, seed: int = 0
) -> NDArray[np.float64]:
    """AUROC of bootstrap samples, `[replicates]`: known and unknown images drawn with replacement, each on their own.

    The draws depend on the seed and the two numbers of images alone. Two models' draws on the same images are therefore
    paired, and their difference is that of the models on the same samples.
    """
    rng = np.random.default_rng(seed)
    n, m = len(known), len(unknown)
    order = np.argsort(unknown, kind="stable")
    below, upto = _ranks(known, unknown)
    found = np.empty(replicates)
    total = np.zeros(m + 1, dtype=np.int64)
    for replicate in range(replicates):
        times_known = np.bincount(rng.integers(n, size=n), minlength=n)
        times_unknown = np.bincount(rng.integers(m, size=m), minlength=m)
        np.cumsum(times_unknown[order], out=total[1:])
        found[replicate] = times_known @ (total[below] + total[upto])
    return found / (2 * n * m)


def _ranks(known: Scores, unknown: Scores) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each known image how many unknown ones score lower, and how many no higher."""
    ordered = np.sort(unknown)
    below = np.searchsorted(ordered, known, side="left").astype(np.int64)
    return below, np.searchsorted(ordered, known, side="right").astype(np.int64)
