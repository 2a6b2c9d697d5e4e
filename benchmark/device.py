"""Artifacts measured on devices: from subjects and suites to a job, and from its result to subjects."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.benchmark.evaluate.predictions import columns_of, prepare
from edgekd.benchmark.measure import timings
from edgekd.benchmark.subjects import Logits, Measured, Subject, Suite, clock_places
from edgekd.configs.benchmark import SpeedOptions
from edgekd.core.console import say, warn
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import Artifact, read_artifact
from edgekd.targets.agent.job import Job, JobArtifact
from edgekd.targets.agent.model import FORMATS, PACKAGES, needs
from edgekd.targets.devices import payload as sent
from edgekd.targets.devices.drive import Device, measure_on, unable
from edgekd.targets.devices.result import ArtifactResult, DeviceResult, check_result, open_result
from edgekd.targets.devices.transports import find_device
from edgekd.targets.timing.stopwatch import FULL, QUICK

Grid = tuple[tuple[int, int | None], ...]


def on_devices(
    subjects: Sequence[Subject],
    suites: Sequence[Suite],
    specs: Sequence[str],
    speed: SpeedOptions,
    *,
    keep: bool = False,
) -> list[Subject]:
    """Return teacher and torch student, then every artifact as each of the devices `specs` measures it.

    Raises:
        EdgekdError: no artifact, no such device, or one that cannot measure it.
    """
    result = [subject for subject in subjects if subject.folder is None]
    for spec in specs:
        with closing(find_device(spec)) as device, tempfile.TemporaryDirectory() as name:
            able = _able(_for_agent(subjects), device)
            with _order(able, suites, speed, speed.grid) as order:
                path = Path(name) / "result.npz"
                measure_on(device, order.payload, path, keep=keep)
                measured = check_result(open_result(path), order.job)
                result += order.measured(measured, device.name)
    return result


def bundle(
    subjects: Sequence[Subject], suites: Sequence[Suite], folder: Path, speed: SpeedOptions
) -> str:
    """Write the folder for a device that cannot be reached from here; return the line to run there."""
    with _order(_for_agent(subjects), suites, speed, speed.grid) as order:
        packages = sorted({PACKAGES[_manifest(one).format] for one in order.artifacts})
        names = ", ".join(one.name for one in order.job.artifacts)
        sent.write_bundle(order.payload, folder, names, packages)
        return sent.bundle_command(order.payload.job_folder)


def from_result(
    subjects: Sequence[Subject], suites: Sequence[Suite], path: Path
) -> tuple[list[Subject], bool]:
    """Return teacher and torch student, then the artifacts by the result file of a device; and whether it was quick.

    Raises:
        EdgekdError: a result of other artifacts or of other images.
    """
    stored = open_result(path)
    job, subjects = stored.job, _for_agent(subjects)
    quick = job.protocol.name == QUICK.name
    speed = SpeedOptions(quick=quick, threads=job.threads, energy=job.energy)
    with _order(subjects, suites, speed, job.grid) as order:
        result = check_result(stored, order.job)
        others = [subject for subject in subjects if subject.folder is None]
        return others + order.measured(result, result.name), quick


def device_facts(subjects: Sequence[Subject], local_logits: Logits) -> list[dict[str, Any]]:
    """Return a report's facts about each device, and how its files compare with the same files on this machine."""
    devices: dict[str, dict[str, Any]] = {}
    for subject in subjects:
        if subject.measured is None:
            continue
        facts = devices.setdefault(subject.device, subject.measured.facts | {"artifacts": {}})
        same = [
            logits.argmax(axis=1) == subject.measured.logits[number].argmax(axis=1)
            for (key, number), logits in local_logits.items()
            if key == subject.key
        ]
        built = subject.measured.result.built
        facts["artifacts"][f"{subject.run}/{subject.name}"] = {
            "agreement_here": float(np.concatenate(same).mean()) if same else None,
            "same_pixels": subject.measured.same_pixels,
            **({"built": built.model_dump()} if built else {}),
        }
    return list(devices.values())


