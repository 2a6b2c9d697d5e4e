"""Compare FP32 and INT8 files for ONNX Runtime and OpenVINO on ImageNet images, for two students with ImageNet
weights.

    python benchmarks/imagenet_int8.py --assets DIR

DIR has `imagenet-sample/<class index>/*.jpg` and `students/*.safetensors`. Calibration images are not used to measure
accuracy. The sample is probably part of the students' training images, so only the differences are meaningful.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from edgekd.configs.export import ExportConfig
from edgekd.core.manifest import Precision
from edgekd.core.preprocess import Preprocess
from edgekd.export.artifact import export_model
from edgekd.export.graph import Deployable
from edgekd.export.quantize.calibration import Calibrator
from edgekd.export.writer import Source
from edgekd.targets.registry import TARGETS
from edgekd.targets.session import Session, open_session

PREPROCESS = Preprocess(
    size=224, resize="crop", crop_pct=0.875, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tf_efficientnet_lite0": ("tf_efficientnet_lite0.safetensors", {}),
    "mobilenetv2_100": ("mobilenetv2_100_pad_same.safetensors", {"pad_type": "same"}),
}
HEADER = (
    "| model | target | precision | top-1 % | drop, points | agreement % | size MB | p50 ms, 1 thread | export s |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
VARIANTS: tuple[tuple[str, Precision], ...] = (
    ("onnxruntime", "fp32"),
    ("onnxruntime", "int8"),
    ("openvino", "fp32"),
    ("openvino", "int8"),
)


def read_images(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images, uint8 `[N, 224, 224, 3]`, and their class indices `[N]`."""
    files = sorted(folder.glob("*/*.jpg"))
    if not files:
        raise SystemExit(f"{folder} has no images.")
    pixels = []
    for file in files:
        with Image.open(file) as image:
            pixels.append(PREPROCESS.pixels(image.convert("RGB")))
    return np.stack(pixels), np.array([int(file.parent.name) for file in files])


def build(name: str, students: Path) -> Deployable:
    """Return the student with its ImageNet weights, with uint8 pixels as input."""
    file, options = STUDENTS[name]
    backbone = timm.create_model(name, **options)
    backbone.load_state_dict(load_file(students / file))
    head = backbone.get_classifier()
    backbone.reset_classifier(0)
    return Deployable(backbone, head, PREPROCESS).eval()


def predict(session: Session, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the predicted class of each image, `[N]`."""
    return np.concatenate(
        [session.run(images[i : i + 16]).argmax(axis=1) for i in range(0, len(images), 16)]
    )


def p50_ms(sessions: dict[str, Session], images: NDArray[np.uint8], runs: int) -> dict[str, float]:
    """Return the median latency of one image per session; sessions alternate, so that other load affects all."""
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(runs + 10):
        for name, session in sessions.items():
            image = images[turn % len(images)][None]
            started = time.perf_counter()
            session.run(image)
            if turn >= 10:
                samples[name].append((time.perf_counter() - started) * 1e3)
    return {name: float(np.median(values)) for name, values in samples.items()}


def table_rows(
    name: str,
    model: Deployable,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    calibration: NDArray[np.uint8],
    runs: int,
    calibrator: Calibrator,
) -> list[str]:
    """Export every variant and measure it on `images`, which were not used for calibration."""
    rows, reference = [], None
    folders: dict[str, Path] = {}
    seconds: dict[str, float] = {}
    source = Source(
        model=model,
        classes=tuple(str(index) for index in range(1000)),
        preprocess=PREPROCESS,
        calibration=calibration,
        parity_images=images[:64],
        facts={"student": name},
    )
    with tempfile.TemporaryDirectory() as scratch:
        for target, precision in VARIANTS:
            key = f"{target}-{precision}"
            folders[key] = Path(scratch) / key
            started = time.perf_counter()
            config = ExportConfig(
                target=target,
                precision=precision,
                calibrator=calibrator if (target, precision) == ("onnxruntime", "int8") else None,
                min_agreement=0
                if precision == "int8"
                else None,  # measured here instead of checked
            )
            fp32 = folders["onnxruntime-fp32"] / "model.onnx" if len(folders) > 1 else None
            export_model(source, folders[key], config, fp32_path=fp32)
            seconds[key] = time.perf_counter() - started
        sessions = {
            key: open_session(path, threads=1, spinning=False) for key, path in folders.items()
        }
        latency = p50_ms(sessions, images[:64], runs)
        for target, precision in VARIANTS:
            key = f"{target}-{precision}"
            predicted = predict(sessions[key], images)
            reference = predicted if reference is None else reference
            top1 = 100 * (predicted == labels).mean()
            drop = 100 * (reference == labels).mean() - top1
            agreement = 100 * (predicted == reference).mean()
            size = sum(path.stat().st_size for path in folders[key].glob("model.*")) / 1e6
            rows.append(
                f"| {name} | {target} | {precision} | {top1:.1f} | {drop:.2f} | {agreement:.1f} | {size:.1f} "
                f"| {latency[key]:.1f} | {seconds[key]:.0f} |"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--model", choices=STUDENTS, action="append", help="default: all")
    parser.add_argument("--calibration", type=int, default=256, help="number of calibration images")
    parser.add_argument(
        "--images", type=int, help="number of images to measure; default: all others"
    )
    parser.add_argument("--runs", type=int, default=200, help="timed runs per file")
    parser.add_argument(
        "--calibrator",
        choices=TARGETS["onnxruntime"].calibrators,
        default="minmax",
        help="of ONNX Runtime's int8",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = read_images(options.assets / "imagenet-sample")
    order = np.random.default_rng(0).permutation(len(images))
    chosen, rest = (
        np.sort(order[: options.calibration]),
        np.sort(order[options.calibration :][: options.images]),
    )
    print(HEADER)
    for name in options.model or STUDENTS:
        model = build(name, options.assets / "students")
        for row in table_rows(
            name,
            model,
            images[rest],
            labels[rest],
            images[chosen],
            options.runs,
            options.calibrator,
        ):
            print(row, flush=True)
    print(
        f"\n{len(rest)} images measured, {len(chosen)} others calibrated; preprocess {PREPROCESS.hash}."
    )


if __name__ == "__main__":
    main()
