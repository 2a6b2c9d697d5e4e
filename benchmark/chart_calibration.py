"""Reliability diagrams: what a model's confidence is worth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.evaluate import metrics
from edgekd.benchmark.svg import Drawing, element, joined, linear, ticks, x_axis, y_axis

BINS = 15


@dataclass(frozen=True)
class Reliability:
    """15 equally wide bins of the largest softmax probability, closed on the right.

    Attributes:
        count: images in each bin, int64 `[15]`.
        accuracy, confidence: means in each bin, 0–1, NaN where it is empty.
        ece: Σ count/N · |accuracy − confidence|.
    """

    count: NDArray[np.int64]
    accuracy: NDArray[np.float64]
    confidence: NDArray[np.float64]
    ece: float


def reliability(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Reliability:
    """Bin float logits `[N, C]` with int labels `[N]` as `metrics.ece` does."""
    confidence = np.exp(metrics.log_softmax(logits).max(axis=1))  # [N]
    bin_of = np.digitize(confidence, np.linspace(0, 1, BINS + 1)[1:-1], right=True)
    count = np.bincount(bin_of, minlength=BINS)
    filled = np.where(count > 0, count, np.nan)
    right = np.bincount(bin_of, weights=metrics.correct(logits, labels), minlength=BINS)
    return Reliability(
        count=count,
        accuracy=right / filled,
        confidence=np.bincount(bin_of, weights=confidence, minlength=BINS) / filled,
        ece=metrics.ece(logits, labels),
    )


def reliability_drawing(found: Reliability, title: str, colour: str) -> Drawing:
    """Accuracy of each bin as a bar, the gap to its mean confidence hatched, and beneath how many images it has."""
    width, height, left, right, top, bottom = 236, 296, 32, 230, 24, 202
    x, y = linear(0, 1, left, right), linear(0, 1, bottom, top)
    body = [
        x_axis(x, [0, 0.25, 0.5, 0.75, 1], top, bottom),
        y_axis(y, [0, 0.25, 0.5, 0.75, 1], left, right),
    ]
    step = (right - left) / BINS
    for number in np.flatnonzero(found.count):
        at, accuracy, confidence = (
            left + number * step,
            found.accuracy[number],
            found.confidence[number],
        )
        body.append(
            element(
                "rect", x=at + 1, y=y(accuracy), width=step - 2, height=max(bottom - y(accuracy), 1.0),
                class_=f"{colour} bar",
            )
        )  # fmt: skip
        upper, lower = y(max(accuracy, confidence)), y(min(accuracy, confidence))
        body.append(
            element("rect", x=at + 1, y=upper, width=step - 2, height=max(lower - upper, 0.5), class_="gap")
        )  # fmt: skip
    body.append(element("line", x1=left, y1=bottom, x2=right, y2=top, class_="diagonal"))
    body.append(element("text", "accuracy", x=2, y=12, class_="axis"))
    # Beneath: the share of the images in each bin, with its own scale.
    share = found.count / max(found.count.sum(), 1)
    base, roof = height - 24, bottom + 26
    tall = linear(0, float(share.max()), base, roof)
    for number in np.flatnonzero(found.count):
        level = min(tall(float(share[number])), base - 1)
        body.append(
            element("rect", x=left + number * step + 1, y=level, width=step - 2, height=base - level, class_="count")
        )  # fmt: skip
    most = ticks(0, 100 * float(share.max()), 2)[-1]
    body.append(
        element(
            "text",
            f"{most:g} %",
            x=left - 4,
            y=tall(most / 100) + 4,
            text_anchor="end",
            class_="tick small",
        )
    )
    body.append(element("line", x1=left, x2=right, y1=base, y2=base, class_="base"))
    body.append(
        element(
            "text", "confidence · beneath: share of images", x=(left + right) / 2, y=height - 8, text_anchor="middle",
            class_="axis",
        )
    )  # fmt: skip
    parts = (
        f"confidence {found.confidence[n]:.2f}: accuracy {found.accuracy[n]:.2f}, {found.count[n]} images"
        for n in np.flatnonzero(found.count)
    )
    return Drawing(title, f"ECE {found.ece:.3f}. " + "; ".join(parts), width, height, joined(body))
