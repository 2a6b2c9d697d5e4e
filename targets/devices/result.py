"""What a device sent back, checked: a result may come from anywhere, so nothing in it is believed unseen."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.latency import LatencySamples
from edgekd.errors import EdgekdError
from edgekd.targets.agent.job import Job, parse_job
from edgekd.targets.agent.store import Arrays, read_step
from edgekd.targets.placement import Placement


@dataclass(frozen=True, eq=False)
class Clocked:
    """One process that measured one artifact."""

    samples: LatencySamples
    load_ms: float
    provider: str
    threads: int
    energy: dict[str, Any] | None


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
        peak_rss_mb: largest resident memory of the process of `whole`, in 10^6 bytes.
    """

    logits: NDArray[np.float32]
    pixels: NDArray[np.uint32]
    model: list[Clocked]
    whole: Clocked
    prepare_ms: NDArray[np.float64]
    peak_rss_mb: float | None
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


def read_result(path: Path) -> DeviceResult:
    """Load a result file.

    Raises:
        EdgekdError: no result, damaged, incomplete, or of another format.
    """
    if not path.is_file():
        raise EdgekdError(
            f"There is no result at {path}.", "Give the .npz file that the device wrote."
        )
    try:
        arrays, facts = read_step(path)
        job = parse_job(facts["job"])
        steps: dict[str, Any] = facts["steps"]
        built = facts.get("built") or [None] * len(job.artifacts)
        artifacts = tuple(
            _artifact(job, n, arrays, steps, _built(built[n])) for n in range(len(job.artifacts))
        )
        boots = [step["boot"] for name in _names(job) if (step := steps[name])["boot"]]
        states = [
            step[when] for step in steps.values() for when in ("before", "after") if when in step
        ]
        return DeviceResult(
            job,
            artifacts,
            str(facts["name"]),
            dict(facts["environment"]),
            bool(facts["emulated"]),
            sum(one != other for one, other in pairwise(boots)),
            max(
                (state["temperature_c"] for state in states if state["temperature_c"] is not None),
                default=None,
            ),
        )
    except (
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        OSError,
        zipfile.BadZipFile,
    ) as error:
        raise EdgekdError(
            f"{path} is not a whole result of the device agent.", "Copy it again, or measure again."
        ) from error


def _names(job: Job) -> list[str]:
    return [name for group in job.steps() for name in group]


def _artifact(
    job: Job, number: int, arrays: Arrays, steps: Mapping[str, Any], built: Built | None
) -> ArtifactResult:
    names = _names(job)
    parts = [name for name in names if name.startswith(f"predict-{number}-")]
    clocks = [name for name in names if name.startswith(("latency-all-", f"latency-{number}-"))]
    logits = np.concatenate([arrays[f"{name}/logits"] for name in parts])
    pixels = np.concatenate([arrays[f"{name}/pixels"] for name in parts])
    n = len(job.artifacts[number].images)
    if logits.ndim != 2 or logits.dtype != np.float32 or len(logits) != n or pixels.shape != (n,):
        raise ValueError("predictions of another shape than the job's images")
    if not np.isfinite(logits).all():
        raise ValueError("logits that are not finite")
    whole = f"endtoend-{number}"
    prepare_ms = arrays[f"{whole}/prepare_ms_{number}"]
    found = _clocked(whole, number, arrays, steps)
    if prepare_ms.shape != found.samples.samples_ms.shape:
        raise ValueError("another number of preparations than of samples")
    return ArtifactResult(
        logits,
        pixels,
        [_clocked(name, number, arrays, steps) for name in clocks],
        found,
        prepare_ms.astype(np.float64),
        steps[whole]["peak_rss_mb"],
        _placement(steps[parts[0]].get("placement")),
        tuple(_rate(job, number, place, arrays, steps) for place in range(len(job.grid))),
        built,
    )


def _built(told: Any) -> Built | None:
    if told is None:
        return None
    return Built(
        str(told["builder"]),
        str(told["version"]),
        str(told["gpu"]),
        str(told["compute_capability"]),
        float(told["seconds"]),
    )


def _rate(job: Job, number: int, place: int, arrays: Arrays, steps: Mapping[str, Any]) -> Rate:
    batch, threads = job.grid[place]
    name = f"throughput-{number}-{place}"
    if "reason" in steps[name]:
        return Rate(batch, threads, None, str(steps[name]["reason"]))
    return Rate(batch, threads, _clocked(name, number, arrays, steps), None)


def _placement(told: Any) -> Placement | None:
    if told is None:
        return None
    nodes = {
        str(who): {str(kind): int(n) for kind, n in kinds.items()}
        for who, kinds in told["nodes"].items()
    }
    return Placement(str(told["asked"]), nodes, str(told["told_by"]))


def _clocked(name: str, number: int, arrays: Arrays, steps: Mapping[str, Any]) -> Clocked:
    facts = steps[name][str(number)]
    samples_ms, blocks = arrays[f"{name}/samples_ms_{number}"], arrays[f"{name}/blocks_{number}"]
    if samples_ms.ndim != 1 or len(samples_ms) == 0 or blocks.shape != samples_ms.shape:
        raise ValueError("samples and blocks of different numbers")
    if not np.isfinite(samples_ms).all() or (samples_ms <= 0).any():
        raise ValueError("a time that is none")
    samples = LatencySamples(
        samples_ms.astype(np.float64),
        blocks.astype(np.int64),
        float(facts["first_ms"]),
        int(facts["warmup_runs"]),
        float(facts["warmup_s"]),
        bool(facts["settled"]),
        bool(facts["complete"]),
        None if facts.get("joules") is None else float(facts["joules"]),
        float(facts.get("metered_s", 0.0)),
        *(
            None if facts.get(name) is None else float(facts[name])
            for name in ("other_cpu", "stolen_cpu")
        ),
    )
    energy = facts.get("energy")
    if energy is not None:
        idle = energy["idle_w"]
        energy = {
            "sensor": str(energy["sensor"]),
            "covers": str(energy["covers"]),
            "idle_w": None if idle is None else float(idle),
        }
    return Clocked(
        samples, float(facts["load_ms"]), str(facts["provider"]), int(facts["threads"]), energy
    )
