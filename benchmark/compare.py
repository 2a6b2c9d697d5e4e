"""Two artifacts beside each other: the ratio of their latencies from blocks that took turns, and paired accuracies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.evaluate import metrics
from edgekd.benchmark.evaluate.scores import Logits
from edgekd.benchmark.evaluate.statistics import mcnemar_p, paired_interval
from edgekd.benchmark.findings import Comparison, SpeedRow, SuiteComparison
from edgekd.benchmark.measure.intervals import percentile, ratio_interval
from edgekd.benchmark.measure.latency import LatencySamples, Protocol, measure_interleaved, rotating
from edgekd.benchmark.measure.speed import Timed, reason_to_withhold
from edgekd.benchmark.subjects import Predict, Subject, Suite
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
    turns, p50 = _turns(first_samples, second_samples)
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


NOTE = Protocol("note", 20, 0.5, 4.0, 60, 2.0, 8.0, 0.1, 1)
"""A few seconds for one sentence."""


@dataclass(frozen=True)
class _Timed:
    subject: str
    settled: bool
    cv: float
    other_cpu: float | None
    stolen_cpu: float | None


def speed_here(models: Mapping[str, Predict], images: NDArray[np.uint8]) -> SpeedRow:
    """Time two models in alternating blocks of this process, for a few seconds, and return their ratio.

    Args:
        models: names of A and B, in this order, and how they answer.
        images: uint8 `[N, H, W, 3]`, in rotation.
    """
    found = measure_interleaved(
        {name: rotating(model, images) for name, model in models.items()}, NOTE
    )
    (a, first), (b, second) = found.items()
    turns, p50 = _turns([first], [second])
    timed = [
        _Timed(
            name,
            one.settled,
            float(one.samples_ms.std() / one.samples_ms.mean()),
            one.other_cpu,
            one.stolen_cpu,
        )
        for name, one in found.items()
    ]
    ci95 = ratio_interval(*turns)
    return SpeedRow(
        a_run="",
        a=a,
        b_run="",
        b=b,
        ratio=p50[0] / p50[1],
        ci95=ci95,
        withheld=reason_to_withhold(timed, ci95),
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


Turns = tuple[list[NDArray[np.float64]], list[NDArray[np.float64]], NDArray[np.int64]]


def _turns(
    first: Sequence[LatencySamples], second: Sequence[LatencySamples]
) -> tuple[Turns, tuple[float, float]]:
    """Samples of A and of B in each turn, the process of each turn, and both medians over these turns.

    A model that is done earlier leaves the other to go on alone; what it measures then has no partner and is not used.
    """
    a: list[NDArray[np.float64]] = []
    b: list[NDArray[np.float64]] = []
    process_of: list[int] = []
    for process, (one, other) in enumerate(zip(first, second, strict=True)):
        mine, theirs = _by_block(one), _by_block(other)
        count = min(len(mine), len(theirs))
        a += mine[:count]
        b += theirs[:count]
        process_of += [process] * count
    p50 = percentile(np.concatenate(a), 50), percentile(np.concatenate(b), 50)
    return (a, b, np.asarray(process_of, dtype=np.int64)), p50


def _by_block(samples: LatencySamples) -> list[NDArray[np.float64]]:
    starts = np.flatnonzero(np.diff(samples.blocks)) + 1
    return np.split(samples.samples_ms, starts)
