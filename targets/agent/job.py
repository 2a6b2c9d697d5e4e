"""The task of an agent: `job.json`, and the steps that follow from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edgekd.core.errors import EdgekdError
from edgekd.core.readers import plain_path, printable, read_json
from edgekd.targets.timing.stopwatch import Protocol

FORMAT = 1
"""Raised when `job.json` or the result changes its meaning; agent and edgekd of different formats refuse each other."""
CHUNK = 256
"""Images between two entries of the journal."""
MOST_IMAGES = 10**8
"""Bound on positions in the image file."""


@dataclass(frozen=True)
class JobArtifact:
    """One artifact on the device."""

    name: str
    """`<run>/<artifact>`, for progress and for the result."""
    folder: str
    """Name beside the job's folder; ends in a hash of the artifact's files."""
    images: tuple[int, ...]
    """Positions in the image file that are to be classified, in this order."""
    latency_images: tuple[int, ...]
    """Positions that take turns while the clock runs."""


@dataclass(frozen=True)
class Job:
    """`job.json`. Names of files are relative to the folder that holds the job's folder."""

    artifacts: tuple[JobArtifact, ...]
    image_file: str
    """A zip file, stored without compression: one encoded image per entry, in order."""
    protocol: Protocol
    threads: int | None
    energy: str | None = None
    """Sensor to read between blocks, one of `energy.SENSORS`."""
    grid: tuple[tuple[int, int | None], ...] = ()
    """Batch sizes with numbers of threads to take the throughput at; None leaves the threads to the runtime."""
    grid_protocol: Protocol | None = None
    """The rule of the throughput; None without a grid."""
    format: int = FORMAT

    def steps(self) -> list[list[str]]:
        """Names of the journal's entries, grouped by the process that makes them, in order."""
        numbers = range(len(self.artifacts))
        groups = [
            [f"predict-{n}-{start}" for start in range(0, len(self.artifacts[n].images), CHUNK)]
            for n in numbers
        ]
        if self.protocol.processes == 1:
            groups.append(["latency-all-0"])
        else:
            groups += [
                [f"latency-{n}-{process}"]
                for process in range(self.protocol.processes)
                for n in numbers
            ]
        groups += [[f"endtoend-{n}"] for n in numbers]
        return groups + [
            [f"throughput-{n}-{place}"] for n in numbers for place in range(len(self.grid))
        ]

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def read_job(folder: Path) -> Job:
    """Load `job.json`; a missing or damaged one, or one of another format, is an `EdgekdError`."""
    if not (folder / "job.json").exists():
        raise EdgekdError(f"There is no job in {folder}.", "Name the folder that holds job.json.")
    return parse_job(read_json(folder / "job.json", "job", "Send it again."))


def parse_job(data: Any) -> Job:
    """Return a job from its JSON; one of another format, or with numbers out of bounds, is an `EdgekdError`."""
    if isinstance(data, dict) and data.get("format") != FORMAT:
        raise EdgekdError(
            f"The job has format {printable(str(data.get('format')))[:20]}; this agent reads format {FORMAT}.",
            "Use the agent and the edgekd of one release.",
        )
    try:
        artifacts = tuple(
            JobArtifact(
                short_text(one["name"], 600),
                one_name(one["folder"]),
                tuple(whole(place, 0, MOST_IMAGES) for place in one["images"]),
                tuple(whole(place, 0, MOST_IMAGES) for place in one["latency_images"]),
            )
            for one in data["artifacts"]
        )
        grid = tuple((whole(batch, 1, 65_536), _threads(n)) for batch, n in data.get("grid", ()))
        rule = data.get("grid_protocol")
        if not 0 < len(artifacts) <= 1000 or len(grid) > 1000 or (grid and rule is None):
            raise ValueError("no artifacts, or too many")
        energy = data.get("energy")
        return Job(
            artifacts,
            one_name(data["image_file"]),
            _protocol(data["protocol"]),
            _threads(data["threads"]),
            None if energy is None else short_text(energy),
            grid,
            None if rule is None else _protocol(rule),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EdgekdError("The job is damaged.", "Send it again.") from error


def whole(value: Any, least: int, most: int) -> int:
    """Return a whole number from a foreign file; any other value is a `ValueError`."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"not a whole number from {least} to {most}")
    return value


def number(value: Any, least: float, most: float) -> float:
    """Return a finite number from a foreign file; any other value is a `ValueError`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"not a number from {least:g} to {most:g}")
    return float(value)


def short_text(value: Any, most: int = 64) -> str:
    """Return a text of at most `most` printable characters from a foreign file; any other value is a `ValueError`."""
    if not isinstance(value, str) or len(value) > most or printable(value) != value:
        raise ValueError(f"not a text of at most {most} printable characters")
    return value


def one_name(value: Any) -> str:
    """Return the name of a file or folder from a foreign file; a path or any other value is a `ValueError`."""
    name = plain_path(value)
    if "/" in name:
        raise ValueError("a path, not a name")
    return name


def _threads(value: Any) -> int | None:
    return None if value is None else whole(value, 1, 4096)


def _protocol(data: Any) -> Protocol:
    limits = {"warmup_runs": 10**6, "runs": 10**9, "processes": 100}
    found = {"name": short_text(data["name"])}
    numbers = {
        field.name: whole(data[field.name], 0, limits[field.name])
        if field.name in limits
        else number(data[field.name], 0, 86_400)
        for field in fields(Protocol)
        if field.name != "name"
    }
    if set(data) != {*found, *numbers} or numbers["processes"] < 1 or numbers["block_s"] <= 0:
        raise ValueError("not a protocol")
    return Protocol(**found, **numbers)  # type: ignore[arg-type]
