"""Two artifacts beside each other: the ratio of their latencies from blocks that took turns, and paired accuracies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.evaluate import metrics
from edgekd.benchmark.evaluate.scores import Logits
from edgekd.benchmark.evaluate.statistics import mcnemar_p, paired_interval
from edgekd.benchmark.findings import Comparison, SuiteComparison
from edgekd.benchmark.measure.intervals import ratio_interval
from edgekd.benchmark.measure.latency import LatencySamples
from edgekd.benchmark.measure.speed import Timed, reason_to_withhold, turns_of
from edgekd.benchmark.subjects import Subject, Suite
from edgekd.errors import EdgekdError


def check_comparable(first: Subject, second: Subject, suites: Sequence[Suite]) -> None:
    """Two artifacts need images that both are measured on.

    Raises:
        EdgekdError: they have none, since their runs were split differently.
    """
    if not shared_suites(first, second, suites):
        raise EdgekdError(
            f"{first.run}/{first.name} and {second.run}/{second.name} have no test images in common.",
            "Their runs were split differently: give images that neither trained on with --ood NAME=DIR.",
        )


def shared_suites(first: Subject, second: Subject, suites: Sequence[Suite]) -> list[int]:
    """Positions of the suites whose accuracies are set beside each other."""
    apart = ("val", "corruption", "vocabulary", "unknown")
    return [
        number
        for number, suite in enumerate(suites)
        if suite.holds(first) and suite.holds(second) and suite.kind not in apart
    ]


def compare(
    first: Subject,
    second: Subject,
    suites: Sequence[Suite],
    logits: Logits,
    first_samples: Sequence[LatencySamples],
    second_samples: Sequence[LatencySamples],
    rows: tuple[Timed, Timed],
    load: float | None = None,
) -> Comparison:
    """A = `first` against B = `second`.

    Args:
        rows: what their latencies are worth.
        load: load average per core of this machine before the run.
        first_samples, second_samples: one entry per process, measured in alternating blocks of the same process.
    """
    turns, p50 = turns_of(first_samples, second_samples)
    ci95 = ratio_interval(*turns)
    return Comparison(
        a_run=first.run,
        a=first.name,
        b_run=second.run,
        b=second.name,
        p50_a_ms=p50[0],
        p50_b_ms=p50[1],
        p50_ratio=p50[0] / p50[1],
        p50_ratio_ci95=ci95,
        withheld=reason_to_withhold(rows, ci95, load),
        turns=len(turns[0]),
        processes=len(first_samples),
        accuracy=tuple(
            _on(suites[number], logits[first.key, number], logits[second.key, number])
            for number in shared_suites(first, second, suites)
        ),
    )


def _on(suite: Suite, first: NDArray[np.float32], second: NDArray[np.float32]) -> SuiteComparison:
    right, other = metrics.correct(first, suite.labels), metrics.correct(second, suite.labels)
    return SuiteComparison(
        suite=suite.name,
        n=len(right),
        a=float(right.mean()),
        b=float(other.mean()),
        value=float(right.mean() - other.mean()),
        ci95=paired_interval([(right, other)]),
        mcnemar_p=mcnemar_p(right, other),
        agreement=metrics.agreement(first, second),
    )
