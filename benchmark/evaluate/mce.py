"""The mean corruption error of ImageNet-C and its usual denominators."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}  # fmt: skip
"""AlexNet's mean top-1 error over the severities on ImageNet-C, as published with it: the usual denominators of mCE."""


def mean_corruption_error(
    top1: Mapping[str, tuple[float, ...]], denominators: Mapping[str, float]
) -> float:
    """Mean over corruptions of (mean error over severities / denominator); papers show it times 100."""
    return float(
        np.mean([(1 - np.mean(cells)) / denominators[name] for name, cells in top1.items()])
    )
