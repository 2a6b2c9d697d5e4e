"""Rows about images of no known class: how well each subject's confidence tells them from in-domain ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.evaluate import detection, metrics
from edgekd.benchmark.measure.intervals import interval_of
from edgekd.benchmark.report.rows import AurocCost, DetectionRow, UnknownRow
from edgekd.benchmark.subjects import Subject, Suite

Logits = Mapping[tuple[str, int], NDArray[np.float32]]


def unknown_rows(
    subjects: Sequence[Subject], suites: Sequence[Suite], logits: Logits
) -> Iterator[UnknownRow]:
    """One row for each subject and suite of unknown images, set against the in-domain suite that it names.

    Both scores are of the logits as they are returned, over the classes of that in-domain suite.
    """
    torch_of = {subject.run: subject for subject in subjects if subject.kind == "torch"}
    for number, suite in enumerate(suites):
        if suite.kind != "unknown":
            continue
        inside = next(
            n
            for n, other in enumerate(suites)
            if (other.name, other.run) == (suite.base, suite.run)
        )
        for subject in subjects:
            if not suite.holds(subject):
                continue
            known, unknown = logits[subject.key, inside], logits[subject.key, number]
            reference = torch_of.get(subject.run) if subject.kind == "artifact" else None
            before = (
                (logits[reference.key, inside], logits[reference.key, number])
                if reference
                else None
            )
            yield UnknownRow(
                run=subject.run,
                subject=subject.name,
                suite=suite.name,
                inside=suites[inside].name,
                n=len(unknown),
                n_inside=len(known),
                confidence=float(metrics.confidence(unknown).mean()),
                confidence_inside=float(metrics.confidence(known).mean()),
                msp=_detection(metrics.confidence, (known, unknown), before),
                mls=_detection(_largest, (known, unknown), before),
                device=subject.device,
            )


def _largest(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.asarray(logits.max(axis=1), dtype=np.float64)  # [N]


_Score = Callable[[NDArray[np.floating]], NDArray[np.float64]]
_Pair = tuple[NDArray[np.float32], NDArray[np.float32]]


def _detection(score: _Score, own: _Pair, before: _Pair | None) -> DetectionRow:
    """How well `score` does on (known, unknown) logits; `before` are the torch student's on the same images."""
    known, unknown = score(own[0]), score(own[1])  # [N], [M]
    draws = detection.auroc_draws(known, unknown)
    value = detection.auroc(known, unknown)
    cost = None
    if before is not None:
        first, second = score(before[0]), score(before[1])
        cost = AurocCost(
            value=detection.auroc(first, second) - value,
            ci95=interval_of(detection.auroc_draws(first, second) - draws),
        )
    return DetectionRow(
        auroc=value,
        auroc_ci95=interval_of(draws),
        aupr_out=detection.average_precision(-unknown, -known),
        aupr_in=detection.average_precision(known, unknown),
        fpr95=detection.fpr_at_95(known, unknown),
        auroc_cost=cost,
    )
