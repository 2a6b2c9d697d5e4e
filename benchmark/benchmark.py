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

from edgekd.benchmark.clock_images import buffers_of, encoded_of
from edgekd.benchmark.compare import check_comparable, compare, gain_rows
from edgekd.benchmark.device import device_facts
from edgekd.benchmark.evaluate.accuracy import predict_suite
from edgekd.benchmark.evaluate.aggregate import suite_row
from edgekd.benchmark.evaluate.scores import Logits, score
from edgekd.benchmark.gates import Gate, evaluate
from edgekd.benchmark.measure import environment
from edgekd.benchmark.measure.energy import per_image
from edgekd.benchmark.measure.intervals import percentile
from edgekd.benchmark.measure.latency import (
    CONTEXT,
    END_TO_END,
    END_TO_END_QUICK,
    FULL,
    QUICK,
    LatencySamples,
    Protocol,
    measure_interleaved,
    rotating,
    summarise,
)
from edgekd.benchmark.measure.local import measure_artifacts, measure_end_to_end
from edgekd.benchmark.measure.placement import placement_rows
from edgekd.benchmark.measure.speed import load_of, speed_rows
from edgekd.benchmark.measure.throughput import Grid, throughput_rows
from edgekd.benchmark.report.notes import notes
from edgekd.benchmark.report.rows import HERE
from edgekd.benchmark.report.schema import Comparison, Report
from edgekd.benchmark.report.timings import EnergyRow, LatencyRow
from edgekd.benchmark.report.write import write_report
from edgekd.benchmark.subjects import Subject, Suite
from edgekd.core.console import say
from edgekd.core.errors import EdgekdError
from edgekd.core.folders import REPORT, publishing
from edgekd.targets.devices.result import Clocked


def run_benchmark(
    subjects: Sequence[Subject],
    suites: Sequence[Suite],
    out: Path,
    *,
    quick: bool = False,
    threads: int | None = None,
    context: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    gates: Sequence[Gate] = (),
    compared: tuple[Subject, Subject] | None = None,
    examples: bool = True,
    energy: str | None = None,
    grid: Grid | None = None,
) -> Report:
    """Measure accuracy and latency of all subjects and write the report folder `out` in one step.

    Args:
        subjects: several runs may be measured together; each run's teacher and torch student are its references.
        suites: `id` and `ood:<domain>`; a suite of one run is only used for that run's subjects.
        out: gets report.html, report.json, report.md, report.png, MODEL_CARD.md, predictions.npz and latency.npz.
        quick: the short latency protocol, marked everywhere.
        threads: threads inside an artifact's runtime; None leaves it to the runtime's default.
        context: what to tell the reader besides; `runs` is a list of mappings, each a run's `name` and facts.
        overwrite: replace an earlier report at `out`.
        gates: what every artifact must fulfil; the report says whether it does, nothing is raised.
        compared: two of the subjects, artifacts, to set beside each other; their latencies are then measured in
            alternating blocks of the same processes.
        examples: show small copies of misclassified images in report.html.
        energy: sensor to read while the artifacts' clock runs, one of `energy.SENSORS`; None reports none.
        grid: batch sizes and thread counts to take throughput at here, apart from the latency; None takes none.

    Raises:
        EdgekdError: nothing to measure, two subjects of one name, `out` exists, an artifact that does not run or that
            falls back to another provider.
    """
    _check(subjects, suites, out, overwrite)
    if compared is not None:
        check_comparable(*compared, suites)
    protocol = QUICK if quick else FULL
    placements = tuple(placement_rows(subjects))
    before = environment.state()
    started = time.perf_counter()
    logits, beside = _predict(subjects, suites)
    accuracy_s = time.perf_counter() - started
    latency, parts, whole = _latency(
        subjects, suites, protocol, threads, together=compared is not None, energy=energy
    )
    throughput = throughput_rows(subjects, encoded_of(suites) if grid else (), grid, quick=quick)
    scores = score(subjects, suites, logits)
    facts = environment.describe() | {
        "before": before,
        "after": environment.state(),
        "devices": device_facts(subjects, beside),
    }
    seconds = {
        "accuracy": round(accuracy_s, 2),
        "latency": round(time.perf_counter() - started - accuracy_s, 2),
    }
    report = Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        quick=quick,
        notes=(),
        suites=tuple(suite_row(suite) for suite in suites),
        summary=scores.summary,
        gains=tuple(gain_rows(subjects, suites, logits, (context or {}).get("runs", ()))),
        accuracy=scores.accuracy,
        latency=tuple(latency),
        throughput=throughput,
        corruptions=scores.corruptions,
        cue_conflicts=scores.cue_conflicts,
        vocabularies=scores.vocabularies,
        unknowns=scores.unknowns,
        own_metrics=scores.own_metrics,
        comparisons=_comparisons(compared, suites, logits, parts, latency, facts),
        speed=speed_rows(
            scores.summary,
            latency,
            {(subject.run, subject.name): parts[subject.key] for subject in subjects},
            facts,
        ),
        placements=placements,
        protocol={
            "latency": asdict(protocol),
            "latency_context": asdict(CONTEXT),
            "preprocess": {
                s.preprocess.hash: s.preprocess.model_dump(mode="json") for s in subjects
            },
            "seconds": seconds,
        },
        context=dict(context or {}),
        environment=facts,
    )
    found = {"notes": tuple(notes(report)), "gates": evaluate(gates, report), "folder": out}
    report = report.model_copy(update=found)
    raw = _raw(subjects, parts, whole)
    predictions = _predictions(subjects, suites, logits)
    with publishing(out, REPORT, overwrite=overwrite) as scratch:
        write_report(
            report, scratch, predictions=predictions, latency=raw, shown=suites if examples else ()
        )
    return report


