"""Metrics of float logits `[N, C]` with int labels `[N]`, N > 0, and of the detection of unknown classes.

Fractions are 0–1, never percent. A tie between logits goes to the lower class index. The detection metrics take one
score per known image, float `[N]`, and per unknown image, float `[M]`, larger for known. Equal scores are one
threshold, never an order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.floating]
Labels = NDArray[np.int64]
Scores = NDArray[np.float64]


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Return the natural logarithm of softmax, float64 `[N, C]`, finite for any finite logits."""
    from scipy.special import log_softmax as of_scipy

    return np.asarray(of_scipy(logits.astype(np.float64), axis=1))


def correct(logits: Logits, labels: Labels) -> NDArray[np.bool_]:
    """Return which images are classified correctly, bool `[N]`."""
    return np.asarray(logits.argmax(axis=1) == labels)


def top1(logits: Logits, labels: Labels) -> float:
    """Return the fraction of images whose largest logit is the label's."""
    return float(correct(logits, labels).mean())


def per_class(logits: Logits, labels: Labels) -> NDArray[np.float64]:
    """Return the recall of each class, `[C]`; NaN for a class without images."""
    classes = logits.shape[1]
    hits = np.bincount(labels[correct(logits, labels)], minlength=classes)
    totals = np.bincount(labels, minlength=classes)
    return np.asarray(np.where(totals > 0, hits / np.maximum(totals, 1), np.nan), dtype=np.float64)


def macro(logits: Logits, labels: Labels) -> float:
    """Return the unweighted mean of the recalls of the classes that have images (balanced accuracy)."""
    return float(np.nanmean(per_class(logits, labels)))


def worst_class(logits: Logits, labels: Labels) -> tuple[int, float]:
    """Return index and recall of the class with the lowest recall; the first of equals."""
    recalls = per_class(logits, labels)
    index = int(np.nanargmin(recalls))
    return index, float(recalls[index])


def confidence(logits: Logits) -> NDArray[np.float64]:
    """Return the largest softmax probability of each image, `[N]`."""
    return np.asarray(np.exp(log_softmax(logits).max(axis=1)))  # [N]


@dataclass(frozen=True)
class Reliability:
    """Images in equally wide bins of the largest softmax probability, closed on the right.

    Attributes:
        count: images in each bin, int64 `[bins]`.
        accuracy, confidence: means in each bin, 0–1, NaN where it is empty.
    """

    count: NDArray[np.int64]
    accuracy: NDArray[np.float64]
    confidence: NDArray[np.float64]

    @property
    def ece(self) -> float:
        """Σ count/N · |accuracy − confidence|."""
        gap = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float((self.count * gap).sum() / self.count.sum())


def reliability(logits: Logits, labels: Labels, bins: int = 15) -> Reliability:
    """Return the images binned by confidence."""
    scores = confidence(logits)
    bin_of = np.digitize(scores, np.linspace(0.0, 1.0, bins + 1)[1:-1], right=True)  # [N]
    count = np.bincount(bin_of, minlength=bins)
    filled = np.where(count > 0, count, np.nan)
    hits = np.bincount(bin_of, weights=correct(logits, labels), minlength=bins)
    return Reliability(count, hits / filled, np.bincount(bin_of, scores, minlength=bins) / filled)


def ece(logits: Logits, labels: Labels, bins: int = 15) -> float:
    """Return the expected calibration error (Guo et al. 2017, eq. 3) with bins of equal width."""
    return reliability(logits, labels, bins).ece


def adaptive_ece(logits: Logits, labels: Labels, bins: int = 15) -> float:
    """Return `ece` with bins that hold equally many images, sorted by confidence (Nixon et al. 2019)."""
    scores = confidence(logits)
    order = np.argsort(scores, kind="stable")
    excess = (correct(logits, labels) - scores)[order]
    return float(sum(abs(part.sum()) for part in np.array_split(excess, bins)) / len(labels))


def nll(logits: Logits, labels: Labels) -> float:
    """Return the mean negative log-likelihood of the label, in nats."""
    return float(-log_softmax(logits)[np.arange(len(labels)), labels].mean())


def brier(logits: Logits, labels: Labels) -> float:
    """Return the mean over images of Σ_c (p_c − [c is the label])², 0 (best) to 2."""
    probabilities = np.exp(log_softmax(logits))  # [N, C]
    probabilities[np.arange(len(labels)), labels] -= 1.0
    return float((probabilities**2).sum(axis=1).mean())


def agreement(first: Logits, second: Logits) -> float:
    """Return the fraction of images on which two models name the same class, right or wrong."""
    return float((first.argmax(axis=1) == second.argmax(axis=1)).mean())


TEMPERATURES = (0.05, 20.0)
"""Bounds of the search: a model that is always right on few images would otherwise get 0."""


def fit_temperature(logits: Logits, labels: Labels) -> float:
    """Return the temperature T in `TEMPERATURES` for which `logits / T` has the smallest `nll` (Guo et al. 2017, 4.2).

    The mean negative log-likelihood is convex in 1/T, so bisection on its slope finds the only minimum.
    """
    scores = logits.astype(np.float64)
    own = scores[np.arange(len(labels)), labels]  # [N]

    def slope(inverse: float) -> float:
        expected = (np.exp(log_softmax(scores * inverse)) * scores).sum(axis=1)  # [N]
        return float((expected - own).mean())

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    for _ in range(60):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(1 / np.sqrt(low * high))


def auroc(known: Scores, unknown: Scores) -> float:
    """Return the area under the ROC curve, ties counting one half; 0.5 is chance."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*_labelled(known, unknown)))


def average_precision(positive: Scores, negative: Scores) -> float:
    """Return the average precision of two groups of scores, those of `positive` being higher; ties are one threshold.

    For `aupr_in` the positive ones are those of known images, for `aupr_out` the negated ones of unknown images.
    """
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(*_labelled(positive, negative)))


def _labelled(positive: Scores, negative: Scores) -> tuple[NDArray[np.bool_], Scores]:
    """Labels `[N + M]`, true for the positive ones, and all scores; ValueError where either group is empty."""
    if not (len(positive) and len(negative)):
        raise ValueError("detection needs known and unknown images")
    labels = np.repeat([True, False], [len(positive), len(negative)])
    return labels, np.concatenate([positive, negative])


def fpr_at_95(known: Scores, unknown: Scores) -> float:
    """Return the share of unknown images that pass the highest threshold which at least 95 % of the known ones pass."""
    passing = -(-19 * len(known) // 20)  # ⌈0.95 N⌉ without rounding errors
    threshold = np.sort(known)[-passing]
    return float((unknown >= threshold).mean())


def auroc_draws(known: Scores, unknown: Scores, *, replicates: int = 2000) -> NDArray[np.float64]:
    """Return the AUROC of bootstrap samples, `[replicates]`: known and unknown images are drawn separately.

    The draws depend on the two numbers of images alone, so those of two models on the same images are paired.
    """
    rng = np.random.default_rng(0)
    n, m = len(known), len(unknown)
    order = np.argsort(unknown, kind="stable")
    below, upto = (np.searchsorted(unknown[order], known, side=side) for side in ("left", "right"))
    found = np.empty(replicates)
    total = np.zeros(m + 1, dtype=np.int64)
    for replicate in range(replicates):
        times_known = np.bincount(rng.integers(n, size=n), minlength=n)
        times_unknown = np.bincount(rng.integers(m, size=m), minlength=m)
        np.cumsum(times_unknown[order], out=total[1:])
        found[replicate] = times_known @ (total[below] + total[upto])
    return found / (2 * n * m)
