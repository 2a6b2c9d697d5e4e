from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edgekd.configs.train import TrainConfig
from edgekd.core.console import is_main_process, set_rank
from edgekd.distill.launch import find_launch, make_fabric, step_threads

LEFT_OVER = {
    "rank": {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": "29500"},
    "empty": {"RANK": "", "LOCAL_RANK": "", "WORLD_SIZE": "", "MASTER_PORT": "", "NODE_RANK": ""},
    "slurm": {
        "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "train", "SLURM_NODEID": "1", "SLURM_NNODES": "2", "SLURM_STEP_ID": "0",
    },
    "mpi": {
        "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "2",
        "PMI_RANK": "2", "PMI_SIZE": "4",
    },
    "lsf": {"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "/none", "JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "4"},
    "half a torchrun": {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "4"},
    "an impossible torchrun": {
        "TORCHELASTIC_RUN_ID": "none", "RANK": "5", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4",
        "MASTER_PORT": "29500",
    },
    "lightning": {"LT_DEVICES": "4", "LT_STRATEGY": "ddp", "LT_NUM_NODES": "2", "GROUP_RANK": "1"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_process_afterwards() -> object:
    yield
    set_rank(0)


@pytest.mark.parametrize("variables", LEFT_OVER.values(), ids=LEFT_OVER)
def test_variables_without_a_launch_are_one_process(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    launch = find_launch()
    assert launch is None
    fabric = make_fabric(TrainConfig(accelerator="cpu"), launch)
    fabric.launch()
    assert (fabric.world_size, fabric.global_rank, fabric.is_global_zero) == (1, 0, True)
    assert is_main_process()
    assert {name: os.environ[name] for name in variables} == variables, "the user's stay"


def test_torchrun_is_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "GROUP_RANK": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    launch = find_launch()
    assert launch is not None
    assert (launch.rank, launch.world, launch.local_world) == (3, 4, 2)
    assert not is_main_process()
    fabric = make_fabric(TrainConfig(accelerator="cpu"), launch)
    assert (fabric.world_size, fabric.global_rank) == (4, 3)


@pytest.mark.parametrize("rank", ["1", ""])
def test_a_rank_in_the_environment_deletes_nothing(tmp_path: Path, rank: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    left_over = {"RANK": rank, "WORLD_SIZE": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "edgekd.cli", "train", "--smoke", "--out", str(tmp_path / "run")],
        env=os.environ | left_over,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("pixels", "variables", "threads"),
    [
        (32 * 48**2, {}, 1),
        (32 * 224**2, {}, 3),
        (32 * 48**2, {"OMP_NUM_THREADS": "3"}, 3),
    ],
    ids=["small", "large", "chosen by the user"],
)
def test_small_steps_take_one_thread(
    pixels: int, variables: dict[str, str], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with step_threads(make_fabric(TrainConfig(accelerator="cpu")), pixels):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
