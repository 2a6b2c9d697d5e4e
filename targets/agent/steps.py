"""The steps of a job, each in a separate process: predictions, latency, end-to-end latency, throughput."""

from __future__ import annotations

import platform
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
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
    """Make the journal's entries `names` in this process."""
    kind, which, *rest = names[0].split("-")
    path = folder.parent / job.image_file
    with read_errors(path, "image file", "zip", "Send it again."):
        images = zipfile.ZipFile(path)
    with images:
        group = _Group(job, folder.parent, images, folder / "done", names, say)
        if kind == "latency":
            numbers = range(len(job.artifacts)) if which == "all" else [int(which)]
            group.latency([str(number) for number in numbers])
        elif kind == "predict":
            group.predict(which)
        elif kind == "endtoend":
            group.end_to_end(which)
        else:
            group.throughput(which, *job.grid[int(rest[0])])


@dataclass(frozen=True)
class _Group:
    """The journal's entries of one process; artifacts are identified by their numbers in the job, as text."""

    job: Job
    root: Path
    """Parent folder of the artifacts."""
    images: zipfile.ZipFile
    done: Path
    """The journal."""
    names: Sequence[str]
    say: Say

    def _write(self, arrays: Arrays, facts: dict[str, Any], name: str = "") -> None:
        write_step(self.done / f"{name or self.names[0]}.npz", arrays, {"boot": boot(), **facts})

    def _open(self, n: str, threads: int | None) -> tuple[JobArtifact, Session]:
        artifact = self.job.artifacts[int(n)]
        return artifact, open_model(self.root / artifact.folder, threads=threads)

    def _prepared(self, artifact: JobArtifact, model: Session) -> NDArray[np.uint8]:
        """Return the preprocessed images for the timing, uint8 `[N, H, W, 3]`."""
        encoded = (_encoded(self.images, place) for place in artifact.latency_images)
        return np.stack([model.prepare(one) for one in encoded])

    def predict(self, n: str) -> None:
        """Run the model on the artifact's images."""
        artifact, model = self._open(n, self.job.threads)
        placement = model.placement()
        if placement is not None:
            refuse_fallback(artifact.name, placement)  # before a long measurement
        facts = {"placement": None if placement is None else asdict(placement)}
        with ThreadPoolExecutor(usable_cores()) as pool:
            for name in self.names:
                start = int(name.rpartition("-")[2])
                chosen = artifact.images[start : start + CHUNK]
                end, total = start + len(chosen), len(artifact.images)
                self.say(f"logits of {artifact.name}: images {start} to {end} of {total}")
                encoded = (_encoded(self.images, place) for place in chosen)
                logits, checks = [], []
                # Batch 1, as for the latency, since an artifact may take only one image at a time.
                for pixels in pool.map(model.prepare, encoded):
                    logits.append(model.run(pixels[None])[0])
                    checks.append(zlib.crc32(pixels.tobytes()))
                result = np.stack(logits).astype(np.float32)  # [n, C]
                if result.shape[1] != len(model.classes) or not np.isfinite(result).all():
                    raise EdgekdError(
                        f"{artifact.name} returned logits that are not finite or not as many as its classes.",
                        "Compare it with the FP32 artifact on this device.",
                    )
                arrays = {"logits": result, "pixels": np.asarray(checks, dtype=np.uint32)}
                self._write(arrays, facts, name)

    def latency(self, numbers: Sequence[str]) -> None:
        """Time artifacts in alternating blocks; idle power is measured before any model is loaded."""
        job, meter = self.job, None
        if job.energy is not None:
            self.say(f"power at rest, by {job.energy}")
            meter = Meter(open_sensor(job.energy))
            meter.rest()
        opened = {n: self._open(n, job.threads) for n in numbers}
        named = ", ".join(artifact.name for artifact, _ in opened.values())
        process = self.names[0].rpartition("-")[2]
        self.say(f"latency of {named}, {job.protocol.seconds:g} s each ({process})")
        runners = {n: rotating(one[1].run, self._prepared(*one)) for n, one in opened.items()}
        before = state()
        measured = measure_interleaved(runners, job.protocol, meter=meter)
        arrays: Arrays = {}
        facts: dict[str, Any] = {"before": before, "after": state()}
        for n, (_, model) in opened.items():
            arrays |= _arrays(n, measured[n])
            facts[n] = _facts(measured[n], model)
            facts[n]["energy"] = None if meter is None else meter.facts()
        self._write(arrays, facts)

    def end_to_end(self, n: str) -> None:
        """Measure end-to-end latency, from encoded image to logits."""
        artifact, model = self._open(n, self.job.threads)
        self.say(f"end-to-end latency of {artifact.name}, {self.job.protocol.seconds:g} s")
        encoded = [_encoded(self.images, place) for place in artifact.latency_images]
        prepare_ns: list[int] = []

        def run_once(query: int) -> object:
            before = time.perf_counter_ns()
            pixels = model.prepare(encoded[query % len(encoded)])
            prepare_ns.append(time.perf_counter_ns() - before)
            return model.run(pixels[None])

        before = state()
        samples = measure(run_once, self.job.protocol)
        prepare_ms = np.asarray(prepare_ns[-len(samples.samples_ms) :], dtype=np.float64) / 1e6
        arrays = _arrays(n, samples) | {f"prepare_ms_{n}": prepare_ms}
        facts = {"before": before, "after": state(), "peak_rss_mb": peak_rss_mb()}
        self._write(arrays, facts | {n: _facts(samples, model)})

    def throughput(self, n: str, batch: int, threads: int | None) -> None:
        """Time whole batches, or record the reason why they cannot be run."""
        assert self.job.grid_protocol is not None
        artifact, model = self._open(n, threads)
        how = threads or "as the runtime chooses"
        self.say(f"throughput of {artifact.name}: batch {batch}, threads {how}")
        buffers = self._prepared(artifact, model)
        try:
            refuse_batch(batch, model.largest_batch)
            samples = measure(rotating(model.run, buffers, batch), self.job.grid_protocol)
        # Any error of the runtime if the file takes fewer images, or memory is too small.
        except Exception as error:
            if batch == 1:
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            write_refusal(self.done / f"{self.names[0]}.npz", reason[0])
        else:
            self._write(_arrays(n, samples), {n: _facts(samples, model)})


