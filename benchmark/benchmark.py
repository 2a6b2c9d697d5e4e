"""The whole measurement: logits of every subject on every suite, latency of every subject, one report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.compare import compare, gain_rows, shared_suites, speed_rows
from edgekd.benchmark.device import device_facts
from edgekd.benchmark.evaluate.accuracy import score, suite_row
from edgekd.benchmark.evaluate.predictions import predict_suites
from edgekd.benchmark.gates import Gate, evaluate
from edgekd.benchmark.measure.timings import (
    Timings,
    encoded_images,
    placement_rows,
    throughput_rows,
    time_subjects,
)
from edgekd.benchmark.report.summary import notes
from edgekd.benchmark.report.write import write_report
from edgekd.benchmark.results.rows import HERE
from edgekd.benchmark.results.schema import Comparison, Report, load_of
from edgekd.benchmark.subjects import Logits, Subject, Suite
from edgekd.configs.benchmark import SpeedOptions
from edgekd.core import machine
from edgekd.core.errors import EdgekdError
from edgekd.targets.timing import stopwatch


def run_benchmark(
    subjects: Sequence[Subject],
    suites: Sequence[Suite],
    out: Path,
    speed: SpeedOptions | None = None,
    *,
    context: Mapping[str, Any] | None = None,
    gates: Sequence[Gate] = (),
    compared: tuple[Subject, Subject] | None = None,
    examples: bool = True,
) -> Report:
    """Measure accuracy and latency of all subjects and write the report into the folder `out`.

    Args:
        subjects: of one or several runs; each run's teacher and torch student are its references.
        context: further facts for the report; `runs` is a list of mappings, each a run's `name` and facts.
        gates: evaluated in the report; a failed one raises nothing.
        compared: two artifacts, whose latencies are then measured in alternating blocks of the same processes.
        examples: show small copies of misclassified images in report.html.

    Raises:
        EdgekdError: nothing to measure, two subjects of one name, an artifact that does not run or that falls back to
            another provider.
    """
    speed = speed or SpeedOptions()
    _check(subjects, suites)
    if compared is not None:
        shared_suites(*compared, suites)
    placements = tuple(placement_rows(subjects))
    before, started = machine.state(), time.perf_counter()
    logits, local_logits = predict_suites(subjects, suites)
    accuracy_s = time.perf_counter() - started
    timings = time_subjects(subjects, suites, speed, together=compared is not None)
    throughput = throughput_rows(subjects, encoded_images(suites) if speed.grid else (), speed)
    environment = machine.describe() | {
        "before": before,
        "after": machine.state(),
        "devices": device_facts(subjects, local_logits),
    }
    samples = {subject.who: timings.parts[subject.key] for subject in subjects}
    report = Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        quick=speed.quick,
        notes=(),
        suites=tuple(suite_row(suite) for suite in suites),
        **score(subjects, suites, logits),
        gains=tuple(gain_rows(subjects, suites, logits, (context or {}).get("runs", ()))),
        latency=timings.rows,
        throughput=throughput,
        comparisons=_comparisons(compared, suites, logits, timings, environment),
        placements=placements,
        protocol={
            "latency": asdict(stopwatch.QUICK if speed.quick else stopwatch.FULL),
            "latency_context": asdict(stopwatch.CONTEXT),
            "preprocess": {
                one.preprocess.hash: one.preprocess.model_dump(mode="json") for one in subjects
            },
            "seconds": {
                "accuracy": round(accuracy_s, 2),
                "latency": round(time.perf_counter() - started - accuracy_s, 2),
            },
        },
        context=dict(context or {}),
        environment=environment,
        folder=out,
    )
    speeds = speed_rows(report.exported_latency, samples, environment)
    report = report.model_copy(update={"speed": speeds})
    judged = {"notes": tuple(notes(report)), "gates": evaluate(gates, report)}
    report = report.model_copy(update=judged)
    arrays = _predictions(subjects, suites, logits), timings.arrays(subjects)
    write_report(report, *arrays, suites if examples else ())
    return report


def _comparisons(
    compared: tuple[Subject, Subject] | None,
    suites: Sequence[Suite],
    logits: Logits,
    timings: Timings,
    environment: Mapping[str, Any],
) -> tuple[Comparison, ...]:
    if compared is None:
        return ()
    first, second = (timings.parts[one.key] for one in compared)
    quality = [row.timing for one in compared for row in timings.rows if row.who == one.who]
    load = load_of(environment, HERE)
    return (compare(compared, suites, logits, (first, second), quality, load),)


def _check(subjects: Sequence[Subject], suites: Sequence[Suite]) -> None:
    if not subjects:
        raise EdgekdError("There is no model to measure.", "Name a run or an artifact.")
    if not suites or any(len(suite.indices) == 0 for suite in suites):
        empty = next((suite.name for suite in suites if len(suite.indices) == 0), "any suite")
        raise EdgekdError(
            f"There are no images to measure on in {empty}.", "Check the data and its split."
        )
    names = [f"{subject.run}/{subject.name}" for subject in subjects]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise EdgekdError(f"{twice} is to be measured twice.", "Name each run and artifact once.")
    for subject in subjects:
        if not any(suite.holds(subject) for suite in suites):
            raise EdgekdError(
                f"There are no images to measure {subject.name} of run {subject.run} on.",
                "Give images with --data or --ood NAME=DIR.",
            )


def _predictions(
    subjects: Sequence[Subject], suites: Sequence[Suite], logits: Logits
) -> dict[str, NDArray[Any]]:
    """Return the arrays of predictions.npz."""
    arrays: dict[str, NDArray[Any]] = {}
    for number, suite in enumerate(suites):
        name = suite.name if suite.run is None else f"{suite.run}/{suite.name}"
        arrays[f"labels/{name}"] = suite.labels
        arrays[f"classes/{name}"] = np.asarray(suite.images.classes)
        arrays[f"domains/{name}"] = np.unique(suite.domain_of, return_inverse=True)[1]
        if suite.texture is not None:
            arrays[f"texture/{name}"] = suite.texture
        arrays[f"ids/{name}"] = np.asarray([suite.images.ids[index] for index in suite.indices])
        for subject in (one for one in subjects if suite.holds(one)):
            own = f"logits/{subject.run}/{subject.name}/{suite.name}"
            arrays[own] = logits[subject.key, number]
    return arrays
