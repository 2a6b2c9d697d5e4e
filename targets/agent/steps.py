"""The steps of a job, each in a process of its own: predictions, the model's clock, the clock from file to answer, and
images per second."""

from __future__ import annotations

import platform
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.benchmark.measure.energy import Meter, open_sensor
from edgekd.benchmark.measure.environment import peak_rss_mb, state, usable_cores
from edgekd.benchmark.measure.latency import LatencySamples, measure, measure_interleaved, rotating
from edgekd.core.errors import EdgekdError
from edgekd.core.readers import read_errors
from edgekd.data.images import MAX_BYTES
from edgekd.targets.agent.job import CHUNK, Job, JobArtifact
from edgekd.targets.agent.model import open_model
from edgekd.targets.agent.store import Arrays, write_step
from edgekd.targets.session import Session, refuse_batch, refuse_fallback

Said = Callable[[str], None]
_CPUINFO = "/proc/cpuinfo"


def run_group(job: Job, folder: Path, names: Sequence[str], say: Said) -> None:
    """Make the journal's entries `names`, which belong to one process."""
    kind, which, _ = (names[0] + "-").split("-", 2)
    if kind == "throughput":
        _throughput(job, folder, names[0], say)
        return
    numbers = list(range(len(job.artifacts))) if which == "all" else [int(which)]
    artifacts = [job.artifacts[n] for n in numbers]
    meter = None
    if kind == "latency" and job.energy is not None:
        say(f"power at rest, by {job.energy}")
        meter = Meter(open_sensor(job.energy))
        meter.rest()
    models = [open_model(folder.parent / one.folder, threads=job.threads) for one in artifacts]
    with _image_file(folder.parent / job.image_file) as images:
        if kind == "predict":
            _predict(artifacts[0], models[0], images, folder, names, say)
        elif kind == "latency":
            say(
                f"latency of {_listed(artifacts)}, {job.protocol.seconds:g} s each ({names[0].rpartition('-')[2]})"
            )
            buffers = [
                np.stack([model.prepare(_encoded(images, place)) for place in one.latency_images])
                for one, model in zip(artifacts, models)  # noqa: B905  Python 3.9 has no strict
            ]
            before = state()
            measured = measure_interleaved(
                {
                    n: rotating(model.run, part)
                    for n, model, part in zip(map(str, numbers), models, buffers)  # noqa: B905
                },
                job.protocol,
                meter=meter,
            )
            arrays: Arrays = {}
            facts: dict[str, Any] = {"before": before, "after": state(), "boot": boot()}
            for n, model in zip(map(str, numbers), models):  # noqa: B905
                arrays |= sample_arrays(n, measured[n])
                facts[n] = sample_facts(measured[n]) | opened_facts(model)
                facts[n]["energy"] = None if meter is None else meter.facts()
            write_step(folder / "done" / f"{names[0]}.npz", arrays, facts)
        else:
            _end_to_end(
                job, numbers[0], models[0], images, folder / "done" / f"{names[0]}.npz", say
            )


def _predict(
    artifact: JobArtifact,
    model: Session,
    images: zipfile.ZipFile,
    folder: Path,
    names: Sequence[str],
    say: Said,
) -> None:
    placement = model.placement()
    if placement is not None:
        refuse_fallback(artifact.name, placement)  # before hours are spent on it
    with ThreadPoolExecutor(usable_cores()) as pool:
        for name in names:
            start = int(name.rpartition("-")[2])
            chosen = artifact.images[start : start + CHUNK]
            say(
                f"answers of {artifact.name}: images {start} to {start + len(chosen)} of {len(artifact.images)}"
            )
            encoded = (_encoded(images, place) for place in chosen)
            logits, checks = [], []
            # Batch 1, as the clock measures it: an artifact may be made for one image at a time.
            for pixels in pool.map(model.prepare, encoded):
                logits.append(model.run(pixels[None])[0])
                checks.append(zlib.crc32(pixels.tobytes()))
            found = np.stack(logits).astype(np.float32)  # [n, C]
            if found.shape[1] != len(model.classes) or not np.isfinite(found).all():
                raise EdgekdError(
                    f"{artifact.name} returned logits that are not finite or not as many as its classes.",
                    "Compare it with the FP32 artifact on this device.",
                )
            arrays = {"logits": found, "pixels": np.asarray(checks, dtype=np.uint32)}
            facts = {"boot": boot(), "placement": None if placement is None else asdict(placement)}
            write_step(folder / "done" / f"{name}.npz", arrays, facts)


