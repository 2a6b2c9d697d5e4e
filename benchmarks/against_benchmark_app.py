"""Compare edgekd's latency of an OpenVINO artifact with that of OpenVINO's benchmark_app on the same file.

    python benchmarks/against_benchmark_app.py runs/RUN/artifacts/openvino-int8 [--rounds 3] [--seconds 10]

Both run in alternating rounds. benchmark_app runs synchronously with one stream, as edgekd does. Both use one thread,
one image, the same precision and random pixels.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from edgekd.benchmark.measure.local import measure_artifacts
from edgekd.core.manifest import read_artifact
from edgekd.targets.timing.intervals import percentile
from edgekd.targets.timing.stopwatch import QUICK

_MEDIAN, _MIN = re.compile(r"Median:\s*([\d.]+)\s*ms"), re.compile(r"Min:\s*([\d.]+)\s*ms")
Times = tuple[float, float]
"""Median and minimum of one round in ms; the minimum is more robust to other load on the machine."""


def app_ms(model: Path, size: int, seconds: int) -> Times:
    """Run one round of benchmark_app."""
    start = "from openvino.tools.benchmark.main import main; main()"
    options = f"-d CPU -hint none -api sync -nstreams 1 -nthreads 1 -infer_precision f32 -t {seconds}".split()
    command = [
        sys.executable,
        "-c",
        start,
        "-m",
        str(model),
        *options,
        "-shape",
        f"[1,{size},{size},3]",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    median, fastest = _MEDIAN.search(done.stdout), _MIN.search(done.stdout)
    if median is None or fastest is None:
        raise SystemExit(
            f"benchmark_app gave no times:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return float(median[1]), float(fastest[1])


def own_ms(folder: Path, size: int, seconds: int) -> Times:
    """Run one round of edgekd's timing."""
    rule = replace(QUICK, seconds=float(seconds), runs=100)
    pixels = np.random.default_rng(0).integers(0, 256, (64, size, size, 3), dtype=np.uint8)
    encoded = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    [found] = measure_artifacts({"a": folder}, encoded, rule, threads=1)["a"]
    samples = found.samples.samples_ms
    return percentile(samples, 50), float(samples.min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=10)
    given = parser.parse_args()
    artifact = read_artifact(given.artifact)
    size = artifact.preprocess.size
    ours: list[Times] = []
    theirs: list[Times] = []
    for number in range(given.rounds):
        ours.append(own_ms(given.artifact, size, given.seconds))
        theirs.append(app_ms(given.artifact / artifact.model_file, size, given.seconds))
        medians = " and ".join(
            f"{one[-1][0]:.3f} (fastest {one[-1][1]:.3f})" for one in (ours, theirs)
        )
        print(
            f"round {number + 1}, median in ms of edgekd and benchmark_app: {medians}", flush=True
        )
    for place, what in enumerate(("median", "fastest")):
        mine, other = np.asarray(ours)[:, place], np.asarray(theirs)[:, place]
        ratios, noise = mine / other, max(mine.max() / mine.min(), other.max() / other.min())
        print(f"{what}: edgekd / benchmark_app {np.median(ratios):.3f}, from {ratios.min():.3f} to {ratios.max():.3f}; "
              f"rounds of one program differ by a factor of up to {noise:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