def _comparisons(
    compared: tuple[Subject, Subject] | None,
    suites: Sequence[Suite],
    logits: Logits,
    parts: Mapping[str, list[LatencySamples]],
    latency: Sequence[LatencyRow],
    facts: Mapping[str, Any],
) -> tuple[Comparison, ...]:
    if compared is None:
        return ()
    first, second = compared
    row_of = {(row.run, row.subject): row for row in latency}
    rows = row_of[first.run, first.name], row_of[second.run, second.name]
    samples = parts[first.key], parts[second.key]
    return (compare(first, second, suites, logits, *samples, rows, load_of(facts, HERE)),)


def _check(
    subjects: Sequence[Subject], suites: Sequence[Suite], out: Path, overwrite: bool
) -> None:
    if not subjects:
        raise EdgekdError("There is no model to measure.", "Name a run or an artifact.")
    if not suites or any(len(suite.indices) == 0 for suite in suites):
        empty = next((suite.name for suite in suites if len(suite.indices) == 0), "any suite")
        raise EdgekdError(
            f"There are no images to measure on in {empty}.", "Check the data and its split."
        )
    names = [f"{subject.run}/{subject.name}" for subject in subjects]
    for name in names:
        if names.count(name) > 1:
            raise EdgekdError(
                f"{name} is to be measured twice.", "Name each run and artifact once."
            )
    for subject in subjects:
        if not any(suite.holds(subject) for suite in suites):
            raise EdgekdError(
                f"There are no images to measure {subject.name} of run {subject.run} on.", ""
            )
    REPORT.refuse(out, overwrite=overwrite)


def _predict(subjects: Sequence[Subject], suites: Sequence[Suite]) -> tuple[Logits, Logits]:
    """Logits of every subject, and what the artifacts that a device ran answer on this machine."""
    logits: Logits = {}
    beside: Logits = {}
    for number, suite in enumerate(suites):
        models = list(
            {subject.key: subject for subject in subjects if suite.holds(subject)}.values()
        )
        if models:
            if suite.corruption is None or suite.corruption[1] == 1:
                name = (
                    suite.name.replace(":1", " at severities 1–5")
                    if suite.corruption
                    else suite.name
                )
                where = name if suite.run is None else f"{name} of {suite.run}"
                say(f"accuracy on {where}: {len(suite.indices)} images, {len(models)} models")
            able = [subject for subject in models if subject.here]
            for subject, found in zip(
                able, predict_suite(able, suite) if able else (), strict=True
            ):
                (logits if subject.measured is None else beside)[subject.key, number] = found
            for subject in models:
                if subject.measured is not None:
                    logits[subject.key, number] = subject.measured.logits[number]
    return logits, beside