@dataclass(frozen=True, eq=False)
class _Order:
    """A job and what is needed to read its result.

    Attributes:
        places: (position of the suite, index of the image) → position in the image file.
    """

    artifacts: Sequence[Subject]
    suites: Sequence[Suite]
    job: Job
    payload: sent.Payload
    places: Mapping[tuple[int, int], int]

    def measured(self, result: DeviceResult, device: str) -> list[Subject]:
        """Return the artifacts as subjects of the device."""
        shown = f"{device} (emulated)" if result.facts["emulated"] else device
        facts = {"device": shown, **result.facts}
        subjects = []
        for subject, one in zip(self.artifacts, result.artifacts, strict=True):
            if one.logits.shape[1] != len(subject.classes):
                raise EdgekdError(
                    f"The result of {device} has another number of classes than {subject.name}.",
                    "Measure the artifact there again.",
                )
            held = [n for n, suite in enumerate(self.suites) if suite.holds(subject)]
            ends = np.cumsum([len(self.suites[n].indices) for n in held])[:-1]
            logits = {
                n: part[:, columns_of(subject, self.suites[n])]
                for n, part in zip(held, np.split(one.logits, ends), strict=True)
            }
            measured = Measured(one, logits, facts, self._same_pixels(subject, one))
            name = f"{subject.name}@{shown}"
            subjects.append(replace(subject, name=name, device=shown, measured=measured))
        return subjects

    def _same_pixels(self, subject: Subject, one: ArtifactResult) -> float | None:
        images = _images_of(subject, self.suites, self.places)
        checks = dict(zip(images, one.pixels.tolist(), strict=True))
        number, indices = clock_places(self.suites)
        same = [
            zlib.crc32(prepare(self.suites[number].images, index, subject.preprocess).tobytes())
            == checks[self.places[number, index]]
            for index in sorted(set(indices.tolist()))
            if self.places[number, index] in checks
        ]
        return float(np.mean(same)) if same else None


@contextmanager
def _order(
    subjects: Sequence[Subject], suites: Sequence[Suite], speed: SpeedOptions, grid: Grid
) -> Iterator[_Order]:
    """Yield the job for the artifacts among `subjects`, with its files in a temporary folder."""
    artifacts = [subject for subject in subjects if subject.folder is not None]
    if not artifacts:
        raise EdgekdError("There is no artifact for the device to run.", "Make one: edgekd export.")
    if any(suite.corruption is not None for suite in suites):
        raise EdgekdError(
            "Corrupted images are drawn on this machine only.",
            "Measure corruptions without --device.",
        )
    folders = {one.key: sent.artifact_folder_name(Path(one.folder or "")) for one in artifacts}
    with tempfile.TemporaryDirectory(prefix="edgekd-device-") as name:
        scratch = Path(name)
        pack = sent.ImagePack(scratch / "images.zip")
        wanted = [n for n, suite in enumerate(suites) if any(map(suite.holds, artifacts))]
        say(f"packing {sum(len(suites[n].indices) for n in wanted)} images for the device")
        places = {
            (n, index): pack.add(suites[n].images, index)
            for n in wanted
            for index in suites[n].indices.tolist()
        }
        number, chosen = clock_places(suites)
        for index in chosen.tolist():
            places.setdefault((number, index), pack.add(suites[number].images, index))
        timed = tuple(places[number, index] for index in chosen.tolist())
        rate = timings.RATE_QUICK if speed.quick else timings.RATE
        job = Job(
            artifacts=tuple(
                JobArtifact(
                    name=f"{one.run}/{one.name}",
                    folder=folders[one.key],
                    images=tuple(_images_of(one, suites, places)),
                    latency_images=timed,
                )
                for one in artifacts
            ),
            image_file=f"images-{pack.close()[:16]}.zip",
            protocol=QUICK if speed.quick else FULL,
            threads=speed.threads,
            energy=speed.energy,
            grid=grid,
            grid_protocol=rate if grid else None,
        )
        sources = {folders[one.key]: Path(one.folder or "") for one in artifacts}
        payload = sent.assemble(job, scratch / "images.zip", sources, scratch)
        yield _Order(artifacts, suites, job, payload, places)


def _images_of(
    subject: Subject, suites: Sequence[Suite], places: Mapping[tuple[int, int], int]
) -> list[int]:
    """Return where the images of all its suites lie in the image file, suite after suite."""
    held = ((n, suite) for n, suite in enumerate(suites) if suite.holds(subject))
    return [places[n, index] for n, suite in held for index in suite.indices.tolist()]


def _manifest(subject: Subject) -> Artifact:
    assert subject.folder is not None
    return read_artifact(subject.folder, check_hashes=False)


def _for_agent(subjects: Sequence[Subject]) -> list[Subject]:
    """Return the subjects without the artifacts that no agent can run, which are named in a warning."""
    kept = []
    for subject in subjects:
        kind = _manifest(subject).format if subject.folder is not None else None
        if kind is None or kind in FORMATS:
            kept.append(subject)
        else:
            runs = " and ".join(FORMATS)
            warn(f"{subject.name} is left out: the agent on a device runs {runs} files, not {kind}")
    return kept


def _able(subjects: Sequence[Subject], device: Device) -> list[Subject]:
    """Return the subjects without the artifacts whose runtime the device lacks; none left is an error."""
    artifacts = [subject for subject in subjects if subject.folder is not None]
    if not artifacts:
        return list(subjects)
    wanted = [needs(_manifest(one).model_dump(mode="json")) for one in artifacts]
    reasons = zip(artifacts, unable(device, wanted), strict=True)
    left_out = {one.key: reason for one, reason in reasons if reason is not None}
    if len(left_out) == len(artifacts):
        raise next(iter(left_out.values()))
    for one in artifacts:
        if one.key in left_out:
            warn(f"{one.name} is left out: {left_out[one.key]}")
    return [subject for subject in subjects if subject.key not in left_out]
