"""Everything about a run on a machine with an NVIDIA GPU, in one go of about 10 minutes.

    python benchmarks/gpu_all.py RUN

1. Exports for ONNX Runtime and TensorRT in fp32, fp16 and int8; engines are built and pass the parity check on the GPU.
2. Accuracy on the run's suites, in domain and out of domain, of every file: `edgekd benchmark RUN --quick`.
3. Latency beside eager PyTorch, `torch.compile` in fp16 and ONNX Runtime's GPU providers: `gpu_latency.py`.

A step that fails is named, and the next one runs. What is there already is not exported again. Needs the extra
`tensorrt` or `tensorrt-rtx`, and for the providers onnxruntime-gpu. `--device cpu` goes the same ways without a GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

TARGETS = ("onnxruntime", "tensorrt")
PRECISIONS = ("fp32", "fp16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    edgekd, run = [sys.executable, "-m", "edgekd.cli"], str(options.run)
    steps = [
        [*edgekd, "export", run, "--target", target, f"--{precision}"]
        for target in TARGETS
        for precision in PRECISIONS
        if not (options.run / "artifacts" / f"{target}-{precision}" / "artifact.json").exists()
    ]
    steps.append([*edgekd, "benchmark", run, "--quick"])
    clock = str(Path(__file__).with_name("gpu_latency.py"))
    steps.append([sys.executable, clock, run, "--quick", "--device", options.device])
    failed = []
    for step in steps:
        words, started = " ".join(step[1:]), time.perf_counter()
        print(f"== {words}", flush=True)
        code = subprocess.run(step, check=False).returncode
        print(f"== {time.perf_counter() - started:.0f} s, exit code {code}", flush=True)
        if code:
            failed.append(words)
    for words in failed:
        print(f"failed: {words}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
