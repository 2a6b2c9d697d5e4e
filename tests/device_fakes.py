"""Images that lie on disk, subjects and jobs for the device tests; nothing here needs torch."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path

import numpy as np
from artifact_fakes import CLASSES, write_artifact
from PIL import Image

from edgekd.benchmark.subjects import Subject, Suite
from edgekd.core.readers import sha256_file
from edgekd.data.image_set import ImageSet
from edgekd.data.sources.source import FileReader
from edgekd.targets.agent.job import Job, JobArtifact
from edgekd.targets.devices.result import DeviceResult, check_result, open_result
from edgekd.targets.session import open_session
from edgekd.targets.timing.stopwatch import Protocol

BRIEF = Protocol("quick", 4, 0.01, 0.1, 20, 0.05, 2.0, 0.01, 1)


def without_modules(folder: Path, absent: tuple[str, ...]) -> str:
    """Return a PYTHONPATH with which Python can load none of the modules `absent`."""
    folder.mkdir()
    program = f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n"
    (folder / "sitecustomize.py").write_text(program)
    return str(folder)


def result_of(path: Path) -> DeviceResult:
    """The result in a file, checked against its own job."""
    stored = open_result(path)
    return check_result(stored, stored.job)


def write_images(folder: Path, n: int = 40) -> ImageSet:
    """JPEG files of noise around a colour; the label is the colour's for three of four."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels, names = [], []
    for number in range(n):
        label = number % 3
        pixels = rng.integers(0, 120, (30, 40, 3))
        pixels[..., label if number % 4 else (label + 1) % 3] += 60
        name = f"{number}.jpg"
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name, quality=90)
        labels.append(label)
        names.append(name)
    keys = tuple(sha256_file(folder / name)[:32] for name in names)
    domains = np.zeros(n, dtype=np.int64)
    reader = FileReader(folder, tuple(names))
    return ImageSet(
        "noise", CLASSES, ("all",), np.asarray(labels), domains, keys, tuple(names), None, reader
    )


def artifact_subject(folder: Path) -> Subject:
    session = open_session(folder, threads=1, spinning=False)
    one = session.artifact
    facts = ("r", "artifact", one.precision, one.preprocess, session.run, one.classes, folder)
    return Subject(one.name, *facts)


def two_suites(images: ImageSet) -> list[Suite]:
    half = len(images) // 2
    return [
        Suite("id", images, np.arange(half)),
        Suite("ood:x", images, np.arange(half, len(images))),
    ]


def write_job(
    root: Path,
    images: ImageSet,
    *,
    protocol: Protocol = BRIEF,
    repeat: int = 1,
    grid: tuple[tuple[int, int | None], ...] = (),
) -> Path:
    """A job folder with one artifact as a bundle has it; each image is asked `repeat` times."""
    write_artifact(root / "artifact-x")
    with zipfile.ZipFile(root / "images-x.zip", "w") as pack:
        for number in range(len(images)):
            pack.write(images.reader.root / images.reader.paths[number], f"{number:08d}")  # type: ignore[attr-defined]
    numbers = tuple(range(len(images))) * repeat
    job = Job(
        (JobArtifact("r/fp32", "artifact-x", numbers, numbers[:8]),),
        "images-x.zip",
        protocol,
        1,
        grid=grid,
        grid_protocol=BRIEF if grid else None,
    )
    (root / "job-x").mkdir()
    (root / "job-x" / "job.json").write_text(job.to_json())
    return root / "job-x"


def run_agent(python: str, agent: Path, *words: str) -> tuple[int, list[dict[str, object]]]:
    """Exit code and messages of one call of the agent."""
    done = subprocess.run([python, str(agent), *words], capture_output=True, text=True, check=False)
    assert not done.stderr or done.returncode, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]
