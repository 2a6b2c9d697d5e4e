"""benchmarks/gpu_all.py, with stand-ins for the commands that it runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_all.py"
COMMAND = """
import sys, time
print("did", *sys.argv[1:])
if "--fp16" in sys.argv and "tensorrt" in sys.argv:
    sys.exit(1)
if "benchmark" in sys.argv:
    time.sleep({benchmark_seconds})
"""
TABLE = 'print("a GPU"); print("| who | p50 ms |"); print("| torch.compile | 1.0 |")'


def gpu_all(folder: Path, *, minutes: float, benchmark_seconds: float) -> list[str]:
    """Run the script; return the lines about what failed."""
    (folder / "edgekd").mkdir()
    (folder / "edgekd" / "__init__.py").touch()
    command = COMMAND.format(benchmark_seconds=benchmark_seconds)
    (folder / "edgekd" / "cli.py").write_text(command)
    shutil.copy(SCRIPT, folder / "gpu_all.py")
    (folder / "gpu_latency.py").write_text(TABLE)
    done = folder / "run" / "artifacts" / "onnxruntime-fp32"
    done.mkdir(parents=True)
    (done / "artifact.json").touch()
    line = [sys.executable, "gpu_all.py", "run", "--minutes", str(minutes)]
    path = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(line, cwd=folder, env=path, capture_output=True, text=True)
    assert done.returncode == 1
    return [line for line in done.stdout.splitlines() if line.startswith("failed:")]


@pytest.mark.parametrize("slow", [False, True])
def test_a_step_that_fails_or_is_late_leaves_the_others_their_turn(
    tmp_path: Path, slow: bool
) -> None:
    minutes, seconds = (0.05, 60) if slow else (5, 0)
    failed = gpu_all(tmp_path, minutes=minutes, benchmark_seconds=seconds)
    assert "--target tensorrt --fp16: exit code 1" in failed[0]
    if not slow:
        assert len(failed) == 1
        log = (tmp_path / "gpu" / "log.txt").read_text()
        assert log.count("did export run") == 5  # the sixth is there already
        table = (tmp_path / "gpu" / "latency.md").read_text()
        assert table == "| who | p50 ms |\n| torch.compile | 1.0 |\n"
        assert "did benchmark run --quick --out gpu/report" in log
    else:
        assert failed[-1].endswith("out of time")
