"""Size, latency and accuracy of ONNX files that take float32 `[B, 3, SIZE, SIZE]`, in ONNX Runtime with one thread.

    python benchmarks/peers/files.py --pictures DIR NAME=FILE.onnx […] [--rounds 20]

The files take turns in every round; a file's p50 is over all its rounds. Pixels are prepared as edgekd does.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

SIZE, RUNS = 96, 50


def read(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return all pictures of `class/file`, float32 `[N, 3, SIZE, SIZE]` in −1 to 1, and their labels."""
    pixels, labels = [], []
    for label, kind in enumerate(sorted(folder.iterdir())):
        for path in sorted(kind.iterdir()):
            image = Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            pixels.append(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1)
            labels.append(label)
    return np.stack(pixels), np.array(labels)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+")
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    paths = dict(entry.split("=", 1) for entry in given.files)
    sessions = {
        name: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for name, path in paths.items()
    }
    inputs = {name: session.get_inputs()[0].name for name, session in sessions.items()}
    parts = {part: read(given.pictures / part) for part in ("test", "unseen")}
    images = parts["test"][0]
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(given.rounds + 1):
        for name, session in sessions.items():
            for turn in range(RUNS):
                feed = {inputs[name]: images[turn % len(images)][None]}
                before = time.perf_counter()
                session.run(None, feed)
                if number:  # the first round warms up
                    times[name].append(time.perf_counter() - before)
    print("| file | MB | p50, ms | test, % | unseen, % |\n|---|---|---|---|---|")
    for name, session in sessions.items():
        cells = []
        for pictures, labels in parts.values():
            answers = [session.run(None, {inputs[name]: one[None]})[0].argmax() for one in pictures]
            cells.append(f"{100 * np.mean(np.array(answers) == labels):.1f}")
        size, p50 = Path(paths[name]).stat().st_size / 1e6, 1000 * np.median(times[name])
        print(f"| {name} | {size:.1f} | {p50:.2f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
