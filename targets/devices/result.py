"""What a device sent back, checked: a result may come from anywhere, so every value in it has a type and bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.measure.latency import LatencySamples
from edgekd.benchmark.report.schema import Machine
from edgekd.core.errors import EdgekdError
from edgekd.core.readers import printable
from edgekd.targets.agent.job import Job, number, parse_job, short_text, whole
from edgekd.targets.agent.store import Arrays, read_step
from edgekd.targets.session import Placement


@dataclass(frozen=True, eq=False)
class Clocked:
    """One process that measured one artifact."""

    samples: LatencySamples
    load_ms: float
    provider: str
    threads: int
    energy: dict[str, Any] | None = None
    """What `energy.Meter.facts` says; None without a sensor."""
    peak_rss_mb: float | None = None
    """Largest resident memory of a process that held this artifact alone, in 10^6 bytes."""


@dataclass(frozen=True, eq=False)
class Rate:
    """The throughput of one artifact at one batch size and number of threads."""

    batch: int
    threads: int | None
    """As asked for; None left them to the runtime."""
    clock: Clocked | None
    """One sample for each whole batch; None where it refused."""
    reason: str | None


@dataclass(frozen=True)
class Built:
    """An engine that a device built for itself from an artifact, once, before anything was timed."""

    builder: str
    version: str
    gpu: str
    compute_capability: str
    seconds: float


@dataclass(frozen=True, eq=False)
class ArtifactResult:
    """One artifact on one device.

    Attributes:
        logits: float32 `[n, C]`, in the order of the job's images.
        pixels: CRC-32 of each prepared image, uint32 `[n]`.
        model: the model's clock, one entry per process.
        whole: the clock from encoded image to logits.
        prepare_ms: of each of `whole`'s samples, the part that decoding and resizing took.
    """

    logits: NDArray[np.float32]
    pixels: NDArray[np.uint32]
    model: list[Clocked]
    whole: Clocked
    prepare_ms: NDArray[np.float64]
    placement: Placement | None
    """Which nodes ran where; None from an agent that did not ask."""
    rates: tuple[Rate, ...] = ()
    """One for each place of the job's grid."""
    built: Built | None = None
    """The engine that was built there; None where the file runs as it is."""


@dataclass(frozen=True, eq=False)
class DeviceResult:
    """`edgekd-result.npz`."""

    job: Job
    artifacts: tuple[ArtifactResult, ...]
    name: str
    """What the device calls itself."""
    environment: dict[str, Any]
    emulated: bool
    restarts: int
    """How often the device's system was started anew between the steps."""
    temperature_max_c: float | None


@dataclass(frozen=True, eq=False)
class StoredResult:
    """A result file that was read and not checked yet, but for its job."""

    path: Path
    job: Job
    arrays: Arrays
    facts: dict[str, Any]


def open_result(path: Path) -> StoredResult:
    """Read a result file and its job.

    Raises:
        EdgekdError: no result, damaged, or of another format.
    """
    arrays, facts = read_step(path)
    return StoredResult(path, parse_job(facts.get("job")), arrays, facts)


