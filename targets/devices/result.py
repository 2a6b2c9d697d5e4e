"""The result of a device, checked: it may come from anywhere, so every value has a type and bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import first_problem
from edgekd.core.readers import printable
from edgekd.targets.agent.job import Job, parse_job
from edgekd.targets.agent.store import Arrays, read_step
from edgekd.targets.session import Placement
from edgekd.targets.timing.stopwatch import LatencySamples

_DAY_MS = 86_400_000


def _printable(text: str) -> str:
    if printable(text) != text:
        raise ValueError("not a text of printable characters")
    return text


Word = Annotated[str, Field(max_length=64), AfterValidator(_printable)]
Line = Annotated[str, Field(max_length=256), AfterValidator(_printable)]
Milliseconds = Annotated[float, Field(ge=0, le=_DAY_MS)]
Seconds = Annotated[float, Field(ge=0, le=86_400)]
Share = Annotated[float, Field(ge=0, le=1e6)]
Watts = Annotated[float, Field(ge=0, le=1e6)]


class _Facts(BaseModel):
    """Facts from a foreign file: exact types, finite numbers; fields that are not declared are dropped."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class State(_Facts):
    """What changes while measuring (`machine.state`)."""

    load_average: float | None = Field(ge=0, le=1e6)
    cpu_mhz: float | None = Field(ge=0, le=1e6)
    temperature_c: float | None = Field(ge=-273, le=1000)
    throttle_count: int | None = Field(ge=0)
    throttle_flags: str | None = Field(pattern=r"^0x[0-9a-fA-F]{1,16}$")
    power_mode: Line | None


class Machine(_Facts):
    """What was measured on (`machine.describe`), with the states before and after."""

    cpu: Line | None
    features: list[Line] = Field(max_length=256)
    cores: int | None = Field(ge=1, le=10**6)
    usable_cores: int = Field(ge=1, le=10**6)
    machine: Line
    system: Line
    governor: Line | None
    python: Line
    versions: dict[Word, Line | None] = Field(max_length=256)
    before: State
    after: State


class Energy(_Facts):
    """The sensor that was read (`energy.Meter.facts`)."""

    sensor: Word
    covers: Line
    idle_w: Watts | None


class Built(_Facts):
    """An engine that a device built for itself from an artifact, once, before anything was timed."""

    builder: Word
    version: Word
    gpu: Annotated[Word, Field(max_length=128)]
    compute_capability: Word
    seconds: float = Field(ge=0, le=1e6)


class _Clock(_Facts):
    """The facts of a step about one artifact, besides its samples."""

    first_ms: Milliseconds
    warmup_runs: int = Field(ge=0, le=10**9)
    warmup_s: Seconds
    settled: bool
    complete: bool
    joules: float | None = Field(default=None, ge=0, le=1e9)
    metered_s: Seconds = 0.0
    other_cpu: Share | None = None
    stolen_cpu: Share | None = None
    load_ms: Milliseconds
    provider: Line
    threads: int = Field(ge=0, le=4096)
    energy: Energy | None = None


class _Placement(_Facts):
    provider: Line = Field(validation_alias=AliasChoices("provider", "asked"))
    nodes: dict[Line, dict[Line, Annotated[int, Field(ge=0, le=10**7)]]]
    source: Line = Field(validation_alias=AliasChoices("source", "told_by"))


class _Step(_Facts):
    """Facts of one step; those of its artifacts stand beside them under their numbers in the job."""

    boot: Word
    before: State | None = None
    after: State | None = None
    reason: str | None = None
    peak_rss_mb: float | None = Field(default=None, ge=0, le=1e9)
    placement: _Placement | None = None


class _Whole(_Facts):
    """The facts of a result file, without its job and its steps."""

    name: Word
    emulated: bool
    environment: Machine
    built: list[Built | None] | None = None


@dataclass(frozen=True, eq=False)
class Clocked:
    """One process that measured one artifact."""

    samples: LatencySamples
    load_ms: float
    provider: str
    threads: int
    energy: Energy | None = None
    peak_rss_mb: float | None = None
    """Largest resident memory of a process that held this artifact alone, in 10^6 bytes."""


@dataclass(frozen=True, eq=False)
class Rate:
    """The throughput of one artifact at one batch size and number of threads (None: the runtime's choice)."""

    batch: int
    threads: int | None
    clock: Clocked | None
    """One sample for each whole batch; None where it refused."""
    reason: str | None


@dataclass(frozen=True, eq=False)
class ArtifactResult:
    """One artifact on one device.

    Attributes:
        logits: float32 `[n, C]`, in the order of the job's images.
        pixels: CRC-32 of each prepared image, uint32 `[n]`.
        model: latencies of the model, one entry per process.
        whole: end-to-end latencies, from encoded image to logits.
        prepare_ms: of each of `whole`'s samples, the part that decoding and resizing took.
        placement: which nodes ran where; None where the runtime does not report it.
        rates: one for each place of the job's grid.
        built: the engine that was built there; None where the file runs as it is.
    """

    logits: NDArray[np.float32]
    pixels: NDArray[np.uint32]
    model: list[Clocked]
    whole: Clocked
    prepare_ms: NDArray[np.float64]
    placement: Placement | None = None
    rates: tuple[Rate, ...] = ()
    built: Built | None = None