def _latency(
    subjects: Sequence[Subject],
    suites: Sequence[Suite],
    protocol: Protocol,
    threads: int | None,
    *,
    together: bool,
    energy: str | None,
) -> tuple[list[LatencyRow], dict[str, list[LatencySamples]], dict[str, Clocked]]:
    """A row for each subject; by its key the samples of each process, and an artifact's clock from file to answer."""
    models = {subject.key: subject for subject in subjects}
    buffers, prepare_ms = buffers_of(models.values(), suites)
    artifacts = {key: subject for key, subject in models.items() if subject.kind == "artifact"}
    others = {key: subject for key, subject in models.items() if subject.kind != "artifact"}
    if others:
        say(f"latency of {len(others)} models in this process, for context")
    beside = measure_interleaved(
        {
            key: rotating(subject.predict, buffers[subject.preprocess.hash])
            for key, subject in others.items()
        },
        CONTEXT,
    )
    here = {
        key: subject.folder
        for key, subject in artifacts.items()
        if subject.measured is None and subject.folder is not None
    }
    encoded = encoded_of(suites) if here else []
    exported = measure_artifacts(
        here,
        encoded,
        protocol,
        threads=threads,
        together=together,
        energy=energy,
    )
    whole = measure_end_to_end(
        here,
        encoded,
        END_TO_END_QUICK if protocol is QUICK else END_TO_END,
        threads=threads,
    )
    for key, subject in artifacts.items():
        if subject.measured is not None:
            exported[key], whole[key] = subject.measured.model, subject.measured.whole
    parts = {key: [one.samples for one in found] for key, found in exported.items()}
    parts |= {key: [found] for key, found in beside.items()}
    numbers = {key: summarise(found) for key, found in parts.items()}
    found_rows = []
    for subject in subjects:
        facts = {
            "provider": "torch",
            "threads": subject.threads,
            "protocol": CONTEXT.name,
            "load_ms": None,
        }
        if subject.key in exported:
            facts = _session_facts(exported[subject.key]) | _whole_facts(whole[subject.key])
            facts["protocol"] = protocol.name
            if subject.measured is not None:
                facts |= subject.measured.row_facts()
        else:
            # This process has called the model before (accuracy), so its first call is not a first inference.
            facts["first_ms"] = None
        found_rows.append(
            LatencyRow(
                run=subject.run,
                subject=subject.name,
                quick=protocol is QUICK,
                batch=1,
                buffers=len(buffers[subject.preprocess.hash]),
                device=subject.device,
                **(
                    {"prepare_p50_ms": prepare_ms[subject.preprocess.hash]}
                    | numbers[subject.key]
                    | facts
                ),
            )
        )
    return found_rows, parts, whole


def _whole_facts(whole: Clocked) -> dict[str, Any]:
    return {
        "end_to_end_p50_ms": percentile(whole.samples.samples_ms, 50),
        "end_to_end_p90_ms": percentile(whole.samples.samples_ms, 90),
        "peak_rss_mb": whole.peak_rss_mb,
    }


def _session_facts(found: Sequence[Clocked]) -> dict[str, Any]:
    return {
        "provider": found[0].provider,
        "threads": found[0].threads,
        "load_ms": float(np.median([one.load_ms for one in found])),
        "energy": _energy(found),
    }


def _energy(found: Sequence[Clocked]) -> EnergyRow | None:
    joules = [one.samples.joules for one in found if one.samples.joules is not None]
    told = [one.energy for one in found if one.energy is not None]
    if len(joules) < len(found) or len(told) < len(found):
        return None
    idle = [one["idle_w"] for one in told if one["idle_w"] is not None]
    facts = told[0] | {"idle_w": float(np.mean(idle)) if idle else None}
    images = sum(len(one.samples.samples_ms) for one in found)
    return EnergyRow(**per_image(joules, [one.samples.metered_s for one in found], images, facts))


def _raw(
    subjects: Sequence[Subject],
    parts: Mapping[str, Sequence[LatencySamples]],
    whole: Mapping[str, Clocked],
) -> dict[str, NDArray[Any]]:
    """The arrays of latency.npz."""
    raw: dict[str, NDArray[Any]] = {}
    for subject in subjects:
        name = f"{subject.run}/{subject.name}"
        for process, part in enumerate(parts[subject.key]):
            raw[f"samples_ms/{name}/{process}"] = part.samples_ms
            raw[f"blocks/{name}/{process}"] = part.blocks
        if subject.key in whole:
            raw[f"end_to_end_ms/{name}"] = whole[subject.key].samples.samples_ms
    return raw


def _predictions(
    subjects: Sequence[Subject], suites: Sequence[Suite], logits: Logits
) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    for number, suite in enumerate(suites):
        name = suite.name if suite.run is None else f"{suite.run}/{suite.name}"
        arrays[f"labels/{name}"] = suite.labels
        arrays[f"classes/{name}"] = np.asarray(suite.images.classes)
        arrays[f"domains/{name}"] = np.unique(suite.domain_of, return_inverse=True)[1]
        if suite.texture is not None:
            arrays[f"texture/{name}"] = suite.texture
        arrays[f"ids/{name}"] = np.asarray([suite.images.ids[index] for index in suite.indices])
        for subject in subjects:
            if suite.holds(subject):
                arrays[f"logits/{subject.run}/{subject.name}/{suite.name}"] = logits[
                    subject.key, number
                ]
    return arrays
