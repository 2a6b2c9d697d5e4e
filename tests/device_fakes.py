"""Images that lie on disk, subjects and jobs for the device tests; nothing here needs torch."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from artifact_fakes import CLASSES, write_artifact
from PIL import Image

from edgekd.benchmark import device as devices
from edgekd.benchmark.evaluate.predictions import predict_suite
from edgekd.benchmark.measure import timings
from edgekd.benchmark.subjects import Subject, Suite
from edgekd.core.readers import sha256_file
from edgekd.data.image_set import ImageSet
from edgekd.data.sources.source import FileReader
from edgekd.targets.agent.job import Job, JobArtifact
from edgekd.targets.devices.result import DeviceResult, check_result, open_result
from edgekd.targets.session import open_session
from edgekd.targets.timing import stopwatch
from edgekd.targets.timing.stopwatch import Protocol

BRIEF = Protocol("quick", 4, 0.01, 0.1, 20, 0.05, 2.0, 0.01, 1)


Setting = tuple[list[Subject], list[Suite]]


def be_brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let quick measurements take a fraction of a second."""
    monkeypatch.setattr(devices, "QUICK", BRIEF)
    monkeypatch.setattr(stopwatch, "QUICK", BRIEF)
    monkeypatch.setattr(stopwatch, "CONTEXT", replace(BRIEF, name="context"))
    monkeypatch.setattr(timings, "RATE_QUICK", replace(BRIEF, name="throughput, quick"))


def plant(monkeypatch: pytest.MonkeyPatch, folder: Path, module: str, text: str) -> None:
    """Let every Python that is started find this module first."""
    folder.mkdir()
    (folder / f"{module}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


def plant_absence(monkeypatch: pytest.MonkeyPatch, folder: Path, *absent: str) -> None:
    """Let no Python that is started load these modules, nor edgekd but from the agent."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    text = f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n"
    plant(monkeypatch, folder, "sitecustomize", text)


def check_measured(
    found: Sequence[Subject], setting: Setting, device: str, *, share: float = 1e-5
) -> None:
    """Every subject has the logits of this machine, within a share of their range, and samples of one process.

    The device takes one image at a time and this machine several: sums in another order, and with INT8 a rounding may
    flip.
    """
    assert [one.name for one in found] == [f"{one.name}@{device}" for one in setting[0]]
    for one, original in zip(found, setting[0], strict=True):
        assert one.measured is not None
        assert one.measured.same_pixels == 1.0
        for n, suite in enumerate(setting[1]):
            [here] = predict_suite([original], suite)
            there = one.measured.logits[n]
            np.testing.assert_allclose(there, here, atol=share * np.ptp(here))
            np.testing.assert_array_equal(there.argmax(axis=1), here.argmax(axis=1))
        [clock] = one.measured.result.model
        assert clock.threads == 1
        assert len(clock.samples.samples_ms) >= BRIEF.runs
        assert clock.samples.complete


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
    classes = (CLASSES, ("all",), np.asarray(labels), domains)
    return ImageSet("noise", *classes, keys, tuple(names), None, reader)


def artifact_subject(folder: Path) -> Subject:
    session = open_session(folder, threads=1, spinning=False)
    one = session.artifact
    facts = ("r", "artifact", one.precision, one.preprocess, session.run, one.classes, folder)
    return Subject(one.name, *facts)


def two_suites(images: ImageSet) -> list[Suite]:
    first, second = np.array_split(np.arange(len(images)), 2)
    return [Suite("id", images, first), Suite("ood:x", images, second)]


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
    artifact = JobArtifact("r/fp32", "artifact-x", numbers, numbers[:8])
    rates = {"grid": grid, "grid_protocol": BRIEF if grid else None}
    job = Job((artifact,), "images-x.zip", protocol, 1, **rates)  # type: ignore[arg-type]
    (root / "job-x").mkdir()
    (root / "job-x" / "job.json").write_text(job.to_json())
    return root / "job-x"


def run_agent(python: str, agent: Path, *words: str) -> tuple[int, list[dict[str, object]]]:
    """Exit code and messages of one call of the agent."""
    done = subprocess.run([python, str(agent), *words], capture_output=True, text=True, check=False)
    assert not done.stderr or done.returncode, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]