@dataclass(frozen=True, eq=False)
class DeviceResult:
    """What a device measured.

    Attributes:
        facts: its environment; `emulated`; `restarts`, how often its system was started anew between the steps;
            `temperature_max_c`.
    """

    name: str
    artifacts: tuple[ArtifactResult, ...]
    facts: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Journal:
    """Entries of a job's journal: `arrays` by `STEP/ARRAY`, `steps` by name. Reading raises ValueError and KeyError."""

    arrays: Arrays
    steps: Mapping[str, Any]

    def clocked(self, name: str, place: int) -> Clocked:
        """Return what the step `name` measured of artifact number `place`."""
        blocks = self.arrays[f"{name}/blocks_{place}"]
        times = _times(self.arrays[f"{name}/samples_ms_{place}"], least=1e-6)
        is_order = blocks.dtype.kind in "iu" and blocks.shape == times.shape
        if not is_order or (np.diff(blocks) < 0).any():
            raise ValueError("blocks that do not belong to the samples")
        facts = _Clock.model_validate(self.steps[name][str(place)])
        own = facts.model_dump(exclude={"load_ms", "provider", "threads", "energy"})
        samples = LatencySamples(times, blocks.astype(np.int64), **own)
        memory = _Step.model_validate(self.steps[name]).peak_rss_mb
        return Clocked(samples, facts.load_ms, facts.provider, facts.threads, facts.energy, memory)

    def rate(self, name: str, place: int, batch: int, threads: int | None) -> Rate:
        """Return the throughput that the step `name` took, or why it was refused."""
        if "reason" in self.steps[name]:
            return Rate(batch, threads, None, printable(str(self.steps[name]["reason"]))[:300])
        return Rate(batch, threads, self.clocked(name, place), None)

    def artifact(self, job: Job, place: int, built: Built | None) -> ArtifactResult:
        """Return everything about artifact number `place`."""
        names = [name for group in job.steps() for name in group]
        parts = [name for name in names if name.startswith(f"predict-{place}-")]
        clocks = [name for name in names if name.startswith(("latency-all-", f"latency-{place}-"))]
        logits, pixels = (
            np.concatenate([self.arrays[f"{name}/{what}"] for name in parts])
            for what in ("logits", "pixels")
        )
        n = len(job.artifacts[place].images)
        if logits.ndim != 2 or len(logits) != n or pixels.shape != (n,) or not logits.shape[1]:
            raise ValueError("predictions of another shape than the job's images")
        if logits.dtype != np.float32 or pixels.dtype != np.uint32:
            raise ValueError("predictions of another type")
        if not np.isfinite(logits).all():
            raise ValueError("logits that are not finite")
        whole = self.clocked(f"endtoend-{place}", place)
        prepare_ms = _times(self.arrays[f"endtoend-{place}/prepare_ms_{place}"], least=0.0)
        if prepare_ms.shape != whole.samples.samples_ms.shape:
            raise ValueError("another number of preparations than of samples")
        placed = _Step.model_validate(self.steps[parts[0]]).placement
        return ArtifactResult(
            logits,
            pixels,
            [self.clocked(name, place) for name in clocks],
            whole,
            prepare_ms,
            None if placed is None else Placement(**placed.model_dump()),
            tuple(
                self.rate(f"throughput-{place}-{cell}", place, *batch_and_threads)
                for cell, batch_and_threads in enumerate(job.grid)
            ),
            built,
        )


@dataclass(frozen=True, eq=False)
class StoredResult:
    """A result file that was read; only its job is checked so far."""

    path: Path
    job: Job
    arrays: Arrays
    facts: dict[str, Any]


def open_result(path: Path) -> StoredResult:
    """Read a result file and its job; one that is damaged or of another format is an `EdgekdError`."""
    arrays, facts = read_step(path)
    return StoredResult(path, parse_job(facts.get("job")), arrays, facts)


def check_result(stored: StoredResult, job: Job) -> DeviceResult:
    """Return the result of `job`; one of another job, or with a value out of bounds, is an `EdgekdError`."""
    path = stored.path
    # Before the steps are expanded: a foreign job may name any number of them.
    if stored.job.artifacts != job.artifacts:
        names = ", ".join(one.name for one in stored.job.artifacts)[:200]
        raise EdgekdError(
            f"{path} is of other artifacts or images: {names}.",
            "Name the run, the --data and the suites that the bundle was made from.",
        )
    if stored.job != job:
        raise EdgekdError(
            f"{path} was measured on other images or by another rule.", "Make the bundle again."
        )
    try:
        return _result(job, Journal(stored.arrays, stored.facts["steps"]), stored.facts)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        why = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise EdgekdError(
            f"{path} is not a whole result of the device agent ({printable(why)[:120]}).",
            "Copy it again, or measure again.",
        ) from error


def _result(job: Job, journal: Journal, facts: dict[str, Any]) -> DeviceResult:
    whole = _Whole.model_validate(facts)
    built = whole.built or [None] * len(job.artifacts)
    steps = [_Step.model_validate(journal.steps[name]) for group in job.steps() for name in group]
    boots = [step.boot for step in steps if step.boot]
    states = [state for step in steps for state in (step.before, step.after) if state]
    heat = [state.temperature_c for state in states if state.temperature_c is not None]
    return DeviceResult(
        whole.name,
        tuple(journal.artifact(job, n, built[n]) for n in range(len(job.artifacts))),
        {
            "emulated": whole.emulated,
            "restarts": sum(one != other for one, other in pairwise(boots)),
            "temperature_max_c": max(heat, default=None),
            **whole.environment.model_dump(),
        },
    )


def _times(values: NDArray[Any], *, least: float) -> NDArray[np.float64]:
    """Return times in ms as float64 `[n]`; not finite, below `least` or more than a day is a `ValueError`."""
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "fiu":
        raise ValueError("times of another shape or type")
    times: NDArray[np.float64] = values.astype(np.float64)
    if not np.isfinite(times).all() or times.min() < least or times.max() > _DAY_MS:
        raise ValueError("a time out of bounds")
    return times
