"""Artifacts measured on devices: from subjects and suites to a job, and from its result to subjects."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.evaluate.accuracy import columns_of, prepare
from edgekd.benchmark.measure import throughput
from edgekd.benchmark.measure.latency import FULL, MIN_BUFFERS, QUICK
from edgekd.benchmark.measure.measured import Measured
from edgekd.benchmark.measure.throughput import Grid
from edgekd.benchmark.subjects import Subject, Suite
from edgekd.core.console import say, warn
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import read_artifact
from edgekd.targets.agent.job import Job, JobArtifact
from edgekd.targets.agent.runtimes import FORMATS, PACKAGES, needs
from edgekd.targets.devices.drive import Device, measure_on, unable
from edgekd.targets.devices.find import find_device
from edgekd.targets.devices.payload import ImagePack, Payload, artifact_folder_name, assemble
from edgekd.targets.devices.result import DeviceResult, check_result, open_result


@dataclass(frozen=True, eq=False)
class _Order:
    """A job and what is needed to read its result."""

    job: Job
    payload: Payload
    places: Mapping[tuple[int, int], int]
    """(position of the suite, index of the image) → position in the image file."""


def on_device(
    subjects: Sequence[Subject],
    suites: Sequence[Suite],
    spec: str,
    *,
    quick: bool = False,
    threads: int | None = None,
    keep: bool = False,
    energy: str | None = None,
    grid: Grid | None = None,
) -> list[Subject]:
    """Measure every artifact among `subjects` on the device `spec`; they come back as subjects of that device.

    Raises:
        EdgekdError: no artifact, no such device, one that has none of their runtimes, or whatever else keeps it from
            measuring.
    """
    with closing(find_device(spec)) as device:
        subjects = _able(_for_agent(subjects), device)
        with (
            _order(
                subjects, suites, quick=quick, threads=threads, energy=energy, pairs=_pairs(grid)
            ) as order,
            tempfile.TemporaryDirectory() as name,
        ):
            path = Path(name) / "result.npz"
            measure_on(device, order.payload, path, keep=keep)
            result = check_result(open_result(path), order.job)
            return _subjects(subjects, suites, order, result, device.name)


def bundle(
    subjects: Sequence[Subject],
    suites: Sequence[Suite],
    folder: Path,
    *,
    quick: bool = False,
    threads: int | None = None,
    energy: str | None = None,
    grid: Grid | None = None,
) -> str:
    """Write the folder for a device that nobody can reach; the line to run there."""
    from edgekd.targets.devices.bundle import bundle_command, write_bundle

    subjects = _for_agent(subjects)
    with _order(
        subjects, suites, quick=quick, threads=threads, energy=energy, pairs=_pairs(grid)
    ) as order:
        packages = sorted(
            {PACKAGES[kind] for one in subjects if (kind := _format(one)) is not None}
        )
        write_bundle(
            order.payload, folder, ", ".join(one.name for one in order.job.artifacts), packages
        )
        return bundle_command(order.payload.job_folder)


def on_devices(
    subjects: Sequence[Subject],
    suites: Sequence[Suite],
    specs: Sequence[str],
    *,
    quick: bool = False,
    threads: int | None = None,
    keep: bool = False,
    energy: str | None = None,
    grid: Grid | None = None,
) -> list[Subject]:
    """What runs here (teacher, torch student), then every artifact as each device measures it."""
    found = [subject for subject in subjects if subject.folder is None]
    for spec in specs:
        found += on_device(
            subjects,
            suites,
            spec,
            quick=quick,
            threads=threads,
            keep=keep,
            energy=energy,
            grid=grid,
        )
    return found


def from_result(
    subjects: Sequence[Subject], suites: Sequence[Suite], path: Path
) -> tuple[list[Subject], bool]:
    """What runs here, then the artifacts as a device measured them, from the file it wrote; and whether it was quick.

    Raises:
        EdgekdError: a result of other artifacts or of other images.
    """
    stored = open_result(path)
    subjects = _for_agent(subjects)
    quick = stored.job.protocol.name == QUICK.name
    job = stored.job
    with _order(
        subjects, suites, quick=quick, threads=job.threads, energy=job.energy, pairs=job.grid
    ) as order:
        result = check_result(stored, order.job)
        others = [subject for subject in subjects if subject.folder is None]
        return others + _subjects(subjects, suites, order, result, result.name), quick


def device_facts(
    subjects: Sequence[Subject], beside: Mapping[tuple[str, int], NDArray[np.float32]]
) -> list[dict[str, Any]]:
    """What the report tells about each device.

    Args:
        beside: (subject's key, position of the suite) → what the same file answers on this machine, `[n, C]`.
    """
    found: dict[str, dict[str, Any]] = {}
    for subject in subjects:
        if subject.measured is None:
            continue
        facts = found.setdefault(subject.device, subject.measured.facts | {"artifacts": {}})
        same = [
            logits.argmax(axis=1) == subject.measured.logits[number].argmax(axis=1)
            for (key, number), logits in beside.items()
            if key == subject.key
        ]
        facts["artifacts"][f"{subject.run}/{subject.name}"] = {
            "agreement_here": float(np.concatenate(same).mean()) if same else None,
            "same_pixels": subject.measured.same_pixels,
            **({"built": asdict(subject.measured.built)} if subject.measured.built else {}),
        }
    return list(found.values())


def latency_places(suites: Sequence[Suite]) -> tuple[int, NDArray[np.int64]]:
    """Position of the suite whose images the clock runs on (`id` where there is one), and 64 indices into it."""
    number = next((number for number, suite in enumerate(suites) if suite.name == "id"), 0)
    indices = suites[number].indices
    return number, indices[np.linspace(0, len(indices) - 1, MIN_BUFFERS).round().astype(int)]


def _for_agent(subjects: Sequence[Subject]) -> list[Subject]:
    """Without the artifacts that no agent can run, which are named."""
    found = []
    for subject in subjects:
        kind = _format(subject)
        if kind is None or kind in FORMATS:
            found.append(subject)
        else:
            warn(
                f"{subject.name} is left out: the agent on a device runs {' and '.join(FORMATS)} files, not {kind}"
            )
    return found


def _format(subject: Subject) -> str | None:
    """The format of its file; None where it has none."""
    return (
        None if subject.folder is None else read_artifact(subject.folder, check_hashes=False).format
    )


def _able(subjects: Sequence[Subject], device: Device) -> list[Subject]:
    """Without the artifacts whose runtime the device lacks, which are named; with none left that is an error."""
    artifacts = [subject for subject in subjects if subject.folder is not None]
    if not artifacts:
        return list(subjects)  # which is told where a job would be made of them
    manifests = [
        read_artifact(Path(one.folder), check_hashes=False) for one in artifacts if one.folder
    ]
    reasons = unable(device, [needs(manifest.model_dump(mode="json")) for manifest in manifests])
    left_out = {
        one.key: reason
        for one, reason in zip(artifacts, reasons, strict=True)
        if reason is not None
    }
    if len(left_out) == len(artifacts):
        raise next(iter(left_out.values()))
    for one in artifacts:
        if one.key in left_out:
            warn(f"{one.name} is left out: {left_out[one.key]}")
    return [subject for subject in subjects if subject.key not in left_out]


def _pairs(grid: Grid | None) -> tuple[tuple[int, int | None], ...]:
    return grid.pairs if grid else ()


@contextmanager
def _order(
    subjects: Sequence[Subject],
    suites: Sequence[Suite],
    *,
    quick: bool,
    threads: int | None,
    energy: str | None,
    pairs: tuple[tuple[int, int | None], ...],
) -> Iterator[_Order]:
    artifacts = [subject for subject in subjects if subject.folder is not None]
    if not artifacts:
        raise EdgekdError(
            "There is no artifact for the device to run.",
            "Make one: edgekd export.",
        )
    if any(suite.corruption is not None for suite in suites):
        raise EdgekdError(
            "Corrupted images are drawn on this machine only.",
            "Measure corruptions without --device.",
        )
    with tempfile.TemporaryDirectory(prefix="edgekd-device-") as name:
        scratch = Path(name)
        pack = ImagePack(scratch / "images.zip")
        wanted = [
            n
            for n, suite in enumerate(suites)
            if any(suite.holds(subject) for subject in artifacts)
        ]
        clocked, latency = latency_places(suites)
        say(f"packing {sum(len(suites[n].indices) for n in wanted)} images for the device")
        places: dict[tuple[int, int], int] = {}
        for n in wanted:
            for index in suites[n].indices.tolist():
                places[n, index] = pack.add(suites[n].images, index)
        for index in latency.tolist():
            places.setdefault((clocked, index), pack.add(suites[clocked].images, index))
        image_file = f"images-{pack.close()[:16]}.zip"
        folders = {
            subject.key: artifact_folder_name(Path(subject.folder))
            for subject in artifacts
            if subject.folder
        }
        job = Job(
            artifacts=tuple(
                JobArtifact(
                    name=f"{subject.run}/{subject.name}",
                    folder=folders[subject.key],
                    images=tuple(_places(subject, suites, places)),
                    latency_images=tuple(places[clocked, index] for index in latency.tolist()),
                )
                for subject in artifacts
            ),
            image_file=image_file,
            protocol=QUICK if quick else FULL,
            threads=threads,
            energy=energy,
            grid=pairs,
            grid_protocol=(throughput.QUICK if quick else throughput.FULL) if pairs else None,
        )
        sources = {
            folders[subject.key]: Path(subject.folder) for subject in artifacts if subject.folder
        }
        yield _Order(job, assemble(job, scratch / "images.zip", sources, scratch), places)


def _subjects(
    subjects: Sequence[Subject],
    suites: Sequence[Suite],
    order: _Order,
    result: DeviceResult,
    device: str,
) -> list[Subject]:
    shown = f"{device} (emulated)" if result.emulated else device
    facts = {
        "device": shown,
        "emulated": result.emulated,
        "restarts": result.restarts,
        "temperature_max_c": result.temperature_max_c,
        **result.environment,
    }
    clocked, latency = latency_places(suites)
    found = []
    artifacts = [subject for subject in subjects if subject.folder is not None]
    for subject, one in zip(artifacts, result.artifacts, strict=True):
        if one.logits.shape[1] != len(subject.classes):
            raise EdgekdError(
                f"The result of {device} has another number of classes than {subject.name}.", ""
            )
        logits, start = {}, 0
        checks = dict(zip(_places(subject, suites, order.places), one.pixels.tolist(), strict=True))
        for n, suite in enumerate(suites):
            if suite.holds(subject):
                stop = start + len(suite.indices)
                logits[n] = one.logits[start:stop, columns_of(subject, suite)]
                start = stop
        same = [
            zlib.crc32(prepare(suites[clocked].images, index, subject.preprocess).tobytes())
            == checks[place]
            for index in sorted(set(latency.tolist()))
            if (place := order.places[clocked, index]) in checks
        ]
        measured = Measured(
            one.model,
            one.whole,
            one.prepare_ms,
            logits,
            facts,
            float(np.mean(same)) if same else None,
            one.placement,
            one.rates,
            one.built,
        )
        found.append(
            replace(subject, name=f"{subject.name}@{shown}", device=shown, measured=measured)
        )
    return found


def _places(
    subject: Subject, suites: Sequence[Suite], places: Mapping[tuple[int, int], int]
) -> list[int]:
    """Where the images of all its suites lie in the image file, suite after suite."""
    return [
        places[n, index]
        for n, suite in enumerate(suites)
        if suite.holds(subject)
        for index in suite.indices.tolist()
    ]
