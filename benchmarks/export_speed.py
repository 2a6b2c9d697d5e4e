"""Compare the cost of an INT8 export with that of the quantizer alone, and its file's latency with other INT8 files.

    python benchmarks/export_speed.py

The student has random weights and the images are smooth noise, since neither affects time or memory. Every step runs in
a separate process. edgekd and onnxruntime's `quantize_static`, with the same FP32 file, images, batches and settings,
alternate, so that other load affects both. Then the latencies of INT8 files of edgekd, of `quantize_static` and
`nncf.quantize` with default settings, and of OpenVINO are measured in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Runner = Callable[[NDArray[np.uint8]], Any]
BATCH = 8
QUANTIZED = ("Conv", "Gemm", "MatMul", "Add", "Concat", "Relu", "Clip", "MaxPool", "AveragePool")


def student(name: str) -> Any:
    """Return the deployable graph of a timm student with random weights and 10 classes, and its preprocess."""
    import timm
    import torch

    from edgekd.core.preprocess import Preprocess
    from edgekd.export.graph import Deployable

    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=10)
    preprocess = Preprocess(size=int(backbone.pretrained_cfg["input_size"][-1]))
    head = backbone.get_classifier()
    backbone.reset_classifier(0)
    return Deployable(backbone, head, preprocess).eval(), preprocess


def draw(count: int, size: int) -> NDArray[np.uint8]:
    """Return smooth random images, uint8 `[count, size, size, 3]`."""
    from PIL import Image

    coarse = np.random.default_rng(0).integers(0, 256, (count, 7, 7, 3), dtype=np.uint8)
    return np.stack(
        [
            np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC))
            for one in coarse
        ]
    )


def step_fp32(folder: Path, name: str) -> None:
    """Export the FP32 file, from which both sides start."""
    from edgekd.export.onnx.write import export_onnx

    model, preprocess = student(name)
    export_onnx(model, folder / "fp32.onnx", size=preprocess.size, metadata={})


def step_edgekd(folder: Path, name: str) -> None:
    """Quantize the FP32 file with edgekd."""
    from edgekd.export.quantize.onnxruntime import OnnxRuntimeInt8

    OnnxRuntimeInt8().quantize(
        folder / "fp32.onnx", folder / "edgekd.onnx", np.load(folder / "images.npy")
    )


def step_bare(folder: Path, name: str) -> None:
    """`quantize_static` with edgekd's settings."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static

    from edgekd.export.onnx.graphs import Graph
    from edgekd.export.quantize.onnxruntime import OnnxRuntimeInt8

    shaped = onnx.shape_inference.infer_shapes(onnx.load(folder / "fp32.onnx"))
    quantize_static(
        folder / "fp32.onnx",
        folder / "bare.onnx",
        Reader(np.load(folder / "images.npy"), BATCH),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=list(QUANTIZED),
        nodes_to_exclude=OnnxRuntimeInt8().float_nodes(Graph(shaped)),
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
    )


def step_whole(folder: Path, name: str) -> None:
    """Run all steps of `edgekd export --int8` after the FP32 export: INT8, parity check on 256 images, the folder."""
    from edgekd.configs.export import ExportConfig
    from edgekd.export.artifact import export_model
    from edgekd.export.writer import Source

    (model, preprocess), images = student(name), np.load(folder / "images.npy")
    source = Source(
        model=model,
        classes=tuple(str(index) for index in range(10)),
        preprocess=preprocess,
        calibration=images,
        parity_images=images[:256],
        facts={"student": name},
    )
    config = ExportConfig(precision="int8", overwrite=True, min_agreement=0)  # random weights
    export_model(source, folder / "onnxruntime-int8", config, fp32_path=folder / "fp32.onnx")


class Reader:
    """Batches for onnxruntime's calibration."""

    def __init__(self, images: NDArray[np.uint8], batch: int) -> None:
        self.batches: Iterator[NDArray[np.uint8]] = (
            images[i : i + batch] for i in range(0, len(images), batch)
        )

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        """Return the next batch, or None at the end."""
        batch = next(self.batches, None)
        return None if batch is None else {"image": np.ascontiguousarray(batch)}


STEPS = {"fp32": step_fp32, "edgekd": step_edgekd, "bare": step_bare, "whole": step_whole}


def measured(step: str, folder: Path, name: str) -> dict[str, float]:
    """Return seconds of wall time and of processor time, and peak memory, of a step in a separate process."""
    line = [sys.executable, __file__, "--step", step, "--folder", str(folder), "--model", name]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_step(step: str, folder: Path, name: str) -> None:
    """Run one step, after the imports that edgekd's commands have already done at this point."""
    import onnxruntime.quantization  # noqa: F401

    import edgekd.export.artifact  # noqa: F401

    started, used = time.perf_counter(), time.process_time()
    STEPS[step](folder, name)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux
    spent = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - used}
    print(json.dumps(spent | {"peak_gb": peak}))


