"""The latency, throughput and placement rows of a report, measured here or taken from a device's results."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.evaluate.predictions import prepare
from edgekd.benchmark.measure import local
from edgekd.benchmark.results.rows import EnergyRow, LatencyRow, PlacementRow, ThroughputRow
from edgekd.benchmark.subjects import Subject, Suite, clock_places
from edgekd.configs.benchmark import SpeedOptions
from edgekd.core.console import say
from edgekd.targets.devices.payload import encoded_image
from edgekd.targets.devices.result import Clocked, Rate
from edgekd.targets.session import refuse_fallback
from edgekd.targets.timing import stopwatch
from edgekd.targets.timing.intervals import percentile, rate_interval
from edgekd.targets.timing.stopwatch import LatencySamples, Protocol, rotating

RATE = Protocol("throughput", 50, 3.0, 30.0, 10, 10.0, 60.0, 1.0, 1)
RATE_QUICK = Protocol("throughput, quick", 50, 1.0, 5.0, 5, 2.0, 10.0, 0.2, 1)
"""Warm-up as for latency; the measurement is shorter, since every combination needs one."""


@dataclass(frozen=True, eq=False)
class Timings:
    """Latency rows, and by subject's key the samples of each process and an artifact's end-to-end latency."""

    rows: tuple[LatencyRow, ...]
    parts: dict[str, list[LatencySamples]]
    end_to_end: dict[str, Clocked]

    def arrays(self, subjects: Sequence[Subject]) -> dict[str, NDArray[Any]]:
        """Return the arrays of latency.npz."""
        arrays: dict[str, NDArray[Any]] = {}
        for subject in subjects:
            name = f"{subject.run}/{subject.name}"
            for process, part in enumerate(self.parts[subject.key]):
                arrays[f"samples_ms/{name}/{process}"] = part.samples_ms
                arrays[f"blocks/{name}/{process}"] = part.blocks
            if subject.key in self.end_to_end:
                samples_ms = self.end_to_end[subject.key].samples.samples_ms
                arrays[f"end_to_end_ms/{name}"] = samples_ms
        return arrays


def time_subjects(
    subjects: Sequence[Subject], suites: Sequence[Suite], speed: SpeedOptions, *, together: bool
) -> Timings:
    """Measure the latency of every subject, artifacts in fresh processes and the others briefly in this one.

    Args:
        together: measure the artifacts in alternating blocks of the same processes, for a ratio.
    """
    models = {subject.key: subject for subject in subjects}
    buffers, prepare_ms = _buffers(models.values(), suites)
    protocol = stopwatch.QUICK if speed.quick else stopwatch.FULL
    background = {key: one for key, one in models.items() if one.kind != "artifact"}
    if background:
        say("background latency of teacher and torch student, in this process")
    runners = {
        key: rotating(one.predict, buffers[one.preprocess.hash]) for key, one in background.items()
    }
    measured = stopwatch.measure_interleaved(runners, stopwatch.CONTEXT)
    parts = {key: [samples] for key, samples in measured.items()}
    here = {k: one.folder for k, one in models.items() if one.folder and not one.measured}
    encoded = encoded_images(suites) if here else []
    clocks = local.measure_artifacts(
        here, encoded, protocol, threads=speed.threads, together=together, energy=speed.energy
    )
    brief = stopwatch.END_TO_END_QUICK if speed.quick else stopwatch.END_TO_END
    end_to_end = local.measure_end_to_end(here, encoded, brief, threads=speed.threads)
    for key, subject in models.items():
        if subject.measured is not None:
            clocks[key] = subject.measured.result.model
            end_to_end[key] = subject.measured.result.whole
    parts |= {key: [one.samples for one in each] for key, each in clocks.items()}
    numbers = {key: stopwatch.summarise(each) for key, each in parts.items()}
    rows = []
    for subject in subjects:
        key, pixels = subject.key, subject.preprocess.hash
        facts: dict[str, Any] = {"prepare_p50_ms": prepare_ms[pixels]} | numbers[key]
        if key in clocks:
            facts |= _session(clocks[key], end_to_end[key]) | {"protocol": protocol.name}
        else:
            # This process has called the model before (accuracy), so its first call is not a first inference.
            facts |= {"first_ms": None, "load_ms": None, "protocol": stopwatch.CONTEXT.name}
            facts |= {"provider": "torch", "threads": subject.threads}
        if subject.measured is not None:
            facts["prepare_p50_ms"] = percentile(subject.measured.result.prepare_ms, 50)
        rows.append(
            LatencyRow(
                run=subject.run,
                subject=subject.name,
                quick=speed.quick,
                batch=1,
                buffers=len(buffers[pixels]),
                device=subject.device,
                **facts,
            )
        )
    return Timings(tuple(rows), parts, end_to_end)


def encoded_images(suites: Sequence[Suite]) -> list[bytes]:
    """Return the images to be timed as they lie in files, drawn ones as PNG."""
    number, chosen = clock_places(suites)
    return [encoded_image(suites[number].images, index) for index in chosen.tolist()]


def _buffers(
    models: Iterable[Subject], suites: Sequence[Suite]
) -> tuple[dict[str, NDArray[np.uint8]], dict[str, float]]:
    """Return by preprocess hash at least 64 prepared images, and the median time to read and prepare one, in ms."""
    number, chosen = clock_places(suites)
    buffers: dict[str, NDArray[np.uint8]] = {}
    prepare_ms: dict[str, float] = {}
    for preprocess in {subject.preprocess.hash: subject.preprocess for subject in models}.values():
        images, times = [], []
        for index in chosen.tolist():
            before = time.perf_counter_ns()
            images.append(prepare(suites[number].images, index, preprocess))
            times.append((time.perf_counter_ns() - before) / 1e6)
        buffers[preprocess.hash] = np.stack(images)  # [64, H, W, 3]
        prepare_ms[preprocess.hash] = percentile(np.asarray(times), 50)
    return buffers, prepare_ms


def _session(processes: Sequence[Clocked], whole: Clocked) -> dict[str, Any]:
    """Return what a latency row holds of an artifact besides the latency of the model."""
    return {
        "provider": processes[0].provider,
        "threads": processes[0].threads,
        "load_ms": float(np.median([one.load_ms for one in processes])),
        "energy": energy_row(processes),
        "end_to_end_p50_ms": percentile(whole.samples.samples_ms, 50),
        "end_to_end_p90_ms": percentile(whole.samples.samples_ms, 90),
        "peak_rss_mb": whole.peak_rss_mb,
    }


def energy_row(processes: Sequence[Clocked]) -> EnergyRow | None:
    """Return the energy per image over the measured blocks of all processes; None unless each has it."""
    sensors = [one.energy for one in processes if one.energy is not None]
    joules = [one.samples.joules for one in processes if one.samples.joules is not None]
    if min(len(sensors), len(joules)) < len(processes):
        return None
    total, seconds = sum(joules), sum(one.samples.metered_s for one in processes)
    images = sum(len(one.samples.samples_ms) for one in processes)
    rest = [one.idle_w for one in sensors if one.idle_w is not None]
    idle_w = float(np.mean(rest)) if rest else None
    return EnergyRow(
        joules_per_image=total / images,
        joules_per_image_above_idle=None if idle_w is None else (total - idle_w * seconds) / images,
        mean_w=total / seconds,
        idle_w=idle_w,
        seconds=seconds,
        sensor=sensors[0].sensor,
        covers=sensors[0].covers,
    )


def throughput_rows(
    subjects: Sequence[Subject], encoded: Sequence[bytes], speed: SpeedOptions
) -> tuple[ThroughputRow, ...]:
    """Measure images per second of each artifact at each batch size and thread count of `speed.grid`.

    Args:
        encoded: images as they are in files, in rotation.

    Raises:
        EdgekdError: an artifact that does not run one image at a time.
    """
    protocol = RATE_QUICK if speed.quick else RATE
    rows = []
    for subject in subjects:
        rates: list[Rate] = []
        if subject.measured is not None:
            rates = list(subject.measured.result.rates)
        elif subject.folder is not None:
            for batch, threads in speed.grid:
                how = threads or "as the runtime chooses"
                say(f"throughput of {subject.name}: batch {batch}, threads {how}")
                rates.append(local.measure_rate(subject.folder, encoded, protocol, batch, threads))
        rows += [_rate_row(subject, rate) for rate in rates]
    return tuple(rows)


def _rate_row(subject: Subject, rate: Rate) -> ThroughputRow:
    numbers: dict[str, Any] = {"threads": rate.threads, "reason": rate.reason}
    if rate.clock is not None:
        samples = rate.clock.samples
        seconds = float(samples.samples_ms.sum()) / 1e3
        numbers = {
            "threads": rate.clock.threads,
            "images_per_s": rate.batch * len(samples.samples_ms) / seconds,
            "images_per_s_ci95": rate_interval(samples.samples_ms, samples.blocks, rate.batch),
            "calls": len(samples.samples_ms),
            "settled": samples.settled,
        }
    return ThroughputRow(
        run=subject.run, subject=subject.name, device=subject.device, batch=rate.batch, **numbers
    )


def placement_rows(subjects: Sequence[Subject]) -> Iterator[PlacementRow]:
    """Yield where every node of each artifact ran; a part on another provider than requested is an `EdgekdError`."""
    for subject in {one.key: one for one in subjects if one.folder is not None}.values():
        if subject.measured is None:
            placement, provider = subject.placement(), ""
        else:
            placement = subject.measured.result.placement
            provider = subject.measured.result.model[0].provider
        if placement is not None:
            refuse_fallback(f"{subject.run}/{subject.name}", placement)
        yield PlacementRow(
            run=subject.run,
            subject=subject.name,
            provider=provider if placement is None else placement.provider,
            nodes=None if placement is None else placement.nodes,
            source="the runtime does not report it" if placement is None else placement.source,
            device=subject.device,
        )
