"""The sbatch template of docs/scale.md, with stand-ins for SLURM's two programs: two nodes on this machine."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
SRUN = """#!/bin/bash
for node in 0 1; do SLURM_NODEID=$node SLURM_PROCID=$node "$@" & pids="$pids $!"; done
for pid in $pids; do wait "$pid" || failed=1; done
exit ${failed:-0}
"""
SCONTROL = "#!/bin/bash\necho localhost\necho localhost\n"


@pytest.mark.slow
def test_sbatch(make_domain_folder: Callable[..., Path], tmp_path: Path, own_cache: Path) -> None:
    template = re.search(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "job.sh").write_text(template[1])
    (tmp_path / "bin").mkdir()
    torchrun = f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": torchrun}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    make_domain_folder(tmp_path / "data", domains=("art", "photo"), count=6)
    (tmp_path / "run.toml").write_text(
        'student = "test_efficientnet"\npretrained = "scratch"\nsize = 32\ndata = "data"\n'
        'recipe = "erm"\nsteps = 4\nbatch_size = 4\naccelerator = "cpu"\nbn = "frozen"\n'
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slurm = {
        "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_NODELIST": "node[0-1]", "MASTER_PORT": str(port),
    }  # fmt: skip
    paths = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "job.sh"],
        cwd=tmp_path,
        env=os.environ | paths | slurm,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    run = json.loads((tmp_path / "runs" / "big" / "run.json").read_text())
    assert run["steps"] == 4
    assert done.stdout.count("student:") == 1  # process 0 of both nodes speaks alone