def _end_to_end(
    job: Job, number: int, model: Session, images: zipfile.ZipFile, done: Path, say: Said
) -> None:
    artifact = job.artifacts[number]
    say(f"from file to answer with {artifact.name}, {job.protocol.seconds:g} s")
    encoded = [_encoded(images, place) for place in artifact.latency_images]
    prepare_ns: list[int] = []

    def run_once(query: int) -> object:
        before = time.perf_counter_ns()
        pixels = model.prepare(encoded[query % len(encoded)])
        prepare_ns.append(time.perf_counter_ns() - before)
        return model.run(pixels[None])

    before = state()
    samples = measure(run_once, job.protocol)
    n = str(number)
    arrays = sample_arrays(n, samples)
    arrays[f"prepare_ms_{n}"] = (
        np.asarray(prepare_ns[-len(samples.samples_ms) :], dtype=np.float64) / 1e6
    )
    facts = {"before": before, "after": state(), "boot": boot(), "peak_rss_mb": peak_rss_mb()}
    write_step(done, arrays, facts | {n: sample_facts(samples) | opened_facts(model)})


def _throughput(job: Job, folder: Path, name: str, say: Said) -> None:
    n, place = name.split("-")[1:]
    artifact, (batch, threads) = job.artifacts[int(n)], job.grid[int(place)]
    assert job.grid_protocol is not None
    say(
        f"throughput of {artifact.name}: batch {batch}, threads {threads or 'as the runtime chooses'}"
    )
    model = open_model(folder.parent / artifact.folder, threads=threads)
    with _image_file(folder.parent / job.image_file) as images:
        buffers = np.stack(
            [model.prepare(_encoded(images, image)) for image in artifact.latency_images]
        )
    try:
        refuse_batch(batch, model.largest_batch)
        samples = measure(rotating(model.run, buffers, batch), job.grid_protocol)
    except (
        Exception
    ) as error:  # made for fewer images at a time, or the memory is too small for so many
        if batch == 1:
            raise
        write_refusal(folder, name, (str(error).strip().splitlines() or [type(error).__name__])[0])
        return
    facts = {"boot": boot(), n: sample_facts(samples) | opened_facts(model)}
    write_step(folder / "done" / f"{name}.npz", sample_arrays(n, samples), facts)


def write_refusal(folder: Path, name: str, reason: str) -> None:
    """The journal's entry of a throughput that cannot be taken, so that it is not tried again."""
    write_step(folder / "done" / f"{name}.npz", {}, {"boot": boot(), "reason": reason})


def sample_arrays(name: str, samples: LatencySamples) -> Arrays:
    return {f"samples_ms_{name}": samples.samples_ms, f"blocks_{name}": samples.blocks}


def sample_facts(samples: LatencySamples) -> dict[str, Any]:
    """Every field of the samples but its arrays."""
    return {
        f.name: getattr(samples, f.name)
        for f in fields(samples)
        if f.name not in ("samples_ms", "blocks")
    }


def opened_facts(model: Session) -> dict[str, Any]:
    return {"load_ms": model.load_ms, "provider": model.provider, "threads": model.threads}


def boot() -> str:
    """Changes with every start of the device's system; empty where it does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as handle:
            return f"{zlib.crc32(handle.read().encode()):08x}"
    except OSError:
        return ""


def emulated() -> bool:
    """Whether this is an Arm program on an x86 processor, as under qemu-user: its times say nothing about a device.

    Older emulators show the host's /proc/cpuinfo, which Arm's kernel never fills like that; newer ones show the
    implementer number 0x00, which Arm reserves for software.
    """
    if not platform.machine().lower().startswith(("aarch64", "arm")):
        return False
    try:
        with open(_CPUINFO, encoding="utf-8", errors="replace") as handle:
            text = handle.read()
    except OSError:
        return False
    return "vendor_id" in text or "CPU implementer\t: 0x00" in text


def _image_file(path: Path) -> zipfile.ZipFile:
    with read_errors(path, "image file", "zip", "Send it again."):
        return zipfile.ZipFile(path)


def _encoded(images: zipfile.ZipFile, place: int) -> bytes:
    with read_errors(Path(images.filename or ""), "image file", "zip", "Send it again."):
        entry = images.getinfo(f"{place:08d}")
        if entry.file_size > MAX_BYTES:
            raise ValueError("an image of more than 1 GB")
        return images.read(entry)


def _listed(artifacts: Sequence[JobArtifact]) -> str:
    return ", ".join(one.name for one in artifacts)
