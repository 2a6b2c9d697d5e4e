"""Export, time and evaluate a run on a machine with an NVIDIA GPU, in about 10 minutes.

    python benchmarks/gpu_all.py RUN --out gpu

1. Exports for ONNX Runtime and TensorRT in fp32, fp16 and int8; engines are built and pass the parity check on the GPU.
2. Latency beside eager PyTorch, `torch.compile` in fp16 and ONNX Runtime's GPU providers: `gpu_latency.py`.
3. Accuracy on the run's suites, in domain and out of domain, of every file: `edgekd benchmark RUN --quick`.

If a step fails or runs out of time, this is printed and the next one runs. Existing files are not exported again. The
report, `latency.md` and `log.txt` with the output of all steps are written to OUT. Needs the extra `tensorrt` or
`tensorrt-rtx`, and onnxruntime-gpu for its providers. `--device cpu` runs the same steps without a GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

TARGETS = ("tensorrt", "onnxruntime")
PRECISIONS = ("fp16", "int8", "fp32")


def steps_of(run: Path, out: Path, device: str) -> list[tuple[list[str], Path | None]]:
    """Return command lines, the most important first, and the file for their output besides the log."""
    edgekd = [sys.executable, "-m", "edgekd.cli"]
    steps: list[tuple[list[str], Path | None]] = [
        ([*edgekd, "export", str(run), "--target", target, f"--{precision}"], None)
        for target in TARGETS
        for precision in PRECISIONS
        if not (run / "artifacts" / f"{target}-{precision}" / "artifact.json").exists()
    ]
    clock = str(Path(__file__).with_name("gpu_latency.py"))
    steps.append(
        ([sys.executable, clock, str(run), "--quick", "--device", device], out / "latency.md")
    )
    report = str(out / "report")
    steps.append(([*edgekd, "benchmark", str(run), "--quick", "--out", report], None))
    return steps


def run_step(line: list[str], seconds: float, table: Path | None, log: Path) -> str | None:
    """Run one command, write its output to the terminal and the log, and return the problem if it fails."""
    try:
        done = subprocess.run(
            line, timeout=max(seconds, 1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output, problem = done.stdout, f"exit code {done.returncode}" if done.returncode else None
    except subprocess.TimeoutExpired as late:
        output, problem = late.stdout or b"", "out of time"
    text = output.decode(errors="replace")
    print(text, flush=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"== {' '.join(line[1:])}\n{text}\n")
    if table is not None and problem is None:
        lines = [line for line in text.splitlines() if line.startswith("|")]
        table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return problem


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--minutes", type=float, default=9.5, help="for all steps together")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + 60 * options.minutes, []
    for line, table in steps_of(options.run, options.out, options.device):
        words, started = " ".join(line[1:]), time.monotonic()
        print(f"== {words}", flush=True)
        problem = run_step(line, end - started, table, options.out / "log.txt")
        print(f"== {time.monotonic() - started:.0f} s, {problem or 'done'}", flush=True)
        if problem:
            failed.append(f"{words}: {problem}")
    for words in failed:
        print(f"failed: {words}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
