"""Images whose colour tells their label, and models that answer rightly as often as they are told to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.measure import local
from edgekd.benchmark.report import charts, write
from edgekd.benchmark.results.rows import Kind
from edgekd.benchmark.results.schema import Report
from edgekd.benchmark.subjects import Subject, Suite
from edgekd.configs.benchmark import SpeedOptions
from edgekd.core.predictor import Predictor
from edgekd.core.preprocess import Preprocess
from edgekd.data.image_set import ImageSet
from edgekd.targets.devices.result import Clocked
from edgekd.targets.timing import stopwatch
from edgekd.targets.timing.stopwatch import LatencySamples, Protocol

CLASSES = ("cat", "dog", "fish")
SHORT, ONE_THREAD = SpeedOptions(quick=True), SpeedOptions(quick=True, threads=1)
SMALL, LARGE = Preprocess(size=16), Preprocess(size=32)


class Paint:
    """Reader of image i: red is the label, green the number. Counts how often each image is read."""

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels
        self.reads = np.zeros(len(labels), dtype=int)

    def __call__(self, index: int, draft: int | None = None) -> Image.Image:
        self.reads[index] += 1
        return Image.new("RGB", (40, 30), (int(self.labels[index]), index % 256, index // 256))


def paint_images(n: int = 120) -> ImageSet:
    labels = np.arange(n, dtype=np.int64) % len(CLASSES)
    keys = tuple(f"{index:032x}" for index in range(n))
    ids = tuple(f"all/{CLASSES[label]}/{index}.png" for index, label in enumerate(labels))
    domains = np.zeros(n, dtype=np.int64)
    return ImageSet("paint", CLASSES, ("all",), labels, domains, keys, ids, None, Paint(labels))


def model(wrong_every: int, *, strength: float = 4.0, classes: int = len(CLASSES)) -> Predictor:
    """Wrong on every image whose number is a multiple of `wrong_every` (0: never wrong)."""

    def predict(pixels: np.ndarray) -> np.ndarray:
        label = pixels[:, 0, 0, 0].astype(int)
        number = pixels[:, 0, 0, 1].astype(int) + 256 * pixels[:, 0, 0, 2].astype(int)
        wrong = (number % wrong_every == 0) if wrong_every else np.zeros(len(label), dtype=bool)
        logits = np.zeros((len(label), classes), dtype=np.float32)
        logits[np.arange(len(label)), (label + wrong) % classes] = strength
        return logits

    return predict


def subject(
    name: str, kind: Kind, predict: Predictor, *, run: str = "r", preprocess: Preprocess = SMALL,
    precision: str = "fp32", folder: Path | None = None, identity: str = "", classes: tuple[str, ...] = CLASSES,
) -> Subject:  # fmt: skip
    return Subject(name, run, kind, precision, preprocess, predict, classes, folder, identity)


def id_and_ood(images: ImageSet) -> list[Suite]:
    """The first half in domain; two unseen domains of a quarter each."""
    n = len(images)
    return [
        Suite("id", images, np.arange(n // 2)),
        Suite("ood:photo", images, np.arange(n // 2, 3 * n // 4)),
        Suite("ood:sketch", images, np.arange(3 * n // 4, n)),
    ]


def four_subjects(
    folder: Path, *, run: str = "r", sketch_every: int = 2, identity: str = "toy"
) -> list[Subject]:
    """Teacher, torch student, FP32 and INT8 artifact of one run, with 2 and 1 MB of files."""
    found = [
        subject("teacher", "teacher", model(10), run=run, preprocess=LARGE, identity=identity),
        subject("torch", "torch", model(sketch_every), run=run),
    ]
    for precision, every, size in (
        ("fp32", sketch_every, 2_000_000),
        ("int8", max(2, sketch_every - 1), 1_000_000),
    ):
        place = folder / run / f"onnxruntime-{precision}"
        place.mkdir(parents=True)
        (place / "model.onnx").write_bytes(bytes(size))
        (place / "artifact.json").write_text("{}")
        found.append(
            subject(place.name, "artifact", model(every), run=run, precision=precision, folder=place)
        )  # fmt: skip
    return found


def draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let empty drawings stand for all of a report, since drawing takes seconds."""
    monkeypatch.setattr(write, "draw_picture", lambda _, path: path.touch())
    monkeypatch.setattr(charts, "svg", lambda figure, key, title, text: f"<svg id={key}></svg>")


def fake_measurements(
    monkeypatch: pytest.MonkeyPatch, p50_ms: dict[str, float], *, picture: bool = False
) -> None:
    """Replace the fresh processes by samples around the given medians (key: the artifact's `run/name`)."""
    if not picture:
        draw_nothing(monkeypatch)

    def clocked(p50: float, threads: int | None, **facts: Any) -> Clocked:
        times, blocks = p50 * np.linspace(0.9, 1.1, 201), np.arange(201) // 10
        quiet = {"other_cpu": 0.0, "stolen_cpu": 0.0}
        samples = LatencySamples(times, blocks, 9.0, 50, 3.0, True, True, **quiet)
        return Clocked(samples, 12.0, "CPUExecutionProvider", threads or 2, **facts)

    def measure_artifacts(
        folders, encoded, protocol: Protocol, *, threads=None, together=False, energy=None
    ):  # type: ignore[no-untyped-def]
        return {key: [clocked(p50_ms[key], threads)] * protocol.processes for key in folders}

    def measure_end_to_end(folders, encoded, protocol: Protocol, *, threads=None):  # type: ignore[no-untyped-def]
        return {key: clocked(p50_ms[key] + 3.0, threads, peak_rss_mb=101.0) for key in folders}

    monkeypatch.setattr(local, "measure_artifacts", measure_artifacts)
    monkeypatch.setattr(local, "measure_end_to_end", measure_end_to_end)
    monkeypatch.setattr(
        stopwatch, "CONTEXT", Protocol("context", 2, 0.0, 0.1, 4, 0.0, 0.2, 0.001, 1)
    )  # fmt: skip


def four_measured(
    folder: Path, *, run: str = "r", sketch_every: int = 3, picture: bool = False,
    suites: list[Suite] | None = None, **options: Any,
) -> Report:  # fmt: skip
    """The report in `folder/out` of `four_subjects`, of which FP32 takes 2 ms and INT8 3 ms."""
    with pytest.MonkeyPatch.context() as patch:
        times = {f"{run}/onnxruntime-fp32": 2.0, f"{run}/onnxruntime-int8": 3.0}
        fake_measurements(patch, times, picture=picture)
        subjects = four_subjects(folder, run=run, sketch_every=sketch_every)
        suites = suites or id_and_ood(paint_images())
        return run_benchmark(subjects, suites, folder / "out", speed=SHORT, **options)
