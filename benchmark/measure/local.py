"""Timing on this machine: steps of the device agent, each in a fresh process without torch.

The agent is the one stopwatch (`targets/agent/steps.py`): here it gets its job from a temporary folder instead of over
a wire. With one process all artifacts are timed in it, in alternating blocks; with several each artifact has its own,
and the artifacts take turns (A B A B …).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekd.benchmark.measure.latency import Protocol
from edgekd.core.console import say
from edgekd.core.errors import EdgekdError
from edgekd.targets.agent.job import Job, JobArtifact
from edgekd.targets.agent.store import Arrays, read_step
from edgekd.targets.devices.result import Clocked, Rate, clocked, rate

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
        folders: key → artifact folder.
        encoded: images as they lie in files, which each artifact's process prepares before the clock runs.
        threads: threads inside a model; None leaves the choice to the runtime, which is reported.
        together: every process measures all artifacts in alternating blocks, whatever the protocol (for ratios).
        energy: sensor to read between blocks, one of `energy.SENSORS`.

    Raises:
        EdgekdError: an artifact that cannot be opened or run, a sensor that cannot be read.
    """
    found: dict[str, list[Clocked]] = {key: [] for key in folders}
    keys = list(folders)
    groups = [keys] if protocol.processes == 1 or together else [[key] for key in keys]
    with _job(folders, encoded, protocol, threads, energy=energy) as job:
        for process in range(protocol.processes):
            for group in groups if keys else ():
                names = ", ".join(folders[key].name for key in group)
                say(
                    f"latency of {names}: process {process + 1} of {protocol.processes}, "
                    f"{protocol.seconds:g} s each"
                )
                which = "all" if group == keys else str(keys.index(group[0]))
                step = f"latency-{which}-{process}"
                arrays, steps = _step(job, step, names)
                for key in group:
                    found[key].append(clocked(step, keys.index(key), arrays, steps))
    return found


def measure_end_to_end(
    folders: Mapping[str, Path],
    encoded: Sequence[bytes],
    protocol: Protocol,
    *,
    threads: int | None = None,
) -> dict[str, Clocked]:
    """Time decoding, resizing and the model with one clock, in a fresh process for each artifact.

    Args:
        folders: key → artifact folder.
        encoded: images as they lie in files, which take turns.

    Raises:
        EdgekdError: an artifact that cannot be opened or run.
    """
    found: dict[str, Clocked] = {}
    with _job(folders, encoded, protocol, threads) as job:
        for number, (key, folder) in enumerate(folders.items()):
            say(f"from file to answer with {folder.name}, {protocol.seconds:g} s")
            step = f"endtoend-{number}"
            found[key] = clocked(step, number, *_step(job, step, folder.name))
    return found


def measure_rate(
    folder: Path, encoded: Sequence[bytes], protocol: Protocol, batch: int, threads: int | None
) -> Rate:
    """Time whole batches of images in a fresh process.

    Returns:
        The clock, one sample for each batch; the reason why there is none where more than one image at a time is
        refused.

    Raises:
        EdgekdError: an artifact that cannot be opened, or does not run one image at a time.
    """
    grid = ((batch, threads),)
    with _job({"": folder}, encoded, protocol, threads, grid=grid) as job:
        step = "throughput-0-0"
        try:
            return rate((batch, threads), step, 0, *_step(job, step, folder.name))
        except EdgekdError as refusal:
            if batch == 1:
                raise
            # The memory may be too small for so many: the process was ended from outside.
            return Rate(batch, threads, None, refusal.message)


@contextmanager
def _job(
    folders: Mapping[str, Path],
    encoded: Sequence[bytes],
    protocol: Protocol,
    threads: int | None,
    *,
    energy: str | None = None,
    grid: tuple[tuple[int, int | None], ...] = (),
) -> Iterator[Path]:
    """A temporary job of the agent about these artifacts: the folder that holds its `job.json`."""
    with tempfile.TemporaryDirectory(prefix="edgekd-latency-") as name:
        root = Path(name)
        with zipfile.ZipFile(root / _IMAGES, "w", zipfile.ZIP_STORED) as pack:
            for place, image in enumerate(encoded):
                pack.writestr(f"{place:08d}", image)
        for number, folder in enumerate(folders.values()):
            _place(Path(folder).resolve(), root / str(number))
        places = tuple(range(len(encoded)))
        job = Job(
            tuple(
                JobArtifact(f"artifact {number}", str(number), (), places)
                for number in range(len(folders))
            ),
            _IMAGES,
            protocol,
            threads,
            energy,
            grid,
            replace(protocol, processes=1) if grid else None,
        )
        (root / "job").mkdir()
        (root / "job" / "job.json").write_text(job.to_json(), encoding="utf-8")
        yield root / "job"


def _place(folder: Path, place: Path) -> None:
    """Let an artifact lie beside the job; copied where the system makes no links (Windows)."""
    try:
        os.symlink(folder, place, target_is_directory=True)
    except OSError:
        shutil.copytree(folder, place)


def _step(job: Path, step: str, names: str) -> tuple[Arrays, dict[str, Any]]:
    """Run one step of the agent in a fresh process and read its entry of the journal."""
    # -P: a file of the user's that happens to be called numpy.py must not be imported from the working folder.
    command = [sys.executable, "-P", "-m", "edgekd.targets.agent", "step", str(job), step]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    for message in map(_message, child.stdout.splitlines()):
        if "error" in message:
            told, hint = message["error"]
            for place in job.parent.iterdir():  # name an artifact by its own path
                told = told.replace(str(place), str(place.resolve()))
            raise EdgekdError(told, hint)
    done = job / "done" / f"{step}.npz"
    if child.returncode or not done.is_file():
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise EdgekdError(
            f"The latency process for {names} ended with code {child.returncode}: {last}",
            "Check that the artifact runs here: open it with edgekd.targets.session.open_session.",
        )
    arrays, facts = read_step(done)
    return {f"{step}/{name}": values for name, values in arrays.items()}, {step: facts}


def _message(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
