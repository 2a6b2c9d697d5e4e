"""Paired comparisons of two files measured in turns, of all files of a run, and of two runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, get_args

from edgekd.benchmark.evaluate import metrics
from edgekd.benchmark.evaluate.statistics import difference
from edgekd.benchmark.results.rows import LatencyRow
from edgekd.benchmark.results.schema import (
    Cause,
    Comparison,
    GainRow,
    SpeedRow,
    SuiteComparison,
    Where,
    load_of,
)
from edgekd.benchmark.subjects import Logits, Subject, Suite
from edgekd.core.errors import EdgekdError
from edgekd.targets.timing.intervals import interval_of, percentile_draws, ratio_interval
from edgekd.targets.timing.speed import Timing, reason_to_withhold, turns_of
from edgekd.targets.timing.stopwatch import LatencySamples, joined

BASELINES = ("erm", "lp-ft")
"""Recipes without a teacher."""
_APART = ("val", "corruption", "vocabulary", "unknown")


def shared_suites(first: Subject, second: Subject, suites: Sequence[Suite]) -> list[int]:
    """Return the positions of the suites on which both are compared; none, by different splits, is an `EdgekdError`."""
    shared = [
        number
        for number, suite in enumerate(suites)
        if suite.holds(first) and suite.holds(second) and suite.kind not in _APART
    ]
    if not shared:
        raise EdgekdError(
            f"{first.run}/{first.name} and {second.run}/{second.name} have no test images in common.",
            "Their runs were split differently: give images that neither trained on with --ood NAME=DIR.",
        )
    return shared


def compare(
    pair: tuple[Subject, Subject],
    suites: Sequence[Suite],
    logits: Logits,
    samples: tuple[Sequence[LatencySamples], Sequence[LatencySamples]],
    timings: Sequence[Timing],
    load: float | None = None,
) -> Comparison:
    """Compare A with B, the two of `pair`.

    Args:
        samples: of A and of B, one entry per process, measured in alternating blocks of the same process.
        timings: of A and of B.
        load: load average per core of this machine before the run.
    """
    first, second = pair
    turns, p50 = turns_of(*samples)
    ci95 = ratio_interval(*turns)
    accuracy = []
    for number in shared_suites(first, second, suites):
        labels = suites[number].labels
        own, other = logits[first.key, number], logits[second.key, number]
        correct = metrics.correct(own, labels), metrics.correct(other, labels)
        accuracy.append(
            SuiteComparison(
                suite=suites[number].name,
                n=len(labels),
                a=float(correct[0].mean()),
                b=float(correct[1].mean()),
                agreement=metrics.agreement(own, other),
                **difference([correct]).model_dump(),
            )
        )
    return Comparison(
        a_run=first.run,
        a=first.name,
        b_run=second.run,
        b=second.name,
        p50_a_ms=p50[0],
        p50_b_ms=p50[1],
        p50_ratio=p50[0] / p50[1],
        p50_ratio_ci95=ci95,
        withheld=reason_to_withhold(timings, ci95, load),
        turns=len(turns[0]),
        processes=len(samples[0]),
        accuracy=tuple(accuracy),
    )


def speed_rows(
    rows: Sequence[LatencyRow],
    parts: Mapping[tuple[str, str], Sequence[LatencySamples]],
    environment: Mapping[str, Any],
) -> tuple[SpeedRow, ...]:
    """Compare the latencies of every pair of exported files of one run on one device.

    Args:
        parts: (run, subject) → the samples of each process.
    """
    draws = {
        row.who: percentile_draws(*joined(parts[row.who]), (50,), seed=seed)[:, 0]
        for seed, row in enumerate(rows)
    }
    result = []
    for a, b in combinations(rows, 2):
        if (a.run, a.device) == (b.run, b.device):
            ci95 = interval_of(draws[a.who] / draws[b.who])
            load = load_of(environment, a.device)
            result.append(
                SpeedRow(
                    a_run=a.run,
                    a=a.subject,
                    b_run=b.run,
                    b=b.subject,
                    device=a.device,
                    ratio=a.p50_ms / b.p50_ms,
                    ci95=ci95,
                    withheld=reason_to_withhold((a.timing, b.timing), ci95, load),
                )
            )
    return tuple(result)


def gain_rows(
    subjects: Sequence[Subject],
    suites: Sequence[Suite],
    logits: Logits,
    runs: Sequence[Mapping[str, Any]],
) -> Iterator[GainRow]:
    """Compare each run with a baseline, by subjects of the same name on the images of both runs.

    The base of a distilled run is the first run without a teacher. A run with unlabelled images is also compared with
    the first other run without them, preferably of the same recipe. Otherwise the base is the first run.

    Args:
        runs: facts of each run: `name`, `recipe`, and `unlabelled` where unlabelled images took part in training.
    """
    students: dict[str, dict[str, Subject]] = {subject.run: {} for subject in subjects}
    for subject in subjects:
        if subject.kind != "teacher":
            students[subject.run][subject.name] = subject
    for run, base, cause in _bases([facts for facts in runs if facts["name"] in students]):
        for name, subject in students[run].items():
            if name in students[base]:
                yield from _gains(subject, students[base][name], cause, suites, logits)


def _bases(runs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, Cause]]:
    """Yield (run, base run, cause) for each pair to compare."""
    plain = [one for one in runs if one.get("recipe") in BASELINES and not one.get("unlabelled")]
    for one in runs:
        if plain and one.get("recipe") not in BASELINES:
            yield one["name"], plain[0]["name"], "distillation"
        if one.get("unlabelled"):
            without = [other for other in runs if not other.get("unlabelled")]
            without.sort(key=lambda other: other.get("recipe") != one.get("recipe"))
            if without:
                yield one["name"], without[0]["name"], "unlabelled"
    if not plain:
        for one in runs[1:]:
            if not one.get("unlabelled"):
                yield one["name"], runs[0]["name"], "run"


def _gains(
    subject: Subject, base: Subject, cause: Cause, suites: Sequence[Suite], logits: Logits
) -> Iterator[GainRow]:
    kinds = [suite.name.partition(":")[0] for suite in suites]
    bases = {
        _content(suite): n
        for n, suite in enumerate(suites)
        if suite.holds(base) and kinds[n] in get_args(Where)
    }
    for where in get_args(Where):
        shared = [
            (n, bases[_content(suite)])
            for n, suite in enumerate(suites)
            if suite.holds(subject) and kinds[n] == where and _content(suite) in bases
        ]
        pairs = [
            (
                metrics.correct(logits[subject.key, number], suites[number].labels),
                metrics.correct(logits[base.key, other], suites[number].labels),
            )
            for number, other in shared
        ]
        if pairs:
            yield GainRow(
                run=subject.run,
                subject=subject.name,
                base_run=base.run,
                cause=cause,
                where=where,
                suites=tuple(suites[number].name for number, _ in shared),
                n=sum(len(suites[number].indices) for number, _ in shared),
                gain=difference(pairs),
            )


def _content(suite: Suite) -> tuple[object, ...]:
    """Return what identifies the images of a suite, their order, labels and classes."""
    ids = tuple(suite.images.ids[index] for index in suite.indices)
    return ids, suite.labels.tobytes(), suite.images.classes