def check_result(stored: StoredResult, job: Job) -> DeviceResult:
    """Return the result of `job`.

    Raises:
        EdgekdError: a result of another job, incomplete, or with a value out of bounds.
    """
    path, arrays, facts = stored.path, stored.arrays, stored.facts
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
        steps: dict[str, Any] = facts["steps"]
        built = facts.get("built") or [None] * len(job.artifacts)
        artifacts = tuple(
            _artifact(job, n, arrays, steps, _built(built[n])) for n in range(len(job.artifacts))
        )
        boots = [short_text(step["boot"]) for name in _names(job) if (step := steps[name])["boot"]]
        heat = [
            number(step[when]["temperature_c"], -273, 1000)
            for step in steps.values()
            for when in ("before", "after")
            if when in step and step[when]["temperature_c"] is not None
        ]
        machine = Machine.model_validate(facts["environment"]).model_dump()
        return DeviceResult(
            job,
            artifacts,
            short_text(facts["name"]),
            _checked_texts(machine),
            _flag(facts["emulated"]),
            sum(one != other for one, other in pairwise(boots)),
            max(heat, default=None),
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise EdgekdError(
            f"{path} is not a whole result of the device agent ({printable(str(error))[:120]}).",
            "Copy it again, or measure again.",
        ) from error


def _checked_texts(value: Any) -> Any:
    """The same value, in which every text is printable; else a `ValueError`."""
    if isinstance(value, dict):
        return {short_text(name): _checked_texts(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_checked_texts(item) for item in value]
    return short_text(value, 256) if isinstance(value, str) else value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("neither true nor false")
    return value


def _names(job: Job) -> list[str]:
    return [name for group in job.steps() for name in group]


def _artifact(
    job: Job, place: int, arrays: Arrays, steps: Mapping[str, Any], built: Built | None
) -> ArtifactResult:
    names = _names(job)
    parts = [name for name in names if name.startswith(f"predict-{place}-")]
    clocks = [name for name in names if name.startswith(("latency-all-", f"latency-{place}-"))]
    logits = np.concatenate([arrays[f"{name}/logits"] for name in parts])
    pixels = np.concatenate([arrays[f"{name}/pixels"] for name in parts])
    n = len(job.artifacts[place].images)
    if logits.ndim != 2 or logits.dtype != np.float32 or len(logits) != n or pixels.shape != (n,):
        raise ValueError("predictions of another shape than the job's images")
    if pixels.dtype != np.uint32 or not logits.shape[1]:
        raise ValueError("predictions of another type")
    if not np.isfinite(logits).all():
        raise ValueError("logits that are not finite")
    whole_step = f"endtoend-{place}"
    prepare_ms = arrays[f"{whole_step}/prepare_ms_{place}"]
    found = clocked(whole_step, place, arrays, steps)
    if prepare_ms.shape != found.samples.samples_ms.shape:
        raise ValueError("another number of preparations than of samples")
    return ArtifactResult(
        logits,
        pixels,
        [clocked(name, place, arrays, steps) for name in clocks],
        found,
        _times(prepare_ms, least=0.0),
        _placement(steps[parts[0]].get("placement")),
        tuple(
            rate(asked, f"throughput-{place}-{cell}", place, arrays, steps)
            for cell, asked in enumerate(job.grid)
        ),
        built,
    )


def _built(told: Any) -> Built | None:
    if told is None:
        return None
    return Built(
        short_text(told["builder"]),
        short_text(told["version"]),
        short_text(told["gpu"], 128),
        short_text(told["compute_capability"]),
        number(told["seconds"], 0, 1e6),
    )


def rate(
    asked: tuple[int, int | None], name: str, place: int, arrays: Arrays, steps: Mapping[str, Any]
) -> Rate:
    """Return the throughput that the step `name` took; errors as `clocked`.

    Args:
        asked: batch size and threads.
        place: the artifact's number in the job.
    """
    batch, threads = asked
    if "reason" in steps[name]:
        return Rate(batch, threads, None, printable(str(steps[name]["reason"]))[:300])
    return Rate(batch, threads, clocked(name, place, arrays, steps), None)


def _placement(told: Any) -> Placement | None:
    if told is None:
        return None
    nodes = {
        short_text(who, 128): {
            short_text(kind, 128): whole(n, 0, 10**7) for kind, n in kinds.items()
        }
        for who, kinds in told["nodes"].items()
    }
    return Placement(short_text(told["asked"], 128), nodes, short_text(told["told_by"], 128))


def _times(values: NDArray[Any], *, least: float) -> NDArray[np.float64]:
    """Times in ms, float64 `[n]`; any that is not finite, below `least` or of more than a day is a `ValueError`."""
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "fiu":
        raise ValueError("times of another shape or type")
    times: NDArray[np.float64] = values.astype(np.float64)
    if not np.isfinite(times).all() or times.min() < least or times.max() > 86_400_000:
        raise ValueError("a time that is none")
    return times


def clocked(name: str, place: int, arrays: Arrays, steps: Mapping[str, Any]) -> Clocked:
    """Return what the step `name` measured of one artifact.

    Args:
        place: the artifact's number in the job.
        arrays: `NAME/ARRAY` → values.
        steps: name → facts.

    Raises:
        ValueError, KeyError, TypeError: values that are none.
    """
    memory = steps[name].get("peak_rss_mb")
    facts = steps[name][str(place)]
    samples_ms, blocks = arrays[f"{name}/samples_ms_{place}"], arrays[f"{name}/blocks_{place}"]
    times = _times(samples_ms, least=1e-6)
    if blocks.shape != times.shape or blocks.dtype.kind not in "iu" or (np.diff(blocks) < 0).any():
        raise ValueError("blocks that do not belong to the samples")
    samples = LatencySamples(
        times,
        blocks.astype(np.int64),
        number(facts["first_ms"], 0, 86_400_000),
        whole(facts["warmup_runs"], 0, 10**9),
        number(facts["warmup_s"], 0, 86_400),
        _flag(facts["settled"]),
        _flag(facts["complete"]),
        None if facts.get("joules") is None else number(facts["joules"], 0, 1e9),
        number(facts.get("metered_s", 0.0), 0, 86_400),
        *(
            None if facts.get(part) is None else number(facts[part], 0, 1e6)
            for part in ("other_cpu", "stolen_cpu")
        ),
    )
    energy = facts.get("energy")
    if energy is not None:
        idle = energy["idle_w"]
        energy = {
            "sensor": short_text(energy["sensor"]),
            "covers": short_text(energy["covers"], 256),
            "idle_w": None if idle is None else number(idle, 0, 1e6),
        }
    return Clocked(
        samples,
        number(facts["load_ms"], 0, 86_400_000),
        short_text(facts["provider"], 128),
        whole(facts["threads"], 0, 4096),
        energy,
        None if memory is None else number(memory, 0, 1e9),
    )
