"""Export one student with edgekd, timmx and Olive, and print time, size, latency and accuracy of the files.

    python benchmarks/peers/export.py --environments DIR --assets ASSETS --pictures DIR --trained DIR --out DIR

Run it in edgekd's environment. `--trained` is the output of `train_edgekd.py` with the recipe `kd`, whose student is a
plain timm classifier. All files have normalised float32 input `[B, 3, SIZE, SIZE]` and alternate in ONNX Runtime with
one thread. Export and latency are processor time, so that other load has little effect.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

SIZE, RUNS, ROUNDS, STUDENT = 96, 50, 10, "tf_efficientnet_lite0"


def processor_seconds(*command: str | Path) -> float:
    """Run a command and return its processor time."""

    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    before = used()
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    return used() - before


def write_timm(run: Path, out: Path) -> Path:
    """Write the run's student as a checkpoint of timm."""
    state = {}
    for name, value in load_file(run / "student.safetensors").items():
        if name.startswith("backbone."):
            state[name.removeprefix("backbone.")] = value
        elif name.startswith("head."):
            state[f"classifier.{name.removeprefix('head.')}"] = value
    torch.save(state, out)
    return out


def read(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return all pictures of `class/file`, float32 `[N, 3, SIZE, SIZE]` in −1 to 1, and their labels."""
    pixels, labels = [], []
    for label, kind in enumerate(sorted(folder.iterdir())):
        for path in sorted(kind.iterdir()):
            image = Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            pixels.append(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1)
            labels.append(label)
    return np.stack(pixels), np.array(labels)


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for flag in ("environments", "assets", "pictures", "trained", "out"):
        parser.add_argument(f"--{flag}", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    run, here = given.trained / "run", Path(__file__).parent
    made = run / "artifacts"
    files = {
        "edgekd FP32": made / "onnxruntime-fp32-float-input" / "model.onnx",
        "timmx FP32": given.out / "timmx.onnx",
        "edgekd INT8": made / "onnxruntime-int8-float-input" / "model.onnx",
        "Olive INT8": given.out / "olive" / "model.onnx",
    }
    checkpoint = write_timm(run, given.out / "student.pt")
    edgekd = [sys.executable, "-m", "edgekd.cli", "export", run, "--input", "float", "--overwrite"]
    classes = len(list((given.pictures / "train").iterdir()))
    seconds = {
        "edgekd FP32": processor_seconds(*edgekd),
        "timmx FP32": processor_seconds(
            given.environments / "timmx" / "bin" / "timmx", "export", "onnx", STUDENT,
            "--checkpoint", checkpoint, "--num-classes", str(classes), "--input-size", "3", str(SIZE),
            str(SIZE), "--output", files["timmx FP32"],
        ),
        "edgekd INT8": processor_seconds(*edgekd, "--int8", "--min-agreement", "0"),
        "Olive INT8": processor_seconds(
            given.environments / "olive" / "bin" / "python", here / "export_olive.py",
            files["edgekd FP32"], "--pictures", given.pictures, "--out", given.out / "olive",
        ),
    }  # fmt: skip
    sessions = {name: session(path) for name, path in files.items()}
    inputs = {name: one.get_inputs()[0].name for name, one in sessions.items()}
    parts = {part: read(given.pictures / part) for part in ("test", "unseen")}
    images = parts["test"][0]
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(ROUNDS + 1):
        for name, one in sessions.items():
            for turn in range(RUNS):
                feed = {inputs[name]: images[turn % len(images)][None]}
                before = time.process_time()
                one.run(None, feed)
                if number:  # the first round warms up
                    times[name].append(time.process_time() - before)
    print("| file | export, s | MB | p50, ms | test, % | unseen, % |\n|---|---|---|---|---|---|")
    for name, one in sessions.items():
        cells = [f"{seconds[name]:.1f}", f"{files[name].stat().st_size / 1e6:.1f}"]
        cells.append(f"{1000 * np.median(times[name]):.2f}")
        for pictures, labels in parts.values():
            answers = [one.run(None, {inputs[name]: each[None]})[0].argmax() for each in pictures]
            cells.append(f"{100 * np.mean(np.array(answers) == labels):.1f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