def runners(folder: Path, images: NDArray[np.uint8]) -> dict[str, Runner]:
    """Return file → function from one image to logits, with one thread; edgekd's file already exists."""
    import nncf
    import onnx
    import onnxruntime
    import openvino
    from nncf.quantization.advanced_parameters import QuantizationParameters
    from onnxruntime.quantization import quantize_static

    from edgekd.export.quantize.openvino import OpenVinoInt8

    fp32 = folder / "fp32.onnx"
    quantize_static(fp32, folder / "static.onnx", Reader(images, 1))
    nncf.set_log_level(40)
    data = nncf.Dataset([{"image": images[i : i + 1]} for i in range(len(images))])
    per_tensor = nncf.AdvancedQuantizationParameters(
        activations_quantization_params=QuantizationParameters(per_channel=False)
    )
    for file, advanced in {"nncf": None, "nncf-tensor": per_tensor}.items():
        quantized = nncf.quantize(
            onnx.load(fp32), data, subset_size=len(images), advanced_parameters=advanced
        )
        onnx.save(quantized, folder / f"{file}.onnx")
    core = openvino.Core()
    compiled = core.compile_model(
        OpenVinoInt8({}).calibrate(fp32, images).model, "CPU", {"INFERENCE_NUM_THREADS": 1}
    )
    request = compiled.create_infer_request()

    def session(path: Path) -> Runner:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        made = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda image: made.run(None, {"image": image})

    names = {
        "FP32": "fp32",
        "INT8 edgekd": "edgekd",
        "INT8 quantize_static": "static",
        "INT8 nncf.quantize": "nncf",
        "INT8 nncf.quantize, activations per tensor": "nncf-tensor",
    }
    found = {}
    for title, file in names.items():
        run = session(folder / f"{file}.onnx")
        try:
            run(images[:1])
        except Exception as error:  # onnxruntime's types have no common public base
            print(
                f"{title}: onnxruntime cannot run it ({str(error).strip().splitlines()[0][-90:]})",
                flush=True,
            )
        else:
            found[title] = run
    return found | {"INT8 OpenVINO": lambda image: request.infer({"image": image})}


def p50_ms(
    runs: dict[str, Runner], images: NDArray[np.uint8], turns: int
) -> dict[str, list[float]]:
    """Return the latency samples of one image, with the files in turn."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 5):
        image = np.ascontiguousarray(images[turn % len(images)][None])
        for name, run in runs.items():
            started = time.perf_counter()
            run(image)
            if turn >= 5:
                samples[name].append((time.perf_counter() - started) * 1e3)
    return samples


def report_cost(folder: Path, name: str, rounds: int) -> None:
    found: dict[str, list[dict[str, float]]] = {step: [] for step in ("edgekd", "bare", "whole")}
    first = measured("fp32", folder, name)
    for _ in range(rounds):
        for step, rows in found.items():
            rows.append(measured(step, folder, name))
    print("| step | s | s of processor time | peak GB |\n|---|---|---|---|")
    titles = {
        "edgekd": "INT8, edgekd",
        "bare": "INT8, bare quantize_static",
        "whole": "INT8 with its parity check",
    }
    for title, rows in {
        "FP32 export": [first],
        **{titles[step]: rows for step, rows in found.items()},
    }.items():
        middle = {key: float(np.median([row[key] for row in rows])) for key in first}
        print(
            f"| {title} | {middle['seconds']:.1f} | {middle['cpu']:.1f} | {middle['peak_gb']:.2f} |"
        )
    for key, what in (("seconds", "by the clock"), ("cpu", "in processor time")):
        pairs = zip(found["edgekd"], found["bare"], strict=True)
        ratios = ", ".join(f"{ours[key] / theirs[key]:.2f}" for ours, theirs in pairs)
        print(f"edgekd / bare quantizer {what}, round by round: {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mobilenetv3_large_100", help="timm name")
    parser.add_argument("--images", type=int, default=300, help="calibration images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=200, help="timed runs per file")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        run_step(options.step, options.folder, options.model)
        return
    os.environ["NNCF_CI"] = "1"  # no usage statistics
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images = draw(options.images, student(options.model)[1].size)
        np.save(folder / "images.npy", images)
        print(
            f"{options.model}, {images.shape[1]} px, {len(images)} images, {os.cpu_count()} cores\n",
            flush=True,
        )
        report_cost(folder, options.model, options.rounds)
        samples = p50_ms(runners(folder, images[:32]), images, options.turns)
    p50 = {name: float(np.median(values)) for name, values in samples.items()}
    print("\n| file | p50 ms | / FP32 |\n|---|---|---|")
    for name, value in p50.items():
        print(f"| {name} | {value:.2f} | {value / p50['FP32']:.2f} |")
    best = min(value for name, value in p50.items() if "quantize" in name)
    print(
        f"edgekd / the best of quantize_static and nncf.quantize: {p50['INT8 edgekd'] / best:.2f}"
    )


if __name__ == "__main__":
    main()
