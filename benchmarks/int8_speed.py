"""Compare INT8 with FP32 in ONNX Runtime on one image and one thread, and measure each rule of the integer form.

    python benchmarks/int8_speed.py
    python benchmarks/int8_speed.py --models efficientnet_b0 --rules --profile

Students have random weights and BatchNorm statistics from the images, since neither affects the time. Files alternate
in short blocks, forwards and backwards, so that other load affects all. The results are the median over blocks, and the
median of the ratios within blocks. `--rules` also times files with one rule disabled; `--profile` prints the share of
the INT8 file's time per operator.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import torch
from export_speed import draw, student
from numpy.typing import NDArray
from torch import nn

from edgekd.export.graph import fuse
from edgekd.export.onnx.write import export_onnx
from edgekd.export.quantize import integer_form, qdq
from edgekd.export.quantize import onnxruntime as scheme

BARS = {
    "mobilenetv3_large_100": 0.80,
    "efficientnet_b0": 0.80,
    "mobilenetv4_conv_small": 0.70,
    "efficientnet_lite0": 0.52,
    "mobilenetv3_small_100": 1.0,
    "vit_tiny_patch16_224": 0.80,
}
"""Student → maximum ratio of INT8 to FP32 latency."""
FLOAT_MAPS = (*({*qdq.INTEGER_OPS} - {*qdq.MAP_OPS}), "Add", "Concat", "AveragePool")
RULES: dict[str, Callable[[], Any]] = {
    "stem in int8": lambda: mock.patch.object(scheme, "_STEM_CHANNELS", 0),
    "not padded": lambda: mock.patch.object(integer_form, "LANES", 1),
    "activations, gates in float": lambda: mock.patch.object(qdq, "INTEGER_OPS", FLOAT_MAPS),
}


def export_fp32(name: str, path: Path) -> NDArray[np.uint8]:
    """Write the FP32 file of a student, and return images of its size."""
    model, preprocess = student(name)
    rng = np.random.default_rng(1)
    images = draw(40, preprocess.size)
    images = np.clip(images + rng.integers(-40, 41, images.shape), 0, 255).astype(np.uint8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
            module.train()
    with torch.no_grad():
        model(torch.from_numpy(images[:16]))
    model = fuse(model.eval(), torch.from_numpy(images[:2]))[0]
    export_onnx(model, path, size=preprocess.size, metadata={})
    return images


def session(path: Path, profile: bool = False) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_profiling = profile
    options.profile_file_prefix = str(path.with_suffix(""))
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def race(files: dict[str, Path], image: NDArray[np.uint8], blocks: int) -> dict[str, Any]:
    """Return file → milliseconds per block of three runs, float64 `[blocks]`; the files alternate."""
    sessions = {name: session(path) for name, path in files.items()}
    times: dict[str, list[float]] = {name: [] for name in files}
    for block in range(blocks + 2):
        for name in list(sessions)[:: 1 if block % 2 else -1]:
            started = time.perf_counter()
            for _ in range(3):
                sessions[name].run(None, {"image": image})
            if block >= 2:
                times[name].append((time.perf_counter() - started) / 3 * 1e3)
    return {name: np.array(values) for name, values in times.items()}


def logit_error(fp32: Path, int8: Path, images: NDArray[np.uint8]) -> float:
    """Return the mean squared logit error divided by the variance of the logits."""
    full, now = (session(path).run(None, {"image": images})[0] for path in (fp32, int8))
    return float(np.square(now - full).mean() / full.var(axis=0).mean())


def print_profile(path: Path, image: NDArray[np.uint8], runs: int = 40) -> None:
    """Print the time of each kind of operator: the sum of its nodes' 10th percentiles."""
    profiled = session(path, profile=True)
    for _ in range(runs):
        profiled.run(None, {"image": image})
    durations: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in json.loads(Path(profiled.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            durations[event["args"]["op_name"], event["name"]].append(event["dur"])
    kinds: dict[str, float] = defaultdict(float)
    for (kind, _), values in durations.items():
        kinds[kind] += float(np.percentile(values, 10))
    whole = sum(kinds.values())
    shares = sorted(kinds.items(), key=lambda item: -item[1])
    print("  " + ", ".join(f"{kind} {100 * value / whole:.0f} %" for kind, value in shares[:7]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(BARS), help="timm names")
    parser.add_argument("--blocks", type=int, default=100)
    parser.add_argument("--rules", action="store_true", help="also files without one rule each")
    parser.add_argument("--profile", action="store_true", help="time by operator")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, onnxruntime {onnxruntime.__version__}\n")
    rules = list(RULES) if options.rules else []
    print(
        "| model | FP32 ms | INT8 ms | ratio | bar | MB FP32 → INT8 | logit error / variance |"
        + "".join(f" {rule} |" for rule in rules)
    )
    print("|---" * (7 + len(rules)) + "|")
    for name in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            fp32, int8 = Path(scratch) / "fp32.onnx", Path(scratch) / "int8.onnx"
            images = export_fp32(name, fp32)
            scheme.OnnxRuntimeInt8().quantize(fp32, int8, images[:16])
            files = {"fp32": fp32, "int8": int8}
            for rule in rules:
                files[rule] = int8.with_name(f"{len(files)}.onnx")
                with RULES[rule]():
                    scheme.OnnxRuntimeInt8().quantize(fp32, files[rule], images[:16])
            times = race(files, images[:1], options.blocks)
            ratios = {rule: float(np.median(times[rule] / times["fp32"])) for rule in times}
            p50 = [float(np.median(times[file])) for file in ("fp32", "int8")]
            sizes = [path.stat().st_size / 1e6 for path in (fp32, int8)]
            print(
                f"| {name} | {p50[0]:.2f} | {p50[1]:.2f} | {ratios['int8']:.2f} | {BARS.get(name, '')} | "
                f"{sizes[0]:.1f} → {sizes[1]:.1f} | {logit_error(fp32, int8, images[16:]):.4f} |"
                + "".join(f" {ratios[rule]:.2f} |" for rule in rules),
                flush=True,
            )
            if options.profile:
                print_profile(int8, images[:1])


if __name__ == "__main__":
    main()
