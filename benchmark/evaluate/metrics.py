"""What a matrix of logits is worth. Every function takes float logits `[N, C]` and int labels `[N]`, N > 0.

Fractions are 0–1, never percent. A tie between logits goes to the lower class index.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.floating]
Labels = NDArray[np.int64]


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Natural logarithm of softmax, float64 `[N, C]`, finite for any finite logits."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)  # [N, C]
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def correct(logits: Logits, labels: Labels) -> NDArray[np.bool_]:
    """Which images are classified rightly, bool `[N]`."""
    return np.asarray(logits.argmax(axis=1) == labels)


def top1(logits: Logits, labels: Labels) -> float:
    """Fraction of images whose largest logit is the label's."""
    return float(correct(logits, labels).mean())


def per_class(logits: Logits, labels: Labels) -> NDArray[np.float64]:
    """Recall of each class, `[C]`; NaN for a class without images."""
    classes = logits.shape[1]
    hits = np.bincount(labels[correct(logits, labels)], minlength=classes)
    totals = np.bincount(labels, minlength=classes)
    return np.asarray(np.where(totals > 0, hits / np.maximum(totals, 1), np.nan), dtype=np.float64)


def macro(logits: Logits, labels: Labels) -> float:
    """Unweighted mean of the recalls of the classes that have images (balanced accuracy, mean-per-class recall)."""
    return float(np.nanmean(per_class(logits, labels)))


def worst_class(logits: Logits, labels: Labels) -> tuple[int, float]:
    """Index and recall of the class with the lowest recall; the first of equals."""
    recalls = per_class(logits, labels)
    index = int(np.nanargmin(recalls))
    return index, float(recalls[index])


def confidence(logits: Logits) -> NDArray[np.float64]:
    """Largest softmax probability of each image, `[N]`."""
    return np.asarray(np.exp(log_softmax(logits).max(axis=1)))  # [N]


def ece(logits: Logits, labels: Labels, bins: int = 15) -> float:
    """Expected calibration error: Σ_b (n_b / N) · |accuracy_b − mean confidence_b|.

    Confidence is the largest softmax probability; the bins are equally wide and closed on the right.
    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3.
    """
    sure = confidence(logits)
    edges = np.linspace(0.0, 1.0, bins + 1)
    bin_of = np.digitize(sure, edges[1:-1], right=True)  # [N]
    excess = correct(logits, labels) - sure
    return float(np.abs(np.bincount(bin_of, weights=excess, minlength=bins)).sum() / len(labels))


def adaptive_ece(logits: Logits, labels: Labels, bins: int = 15) -> float:
    """As `ece`, with bins that hold equally many images (sorted by confidence; sizes differ by at most one).

    Source: Nixon et al. 2019, "Measuring Calibration in Deep Learning", adaptive binning on the top class.
    """
    sure = confidence(logits)
    order = np.argsort(sure, kind="stable")
    excess = (correct(logits, labels) - sure)[order]
    return float(sum(abs(part.sum()) for part in np.array_split(excess, bins)) / len(labels))


def nll(logits: Logits, labels: Labels) -> float:
    """Mean negative log-likelihood of the label, in nats."""
    return float(-log_softmax(logits)[np.arange(len(labels)), labels].mean())


def brier(logits: Logits, labels: Labels) -> float:
    """Mean over images of Σ_c (p_c − [c is the label])², 0 (best) to 2. Source: Brier 1950, several classes."""
    probabilities = np.exp(log_softmax(logits))  # [N, C]
    probabilities[np.arange(len(labels)), labels] -= 1.0
    return float((probabilities**2).sum(axis=1).mean())


def agreement(first: Logits, second: Logits) -> float:
    """Fraction of images on which two models name the same class, right or wrong."""
    return float((first.argmax(axis=1) == second.argmax(axis=1)).mean())


TEMPERATURES = (0.05, 20.0)
"""Where a temperature is looked for: a model that is always right on few images would otherwise get 0."""


def fit_temperature(logits: Logits, labels: Labels) -> float:
    """The temperature T in `TEMPERATURES` for which `logits / T` has the smallest `nll`.

    The mean negative log-likelihood is convex in 1/T, so bisection on its slope finds the only minimum.
    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2.
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