def write_refusal(done: Path, reason: str) -> None:
    """Write the journal's entry for a throughput that cannot be measured, so that it is not tried again."""
    write_step(done, {}, {"boot": boot(), "reason": reason})


def _arrays(n: str, samples: LatencySamples) -> Arrays:
    return {f"samples_ms_{n}": samples.samples_ms, f"blocks_{n}": samples.blocks}


def _facts(samples: LatencySamples, model: Session) -> dict[str, Any]:
    """Return the fields of the samples without arrays, and the options of the session."""
    own = {k: v for k, v in vars(samples).items() if k not in ("samples_ms", "blocks")}
    opened = {"load_ms": model.load_ms, "provider": model.provider, "threads": model.threads}
    return {**own, **opened}


def boot() -> str:
    """Return an identifier of the system's boot, or an empty text if it is unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as handle:
            return f"{zlib.crc32(handle.read().encode()):08x}"
    except OSError:
        return ""


def emulated() -> bool:
    """Return whether this is an Arm program on an x86 processor (qemu-user), whose times are meaningless.

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


def _encoded(images: zipfile.ZipFile, place: int) -> bytes:
    with read_errors(Path(images.filename or ""), "image file", "zip", "Send it again."):
        entry = images.getinfo(f"{place:08d}")
        if entry.file_size > MAX_BYTES:
            raise ValueError("an image of more than 1 GB")
        return images.read(entry)
