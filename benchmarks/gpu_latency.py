"""Compare the latency of a run's artifacts on a GPU with PyTorch: eager, and `torch.compile` in fp16.

    python benchmarks/gpu_latency.py RUN [--batch 1] [--quick]

Artifacts are run with ONNX Runtime's GPU providers and as TensorRT engines. Export them first: `edgekd export RUN`,
`--fp16`, and `--target tensorrt` with `--fp16` and `--int8`. The input is uint8 images in CPU memory and the output
float32 logits in CPU memory, so both copies are included. The calls alternate. If a runtime cannot run, the reason is
printed. `--device cpu` runs the same steps without a GPU, in fp32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import read_artifact
from edgekd.distill.classification.load_run import load_run
from edgekd.export.run import deployable, parity_images
from edgekd.targets.session import open_session
from edgekd.targets.timing.stopwatch import FULL, QUICK, measure_interleaved, rotating

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
PROVIDERS = {"cuda": ("cuda", "tensorrt", "tensorrt-rtx"), "cpu": ("cpu",)}
HEADER = "| who | p50 ms | p95 ms | p50 / torch.compile | same class as torch in fp32 % |\n|---|---|---|---|---|"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=sorted(PROVIDERS), default="cuda")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "there is no GPU that PyTorch can use; --device cpu tries the script without one"
        )
    loaded = load_run(arguments.run)
    pixels = parity_images(loaded, None)[0]
    model = deployable(loaded)
    batches = [
        pixels[i : i + arguments.batch]
        for i in range(0, len(pixels) - arguments.batch + 1, arguments.batch)
    ]
    truth = answers(torch_run(model, device, half=False), batches)
    runs = {
        "torch, eager": torch_run(model, device, half=device == "cuda"),
        "torch.compile": torch_run(
            torch.compile(model, dynamic=False), device, half=device == "cuda"
        ),
        **artifact_runs(arguments.run / "artifacts", device),
    }
    agreement = {}
    for name, run in list(runs.items()):
        try:
            agreement[name] = 100 * float((answers(run, batches) == truth).mean())
        except Exception as error:  # if a compiler or a runtime fails, the others still run
            print(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            del runs[name]
    protocol = QUICK if arguments.quick else FULL
    timed = measure_interleaved(
        {name: rotating(run, pixels[:64], arguments.batch) for name, run in runs.items()}, protocol
    )
    print(
        torch.cuda.get_device_name() if device == "cuda" else "CPU",
        f"batch {arguments.batch}, {protocol.name}",
    )
    print(HEADER)
    usual = np.median(timed.get("torch.compile", timed["torch, eager"]).samples_ms)
    for name, found in timed.items():
        p50, p95 = np.quantile(found.samples_ms, [0.5, 0.95])
        print(f"| {name} | {p50:.3f} | {p95:.3f} | {p50 / usual:.2f} | {agreement[name]:.1f} |")


def torch_run(model: torch.nn.Module, device: str, *, half: bool) -> Run:
    model = model.to(device)

    @torch.inference_mode()
    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.autocast(device, torch.float16, enabled=half):
            logits: torch.Tensor = model(torch.from_numpy(images).to(device))
        return logits.float().cpu().numpy()  # waits for the GPU

    return run


def artifact_runs(folder: Path, device: str) -> dict[str, Run]:
    """Return every artifact that runs on the device, with each of its providers there."""
    runs: dict[str, Run] = {}
    for place in sorted(
        path.parent for path in folder.glob("*/artifact.json") if not path.parent.suffix
    ):
        format = read_artifact(place).format
        providers = (
            PROVIDERS[device] if format == "onnx" else (None,) if format == "tensorrt" else ()
        )
        for provider in providers:
            name = place.name if provider is None else f"{place.name}, {provider}"
            try:
                runs[name] = open_session(place, provider=provider).run
            except EdgekdError as error:
                print(f"{name}: {error.message}")
    return runs


def answers(run: Run, batches: list[NDArray[np.uint8]]) -> NDArray[np.int64]:
    return np.concatenate([run(batch).argmax(axis=1) for batch in batches])


if __name__ == "__main__":
    main()
