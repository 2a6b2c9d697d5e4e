"""Compare the speed of `edgekd predict` with that of a plain ONNX Runtime loop with the same decoding.

    python benchmarks/predict_speed.py ARTIFACT FOLDER [--images 1000] [--repeats 5]

All read the same files, use the artifact's own `Preprocess` and run the same file in batches of 16. The bare loop
decodes a batch with a thread pool and then runs it. The overlapped one decodes the next batch at the same time. They
alternate, so that other load affects all, and the medians are compared.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime

import edgekd
from edgekd.core.manifest import read_artifact
from edgekd.data.images import EXTENSIONS, decode

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    found = sorted(path for path in given.folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    paths = found[:: max(1, len(found) // given.images)][: given.images]
    artifact, model = read_artifact(given.artifact), edgekd.load(given.artifact)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        given.artifact / artifact.model_file, options, providers=["CPUExecutionProvider"]
    )
    chunks = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]

    def one(path: Path) -> np.ndarray:
        return artifact.preprocess.pixels(decode(path))

    def best(pixels: list[np.ndarray]) -> list[str]:
        logits = session.run(None, {artifact.inputs[0].name: np.stack(pixels)})[0]
        return [artifact.classes[index] for index in logits.argmax(axis=1)]

    def bare() -> list[str]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [name for chunk in chunks for name in best(list(pool.map(one, chunk)))]

    def overlapped() -> list[str]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            batches = [[pool.submit(one, path) for path in chunk] for chunk in chunks]
            return [
                name for batch in batches for name in best([future.result() for future in batch])
            ]

    ways: dict[str, Callable[[], list[str]]] = {
        "edgekd.load(…).predict": lambda: [one.label for one in model.predict(paths)],
        "edgekd predict": lambda: [
            one.label for one in edgekd.predict(given.artifact, [str(path) for path in paths])
        ],
        "bare loop": bare,
        "bare loop, overlapped": overlapped,
    }
    answers = [way() for way in ways.values()]  # warm-up, and check that all predictions are equal
    assert all(answer == answers[0] for answer in answers), "the loops disagree"
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.repeats):
        for name, way in ways.items():
            before = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - before)
    medians = {name: float(np.median(taken)) for name, taken in seconds.items()}
    for name, median in medians.items():
        rate, ratio = len(paths) / median, median / medians["bare loop, overlapped"]
        print(f"{name:<24}{median:8.2f} s  {rate:8.1f} images/s  {ratio:.3f}")


if __name__ == "__main__":
    main()
