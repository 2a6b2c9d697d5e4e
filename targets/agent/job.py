"""What an agent is asked to do: `job.json`, and the steps that follow from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekd.benchmark.latency import Protocol
from edgekd.errors import EdgekdError

FORMAT = 1
"""Raised when `job.json` or the result changes its meaning; agent and edgekd of different formats refuse each other."""
CHUNK = 256
"""Images between two entries of the journal."""


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
    """Load `job.json`.

    Raises:
        EdgekdError: none there, damaged, or of another format.
    """
    try:
        return parse_job(json.loads((folder / "job.json").read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise EdgekdError(
            f"There is no job in {folder}.", "Name the folder that holds job.json."
        ) from error
    except ValueError as error:
        raise EdgekdError(f"The job in {folder} is damaged.", "Send it again.") from error


def parse_job(data: Any) -> Job:
    """A job from its JSON.

    Raises:
        EdgekdError: made by an edgekd of another format, or damaged.
    """
    if isinstance(data, dict) and data.get("format") != FORMAT:
        raise EdgekdError(
            f"The job has format {data.get('format')}; this agent knows format {FORMAT}.",
            "Use the agent and the edgekd of one release.",
        )
    try:
        artifacts = tuple(
            JobArtifact(
                str(one["name"]),
                str(one["folder"]),
                tuple(map(int, one["images"])),
                tuple(map(int, one["latency_images"])),
            )
            for one in data["artifacts"]
        )
        rule = data.get("grid_protocol")
        return Job(
            artifacts,
            str(data["image_file"]),
            Protocol(**data["protocol"]),
            data["threads"],
            data.get("energy"),
            tuple(
                (int(batch), None if threads is None else int(threads))
                for batch, threads in data.get("grid", ())
            ),
            None if rule is None else Protocol(**rule),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EdgekdError("The job is damaged.", "Send it again.") from error
