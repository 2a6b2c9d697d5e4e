"""Which part of an activation's values INT8 covers: everything seen (min-max), or less, so that the steps get finer.

Every method takes a histogram of `2 · BINS` equal bins from −reach to reach and gives the range to cover. A step more
or less at the edge decides little; what decides is whether a few outliers may widen every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import HistogramCollector

Calibrator = Literal["minmax", "percentile", "entropy", "mse"]
CALIBRATORS: tuple[Calibrator, ...] = get_args(Calibrator)

BINS = 4096
"""Of a histogram, to each side of 0."""
PERCENTILE = 99.99
"""Share of the values that `percentile` covers, in percent."""
_ENTROPY_BINS = 1024  # to both sides together; the search costs the square of it
_ENTROPY_LEVELS = 128
_SHRINK, _TRIALS = 0.93, 80  # of a range, down to 0.3 % of it


def percentile(counts: NDArray[np.int64], reach: float, symmetric: bool) -> tuple[float, float]:
    """Cover `PERCENTILE` of the values: the same share is cut at both ends, or with `symmetric` of the absolute values.

    Args:
        counts: int64 `[2 · BINS]` over −reach to reach.

    Returns:
        Lowest and highest value to cover; linear within a bin.
    """
    cut = 1 - PERCENTILE / 100
    if symmetric:
        high = _quantile(counts[BINS:] + counts[BINS - 1 :: -1], 1 - cut) * reach
        return -high, high
    low, high = (2 * _quantile(counts, share) - 1 for share in (cut / 2, 1 - cut / 2))
    return low * reach, high * reach


def entropy(counts: NDArray[np.int64], reach: float, symmetric: bool) -> tuple[float, float]:
    """The range around 0 whose 128 steps lose the least information: ONNX Runtime's search, after TensorRT's.

    It minimises the Kullback-Leibler divergence between the clipped histogram and its coarser self (S. Migacz, 8-bit
    inference with TensorRT, GTC 2017). Arguments and result as for `percentile`; it is symmetric in any case.
    """
    coarse = counts.reshape(_ENTROPY_BINS, -1).sum(axis=1)
    edges = np.linspace(-reach, reach, _ENTROPY_BINS + 1)
    search = HistogramCollector("entropy", symmetric, _ENTROPY_BINS, _ENTROPY_LEVELS, None, None)
    low, high = search.get_entropy_threshold((coarse, edges, edges[0], edges[-1]), _ENTROPY_LEVELS)
    return float(low), float(high)


def mse(counts: NDArray[np.int64], reach: float, symmetric: bool) -> tuple[float, float]:
    """The range that makes the mean squared error of rounding and clipping the smallest.

    Asymmetric ranges are searched one end at a time, twice. Arguments and result as for `percentile`.
    """
    taken = np.flatnonzero(counts)
    values, weights = ((taken + 0.5) / BINS - 1) * reach, counts[taken].astype(np.float64)
    trials = reach * _SHRINK ** np.arange(_TRIALS)
    if symmetric:
        high = min(
            trials, key=lambda high: rounding_error(values, weights, -high, high, symmetric=True)
        )
        return -float(high), float(high)
    low, high = min(float(values[0]), 0.0), max(float(values[-1]), 0.0)
    lows, highs = low * _SHRINK ** np.arange(_TRIALS), high * _SHRINK ** np.arange(_TRIALS)
    for _ in range(2):
        high = min(
            highs, key=lambda end: rounding_error(values, weights, low, end, symmetric=False)
        )
        low = min(lows, key=lambda end: rounding_error(values, weights, end, high, symmetric=False))
    return float(low), float(high)


def rounding_error(
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
    low: float,
    high: float,
    *,
    symmetric: bool,
) -> float:
    """Sum of `weights · (value − dequantized value)²`: int8 around 0 with `symmetric`, else uint8 with a zero point."""
    step = (high / 127 if symmetric else (high - low) / 255) or 1.0
    least = -128 if symmetric else -round(-low / step)
    covered = np.clip(np.round(values / step), least, least + 255) * step
    return float(weights @ np.square(values - covered))


def _quantile(counts: NDArray[np.int64], share: float) -> float:
    """Where in 0–1 of the histogram's width `share` of the counts lies to the left."""
    below = np.concatenate([[0], np.cumsum(counts)])
    place = np.searchsorted(below, share * below[-1], side="left")
    bin_ = max(int(place) - 1, 0)
    inside = (share * below[-1] - below[bin_]) / max(int(counts[bin_]), 1)
    return float((bin_ + min(max(inside, 0.0), 1.0)) / len(counts))


METHODS: dict[str, Callable[[NDArray[np.int64], float, bool], tuple[float, float]]] = {
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}
"""Every calibrator but `minmax`, which needs no histogram."""
