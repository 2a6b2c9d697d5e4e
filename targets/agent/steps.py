"""The steps of a job, each in a process of its own: predictions, latency, end-to-end latency, throughput."""

from __future__ import annotations

import platform
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError
from edgekd.core.machine import peak_rss_mb, state, usable_cores
from edgekd.core.readers import read_errors
from edgekd.data.images import MAX_BYTES
from edgekd.targets.agent.job import CHUNK, Job, JobArtifact
from edgekd.targets.agent.model import open_model
from edgekd.targets.agent.store import Arrays, write_step
from edgekd.targets.session import Session, refuse_batch, refuse_fallback
from edgekd.targets.timing.energy import Meter, open_sensor
from edgekd.targets.timing.stopwatch import LatencySamples, measure, measure_interleaved, rotating

Say = Callable[[str], None]
_CPUINFO = "/proc/cpuinfo"


def run_group(job: Job, folder: Path, names: Sequence[str], say: Say) -> None:
    """Make the journal's entries `names`, which belong to one process."""
    kind, which, *rest = names[0].split("-")
    root, done = folder.parent, folder / "done" / f"{names[0]}.npz"
    with _image_file(root / job.image_file) as images:
        if kind == "latency":
            numbers = list(range(len(job.artifacts))) if which == "all" else [int(which)]
            _latency(job, root, numbers, images, done, say)
            return
        artifact = job.artifacts[int(which)]
        batch, threads = job.grid[int(rest[0])] if kind == "throughput" else (1, job.threads)
        model = open_model(root / artifact.folder, threads=threads)
        if kind == "predict":
            _predict(artifact, model, images, done.parent, names, say)
        elif kind == "endtoend":
            _end_to_end(job, which, artifact, model, images, done, say)
        else:
            say(
                f"throughput of {artifact.name}: batch {batch}, threads {threads or 'as the runtime chooses'}"
            )
            _throughput(job, which, batch, model, _prepared(artifact, model, images), done)


def _predict(
    artifact: JobArtifact,
    model: Session,
    images: zipfile.ZipFile,
    done: Path,
    names: Sequence[str],
    say: Say,
) -> None:
    placement = model.placement()
    if placement is not None:
        refuse_fallback(artifact.name, placement)  # before hours are spent on it
    facts = {"boot": boot(), "placement": None if placement is None else asdict(placement)}
    with ThreadPoolExecutor(usable_cores()) as pool:
        for name in names:
            start = int(name.rpartition("-")[2])
            chosen = artifact.images[start : start + CHUNK]
            end = start + len(chosen)
            say(f"logits of {artifact.name}: images {start} to {end} of {len(artifact.images)}")
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
            write_step(done / f"{name}.npz", arrays, facts)


def _latency(
    job: Job, root: Path, numbers: Sequence[int], images: zipfile.ZipFile, done: Path, say: Say
) -> None:
    """Time artifacts in alternating blocks; idle power is measured before any model is loaded."""
    artifacts = {str(n): job.artifacts[n] for n in numbers}
    meter = None
    if job.energy is not None:
        say(f"power at rest, by {job.energy}")
        meter = Meter(open_sensor(job.energy))
        meter.rest()
    models = {n: open_model(root / a.folder, threads=job.threads) for n, a in artifacts.items()}
    named = ", ".join(one.name for one in artifacts.values())
    process = done.stem.rpartition("-")[2]
    say(f"latency of {named}, {job.protocol.seconds:g} s each ({process})")
    runners = {
        n: rotating(model.run, _prepared(artifacts[n], model, images))
        for n, model in models.items()
    }
    before = state()
    measured = measure_interleaved(runners, job.protocol, meter=meter)
    arrays: Arrays = {}
    facts: dict[str, Any] = {"before": before, "after": state(), "boot": boot()}
    for n, model in models.items():
        arrays |= _arrays(n, measured[n])
        facts[n] = _facts(measured[n], model)
        facts[n]["energy"] = None if meter is None else meter.facts()
    write_step(done, arrays, facts)


def _end_to_end(
    job: Job,
    n: str,
    artifact: JobArtifact,
    model: Session,
    images: zipfile.ZipFile,
    done: Path,
    say: Say,
) -> None:
    say(f"end-to-end latency of {artifact.name}, {job.protocol.seconds:g} s")
    encoded = [_encoded(images, place) for place in artifact.latency_images]
    prepare_ns: list[int] = []

    def run_once(query: int) -> object:
        before = time.perf_counter_ns()
        pixels = model.prepare(encoded[query % len(encoded)])
        prepare_ns.append(time.perf_counter_ns() - before)
        return model.run(pixels[None])

    before = state()
    samples = measure(run_once, job.protocol)
    prepare_ms = np.asarray(prepare_ns[-len(samples.samples_ms) :], dtype=np.float64) / 1e6
    arrays = _arrays(n, samples) | {f"prepare_ms_{n}": prepare_ms}
    facts = {"before": before, "after": state(), "boot": boot(), "peak_rss_mb": peak_rss_mb()}
    write_step(done, arrays, facts | {n: _facts(samples, model)})


def _throughput(
    job: Job, n: str, batch: int, model: Session, buffers: NDArray[np.uint8], done: Path
) -> None:
    assert job.grid_protocol is not None
    try:
        refuse_batch(batch, model.largest_batch)
        samples = measure(rotating(model.run, buffers, batch), job.grid_protocol)
    # Made for fewer images at a time, or the memory is too small for so many: whatever the runtime raises then.
    except Exception as error:
        if batch == 1:
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        write_refusal(done, reason[0])
        return
    write_step(done, _arrays(n, samples), {"boot": boot(), n: _facts(samples, model)})


def write_refusal(done: Path, reason: str) -> None:
    """Write the journal's entry of a throughput that cannot be measured, so that it is not tried again."""
    write_step(done, {}, {"boot": boot(), "reason": reason})


def _arrays(n: str, samples: LatencySamples) -> Arrays:
    return {f"samples_ms_{n}": samples.samples_ms, f"blocks_{n}": samples.blocks}


def _facts(samples: LatencySamples, model: Session) -> dict[str, Any]:
    """Return every field of the samples but its arrays, and how the model was opened."""
    own = {k: v for k, v in vars(samples).items() if k not in ("samples_ms", "blocks")}
    opened = {"load_ms": model.load_ms, "provider": model.provider, "threads": model.threads}
    return {**own, **opened}


def boot() -> str:
    """Return what changes with every start of the device's system; empty where it is not known."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as handle:
            return f"{zlib.crc32(handle.read().encode()):08x}"
    except OSError:
        return ""


def emulated() -> bool:
    """Return whether this is an Arm program on an x86 processor, as under qemu-user, whose times mean nothing.

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


def _prepared(artifact: JobArtifact, model: Session, images: zipfile.ZipFile) -> NDArray[np.uint8]:
    """Return the images to be timed as the model takes them, uint8 `[N, H, W, 3]`."""
    return np.stack([model.prepare(_encoded(images, place)) for place in artifact.latency_images])
