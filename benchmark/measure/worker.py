"""The latency of artifacts, in fresh processes without torch: `python -P -m edgekd.benchmark.measure.worker JOB.json`.

The parent writes the prepared images and a job into a temporary folder; the child opens the artifacts, measures, and
leaves samples and facts there. With `QUICK` one child takes all artifacts in alternating blocks; with `FULL` every
artifact gets its own child, five times over, and the artifacts take turns (A B A B …).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.measure.energy import Meter, open_sensor
from edgekd.benchmark.measure.environment import peak_rss_mb
from edgekd.benchmark.measure.latency import (
    LatencySamples,
    Protocol,
    RunOnce,
    measure_interleaved,
    rotating,
)
from edgekd.console import say
from edgekd.errors import EdgekdError
from edgekd.files import write_json
from edgekd.readers import read_array, read_arrays, read_json

if TYPE_CHECKING:
    from edgekd.targets.session import Session

_JOB, _ANSWER, _SAMPLES, _ENCODED = "job.json", "answer.json", "samples.npz", "encoded.npz"


@dataclass(frozen=True)
class ArtifactLatency:
    """What one child found out about one artifact."""

    samples: LatencySamples
    load_ms: float
    provider: str
    threads: int
    energy: dict[str, Any] | None = None
    """What `energy.Meter.facts` says; None without a sensor."""
    peak_rss_mb: float | None = None
    """Largest resident memory of a process that held this artifact alone, in 10^6 bytes."""


def measure_artifacts(
    folders: Mapping[str, Path],
    buffers: Mapping[str, NDArray[np.uint8]],
    protocol: Protocol,
    *,
    threads: int | None = None,
    together: bool = False,
    energy: str | None = None,
) -> dict[str, list[ArtifactLatency]]:
    """Latency of artifact folders, one entry per process.

    Args:
        folders: key → artifact folder.
        buffers: key → uint8 `[N, H, W, 3]`, images prepared as that artifact wants them.
        threads: threads inside a model; None leaves the choice to the session, which reports it.
        together: every process measures all artifacts in alternating blocks, whatever the protocol (for ratios).
        energy: sensor to read between blocks, one of `energy.SENSORS`.

    Raises:
        EdgekdError: an artifact that cannot be opened or run, a sensor that cannot be read.
    """
    found: dict[str, list[ArtifactLatency]] = {key: [] for key in folders}
    groups = [list(folders)] if protocol.processes == 1 or together else [[key] for key in folders]
    for process in range(protocol.processes):
        for group in groups:
            if not group:
                continue
            names = ", ".join(folders[key].name for key in group)
            say(
                f"latency of {names}: process {process + 1} of {protocol.processes}, {protocol.seconds:g} s each"
            )
            answers = run_child(
                {key: folders[key] for key in group}, buffers, protocol, threads, energy
            )
            for key, answer in answers.items():
                found[key].append(answer)
    return found


def measure_end_to_end(
    folders: Mapping[str, Path],
    encoded: Sequence[bytes],
    protocol: Protocol,
    *,
    threads: int | None = None,
) -> dict[str, ArtifactLatency]:
    """One clock around decoding, resizing and the model, a fresh process for each artifact.

    Args:
        folders: key → artifact folder.
        encoded: images as they lie in files, which take turns.

    Raises:
        EdgekdError: an artifact that cannot be opened or run.
    """
    found: dict[str, ArtifactLatency] = {}
    for key, folder in folders.items():
        say(f"from file to answer with {folder.name}, {protocol.seconds:g} s")
        found |= run_child({key: folder}, {}, protocol, threads, encoded=encoded)
    return found


def run_child(
    folders: Mapping[str, Path],
    buffers: Mapping[str, NDArray[np.uint8]],
    protocol: Protocol,
    threads: int | None,
    energy: str | None = None,
    batch: int = 1,
    encoded: Sequence[bytes] | None = None,
) -> dict[str, ArtifactLatency]:
    """One fresh process for all `folders`, as `measure_artifacts`, with `batch` images in each call of a model.

    With `encoded` images these are decoded and resized inside the clock, one a call, and `buffers` is not used.
    """
    with tempfile.TemporaryDirectory(prefix="edgekd-latency-") as name:
        scratch = Path(name)
        entries = []
        for number, (key, folder) in enumerate(folders.items()):
            if encoded is None:
                np.save(scratch / f"{number}.npy", buffers[key])
            entries.append(
                {"key": key, "folder": str(Path(folder).resolve()), "buffers": f"{number}.npy"}
            )
        if encoded is not None:
            np.savez(
                scratch / _ENCODED, *(np.frombuffer(image, dtype=np.uint8) for image in encoded)
            )
        job = {
            "protocol": asdict(protocol),
            "threads": threads,
            "energy": energy,
            "batch": batch,
            "entries": entries,
        }
        write_json(scratch / _JOB, job)
        # -P: a file of the user's that happens to be called numpy.py must not be imported from the working folder.
        command = [
            sys.executable,
            "-P",
            "-m",
            "edgekd.benchmark.measure.worker",
            str(scratch / _JOB),
        ]
        child = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )
        if not (scratch / _ANSWER).is_file():
            last = (child.stderr.strip().splitlines() or ["no message"])[-1]
            raise EdgekdError(
                f"The latency process for {', '.join(folder.name for folder in folders.values())} "
                f"ended with code {child.returncode}: {last}",
                "Check that the artifact runs here: open it with edgekd.targets.session.open_session.",
            )
        answer = read_json(scratch / _ANSWER, "latency answer")
        if "error" in answer:
            raise EdgekdError(*answer["error"])
        arrays = read_arrays(scratch / _SAMPLES, "latency samples")
        return {
            entry["key"]: _from_answer(entry, number, arrays)
            for number, entry in enumerate(answer["entries"])
        }


def _from_answer(
    entry: Mapping[str, Any], number: int, arrays: Mapping[str, NDArray[Any]]
) -> ArtifactLatency:
    facts = entry["facts"]
    samples = LatencySamples(
        samples_ms=arrays[f"samples_ms_{number}"], blocks=arrays[f"blocks_{number}"], **facts
    )
    return ArtifactLatency(
        samples,
        entry["load_ms"],
        entry["provider"],
        entry["threads"],
        entry["energy"],
        entry["peak_rss_mb"],
    )


def work(job_path: Path) -> None:
    """The child's side: measure what the job says and write the answer beside it."""
    job = read_json(job_path, "latency job")
    try:
        protocol = Protocol(**job["protocol"])
        answer, arrays = _measure(
            job["entries"], job_path.parent, protocol, job["threads"], job["energy"], job["batch"]
        )
    except EdgekdError as error:
        write_json(job_path.parent / _ANSWER, {"error": [error.message, error.hint]})
        return
    np.savez(job_path.parent / _SAMPLES, **dict[str, Any](arrays))
    write_json(job_path.parent / _ANSWER, {"entries": answer})


