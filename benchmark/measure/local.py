"""Timing on this machine: steps of the device agent, each in a fresh process without torch.

The agent is the only stopwatch (`targets/agent/steps.py`). Here it gets its job from a temporary folder. With one
process, all artifacts are timed in it in alternating blocks. With several, each artifact has its own processes, which
alternate (A B A B …).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.core.console import say
from edgekd.core.errors import EdgekdError
from edgekd.targets.agent.job import Job, JobArtifact
from edgekd.targets.agent.messages import converse, last_line
from edgekd.targets.agent.store import read_step
from edgekd.targets.devices.result import Clocked, Journal, Rate
from edgekd.targets.timing.stopwatch import Protocol

_IMAGES = "images.zip"


def measure_artifacts(
    folders: Mapping[str, Path],
    encoded: Sequence[bytes],
    protocol: Protocol,
    *,
    threads: int | None = None,
    together: bool = False,
    energy: str | None = None,
) -> dict[str, list[Clocked]]:
    """Time artifact folders, one entry per process.

    Args:
        encoded: images as they are in files; each process prepares them before anything is timed.
        threads: inside a model; None leaves the choice to the runtime.
        together: every process measures all artifacts in alternating blocks, whatever the protocol (for ratios).
        energy: sensor to read between blocks, one of `energy.SENSORS`.

    Raises:
        EdgekdError: an artifact cannot be opened or run, or the sensor cannot be read.
    """
    results: dict[str, list[Clocked]] = {key: [] for key in folders}
    keys = list(folders)
    groups = [keys] if protocol.processes == 1 or together else [[key] for key in keys]
    with _job(folders, encoded, protocol=protocol, threads=threads, energy=energy) as job:
        for process in range(protocol.processes if keys else 0):
            for group in groups:
                names = ", ".join(folders[key].name for key in group)
                say(
                    f"latency of {names}: process {process + 1} of {protocol.processes}, "
                    f"{protocol.seconds:g} s each"
                )
                which = "all" if group == keys else str(keys.index(group[0]))
                step = f"latency-{which}-{process}"
                journal = _run(job, step, names)
                for key in group:
                    results[key].append(journal.clocked(step, keys.index(key)))
    return results


def measure_end_to_end(
    folders: Mapping[str, Path],
    encoded: Sequence[bytes],
    protocol: Protocol,
    *,
    threads: int | None = None,
) -> dict[str, Clocked]:
    """Measure end-to-end latency, from encoded image to logits, in a fresh process for each artifact."""
    results: dict[str, Clocked] = {}
    with _job(folders, encoded, protocol=protocol, threads=threads) as job:
        for number, (key, folder) in enumerate(folders.items()):
            say(f"end-to-end latency of {folder.name}, {protocol.seconds:g} s")
            step = f"endtoend-{number}"
            results[key] = _run(job, step, folder.name).clocked(step, number)
    return results


def measure_rate(
    folder: Path, encoded: Sequence[bytes], protocol: Protocol, batch: int, threads: int | None
) -> Rate:
    """Time whole batches of images in a fresh process; where the runtime refuses batches, return the reason.

    Raises:
        EdgekdError: an artifact that cannot be opened, or does not run one image at a time.
    """
    job_of_one = _job(
        {"": folder},
        encoded,
        protocol=protocol,
        threads=threads,
        grid=((batch, threads),),
        grid_protocol=protocol,
    )
    with job_of_one as job:
        try:
            step = "throughput-0-0"
            return _run(job, step, folder.name).rate(step, 0, batch, threads)
        except EdgekdError as refusal:
            if batch == 1:
                raise
            # The process was killed from outside, probably because of too little memory.
            return Rate(batch, threads, None, refusal.message)


@contextlib.contextmanager
def _job(folders: Mapping[str, Path], encoded: Sequence[bytes], **settings: Any) -> Iterator[Path]:
    """Yield the folder of a temporary job of the agent about these artifacts; `settings` are those of `Job`."""
    with tempfile.TemporaryDirectory(prefix="edgekd-latency-") as name:
        root = Path(name)
        with zipfile.ZipFile(root / _IMAGES, "w", zipfile.ZIP_STORED) as pack:
            for place, image in enumerate(encoded):
                pack.writestr(f"{place:08d}", image)
        for number, folder in enumerate(folders.values()):
            try:
                os.symlink(Path(folder).resolve(), root / str(number), target_is_directory=True)
            except OSError:  # Windows makes no links
                shutil.copytree(folder, root / str(number))
        places = tuple(range(len(encoded)))
        artifacts = tuple(
            JobArtifact(f"artifact {number}", str(number), (), places)
            for number in range(len(folders))
        )
        (root / "job").mkdir()
        job = Job(artifacts, _IMAGES, **settings)
        (root / "job" / "job.json").write_text(job.to_json(), encoding="utf-8")
        yield root / "job"


def _run(job: Path, step: str, names: str) -> Journal:
    """Run one step of the agent in a fresh process and read its entry of the journal."""
    # -P: do not import files such as numpy.py from the working folder.
    command = [sys.executable, "-P", "-m", "edgekd.targets.agent", "step", str(job), step]
    last, code, stderr = converse(command, lambda _: None)
    if "error" in last:
        message, hint = last["error"]
        for place in job.parent.iterdir():  # name an artifact by its own path
            message = message.replace(str(place), str(place.resolve()))
        raise EdgekdError(message, hint)
    done = job / "done" / f"{step}.npz"
    if code or not done.is_file():
        raise EdgekdError(
            f"The latency process for {names} ended with code {code}: {last_line(stderr)}",
            "Check that the artifact runs here: open it with edgekd.targets.session.open_session.",
        )
    arrays, facts = read_step(done)
    return Journal({f"{step}/{name}": values for name, values in arrays.items()}, {step: facts})
