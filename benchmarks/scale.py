"""Estimate storage and time for 10⁴ to 10⁸ images from rates, and check the estimate against a measured run.

    python benchmarks/scale.py --student 90 --teacher 20 --decode 120 --lookup 40000
    python benchmarks/scale.py --check

Rates are in images/s: student training step (one process), teacher (one process), decoding (one core), and reading
cached embeddings (`cache_size.py`). `edgekd train --plan` measures the first three. As in the training loop, the
simulation reads the next batch during the present training step. `--check` measures the rates in a run on a few
synthetic images, predicts the time for four times as many, and trains on those.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

KEY_BYTES, INDEX_BYTES = 34, 42
"""Bytes of a cached embedding's key on disk, and of its index entry in the memory of each process."""
STORE_BYTES = 8 * 2**30
"""Above this size, images are decoded at every visit (`edgekd.distill.inputs.batches.MAX_BYTES`)."""


@dataclass(frozen=True)
class Rates:
    """Rates in images per second; `processes` train and embed, each with `cores` for decoding."""

    student: float
    teacher: float
    decode: float
    lookup: float
    processes: int = 1
    cores: int = 2


def simulate(rates: Rates, batch: int, steps: int, *, stored: bool) -> tuple[float, str]:
    """Return the duration of `steps` steps in seconds, and the slowest part."""
    share = batch / rates.processes
    parts = {"student": share / rates.student, "cache": share / rates.lookup}
    if not stored:
        parts["decoding"] = share / (rates.decode * rates.cores)
    reading = sum(seconds for name, seconds in parts.items() if name != "student")
    ready = trained = 0.0
    for _ in range(steps):
        began = max(ready, trained)  # the batch is ready, and the previous step is done
        ready, trained = began + reading, began + parts["student"]
    slowest = max(parts, key=lambda name: parts[name])
    return trained, slowest


def table(rates: Rates, *, views: int, dim: int, side: int, epochs: int, batch: int) -> list[str]:
    """Return the lines of the table in docs/scale.md."""
    lines = [
        "| images | cache on disk | index in memory | decoded pixels | teacher, process-hours | training, hours | "
        "slowest part |",
        "|---:|---:|---:|---:|---:|---:|---|",
    ]
    for power in range(4, 9):
        images = 10**power
        entries, pixels = images * views, images * side * side * 3
        stored = pixels <= STORE_BYTES
        sample = 1000
        seconds, slowest = simulate(rates, batch, sample, stored=stored)
        hours = seconds / sample * (images / batch) * epochs / 3600
        disk = f"{entries * (2 * dim + KEY_BYTES) / 1e9:,.2f} GB"
        pixels_stored = f"{pixels / 1e9:,.1f} GB" if stored else "decoded at every visit"
        teacher_hours = entries / rates.teacher / 3600
        lines.append(
            f"| 10{'⁰¹²³⁴⁵⁶⁷⁸⁹'[power]} | {disk} | {entries * INDEX_BYTES / 1e6:,.0f} MB | {pixels_stored} | "
            f"{teacher_hours:,.1f} | {hours:,.1f} | {slowest} |"
        )
    return lines


def check(few: int) -> None:
    """Predict the additional time of a run on `4 · few` images compared with `few`, and train both.

    The difference is compared because start-up and the last validation do not depend on the number of images.
    """
    from shard_speed import write

    import edgekd
    from edgekd.api import plan_training

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["EDGEKD_CACHE"] = str(root / "cache")
        for name, images in (("few", few), ("many", 4 * few)):
            write(root / name, images, 160, folder=True)
        options = {
            "student": "mobilenetv3", "pretrained": "scratch", "size": 64, "recipe": "kd", "teacher": "toy",
            "views": 2, "epochs": 2, "batch_size": 32, "accelerator": "cpu", "test_domain": "none",
        }  # fmt: skip
        plans = [plan_training(data=root / "few" / "folder", **options) for _ in range(3)]
        parts = ("teacher_seconds", "decode_seconds", "train_seconds")
        found = [statistics.median(getattr(plan, part) for plan in plans) for part in parts]
        seconds = {}
        for name in ("few", "many"):
            started = time.perf_counter()
            edgekd.train(data=root / name / "folder", out=root / f"run-{name}", **options)
            seconds[name] = time.perf_counter() - started
    predicted, measured = 3 * sum(found), seconds["many"] - seconds["few"]
    shares = ", ".join(
        f"{part.split('_')[0]} {3 * value:.0f}" for part, value in zip(parts, found, strict=True)
    )
    print(
        f"{4 * few:,} images in place of {few:,}: predicted {predicted:.0f} s more ({shares}), measured {measured:.0f} "
        f"s more (the smaller run: {seconds['few']:.0f} s), ratio {measured / predicted:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("student", "teacher", "decode", "lookup"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--side", type=int, default=round(1.2 * 224))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--few", type=int, default=300)
    given = parser.parse_args()
    if given.check:
        return check(given.few)
    if None in (given.student, given.teacher, given.decode, given.lookup):
        parser.error("give all four rates, or --check")
    rates = Rates(
        given.student, given.teacher, given.decode, given.lookup, given.processes, given.cores
    )
    own = {name: getattr(given, name) for name in ("views", "dim", "side", "epochs", "batch")}
    print("\n".join(table(rates, **own)))


if __name__ == "__main__":
    main()