def _measure(
    entries: Sequence[Mapping[str, str]],
    scratch: Path,
    protocol: Protocol,
    threads: int | None,
    energy: str | None,
    batch: int,
) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
    from edgekd.targets.opened import refuse_batch
    from edgekd.targets.session import open_session  # only the child needs a runtime

    meter = None
    if energy is not None:
        meter = Meter(open_sensor(energy))
        meter.rest()
    sessions = {
        entry["key"]: open_session(Path(entry["folder"]), threads=threads) for entry in entries
    }
    for session in sessions.values():
        refuse_batch(batch, session.largest_batch)
    if (scratch / _ENCODED).is_file():
        stored = read_arrays(scratch / _ENCODED, "encoded images")
        images = [data.tobytes() for data in stored.values()]
        runners = {key: _from_file(session, images) for key, session in sessions.items()}
    else:
        runners = {
            entry["key"]: rotating(
                sessions[entry["key"]].run,
                read_array(scratch / entry["buffers"], "prepared images"),
                batch,
            )
            for entry in entries
        }
    measured = measure_interleaved(runners, protocol, meter=meter)
    alone = len(entries) == 1
    answer: list[dict[str, Any]] = []
    arrays: dict[str, NDArray[Any]] = {}
    for number, (key, samples) in enumerate(measured.items()):
        session = sessions[key]
        facts = {
            f.name: getattr(samples, f.name)
            for f in fields(samples)
            if f.name not in ("samples_ms", "blocks")
        }
        answer.append(
            {
                "key": key,
                "facts": facts,
                "load_ms": session.load_ms,
                "provider": session.provider,
                "threads": session.threads,
                "energy": None if meter is None else meter.facts(),
                "peak_rss_mb": peak_rss_mb() if alone else None,
            }
        )
        arrays[f"samples_ms_{number}"], arrays[f"blocks_{number}"] = (
            samples.samples_ms,
            samples.blocks,
        )
    return answer, arrays


def _from_file(session: Session, images: Sequence[bytes]) -> RunOnce:
    from edgekd.images import decode

    pixels = session.artifact.preprocess.pixels
    return lambda query: session.run(pixels(decode(images[query % len(images)]))[None])


if __name__ == "__main__":
    work(Path(sys.argv[1]))
