"""Compare the speed of evaluating an artifact with that of a plain ONNX Runtime loop with the same decoding.

    python benchmarks/eval_speed.py ARTIFACT IMAGES [--images 1000] [--repeats 5]

All read the same files, use the artifact's own `Preprocess` and run the same session in batches of 64. The bare loop
decodes a batch with a thread pool and then runs it. The overlapped one decodes the next batch at the same time. The
three alternate, so that other load affects all, and the medians are compared.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from edgekd.benchmark.evaluate.predictions import predict_suite
from edgekd.benchmark.subjects import Subject, Suite
from edgekd.data.image_set import load_images
from edgekd.targets.session import open_session

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("data")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    session = open_session(arguments.artifact, spinning=False)
    images = load_images(arguments.data)
    indices = (
        np.linspace(0, len(images) - 1, min(arguments.images, len(images))).round().astype(np.int64)
    )
    artifact = session.artifact
    subject = Subject(
        artifact.name,
        "",
        "artifact",
        artifact.precision,
        artifact.preprocess,
        session.run,
        artifact.classes,
    )
    # Use any class, since speed does not depend on it.
    suite = Suite("id", _relabelled(images, artifact.classes), indices)

    def one(index: int) -> np.ndarray:
        return artifact.preprocess.pixels(images.read(index))

    def chunks() -> list[list[int]]:
        return [indices[start : start + BATCH].tolist() for start in range(0, len(indices), BATCH)]

    def plain() -> np.ndarray:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.concatenate(
                [session.run(np.stack(list(pool.map(one, chunk)))) for chunk in chunks()]
            )

    def overlapped() -> np.ndarray:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            waiting = [[pool.submit(one, index) for index in chunk] for chunk in chunks()[:2]]
            later, found = iter(chunks()[2:]), []
            while waiting:
                batch = np.stack([future.result() for future in waiting.pop(0)])
                if (following := next(later, None)) is not None:
                    waiting.append([pool.submit(one, index) for index in following])
                found.append(session.run(batch))
            return np.concatenate(found)

    ways: dict[str, Callable[[], np.ndarray]] = {
        "edgekd": lambda: predict_suite([subject], suite, batch=BATCH)[0],
        "bare loop": plain,
        "bare loop, overlapped": overlapped,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers = {
        name: way().argmax(axis=1) for name, way in ways.items()
    }  # warm-up, and check that all predictions are equal
    assert all((other == answers["bare loop"]).all() for other in answers.values()), (
        "the loops disagree"
    )
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            before = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - before)
    medians = {name: float(np.median(taken)) for name, taken in seconds.items()}
    for name, median in medians.items():
        print(
            f"{name:<22}{median:8.2f} s  {len(indices) / median:8.1f} images/s  {median / medians['bare loop']:.3f}"
        )


def _relabelled(images, classes):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    return replace(images, classes=classes, labels=images.labels % len(classes))


if __name__ == "__main__":
    main()
