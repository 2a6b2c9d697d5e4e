"""The processes of a training: number, rank, precision and threads.

Processes are started by torchrun or by edgekd. Variables of a cluster, MPI or an earlier launch in the environment
(RANK, SLURM_…, OMPI_…) are ignored.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from edgekd.configs.train import TrainConfig
from edgekd.core.console import set_rank
from edgekd.core.errors import EdgekdError
from edgekd.distill.models.teachers import has_bfloat16


@dataclass(frozen=True)
class Launch:
    """A process started by torchrun."""

    rank: int
    world: int
    local_world: int


def find_launch() -> Launch | None:
    """Return this process's torchrun launch, or None without one, and set the console's rank."""
    launch = _torchrun()
    set_rank(launch.rank if launch else 0)
    return launch


def _torchrun() -> Launch | None:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    values = [os.environ.get(name, "") for name in names]
    if not all(value.isascii() and value.isdigit() for value in values):
        return None
    rank, world, local_rank, local_world, _ = map(int, values)
    if not (rank < world and local_rank < local_world and world % local_world == 0):
        return None
    return Launch(rank, world, local_world)


@contextlib.contextmanager
def _unlaunched() -> Iterator[None]:
    """Hide the launch variables from Lightning, which reads them when it is imported and set up."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "STANDALONE_PORT")
    hidden = {
        name: value for name, value in os.environ.items() if name in names or name[:3] == "LT_"
    }
    if _torchrun():
        hidden = {}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


with _unlaunched():  # importing it converts RANK to a number
    from lightning_fabric import Fabric as Fabric
    from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning_fabric.plugins.environments.lightning import (
        LightningEnvironment,
        find_free_network_port,
    )
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment


class OwnProcesses(LightningEnvironment):
    """One process, or several started by edgekd on this machine."""

    @property
    def creates_processes_externally(self) -> bool:
        return False

    @property
    def main_address(self) -> str:
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        if self._main_port == -1:
            with _unlaunched():
                self._main_port = find_free_network_port()
        return self._main_port

    def node_rank(self) -> int:
        return 0


def precision_of(config: TrainConfig) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    """Return the precision of a run; auto is bfloat16 on a processor that multiplies it in hardware."""
    if config.precision != "auto":
        return config.precision
    on_cpu = config.accelerator == "cpu" or not torch.cuda.is_available()
    return "bf16-mixed" if on_cpu and has_bfloat16() else "32-true"


def make_fabric(config: TrainConfig, launch: Launch | None = None) -> Fabric:
    """Set up one process, several here, or those that torchrun started; they divide the batch, or `EdgekdError`."""
    processes: ClusterEnvironment
    if launch:
        devices, nodes, strategy = launch.local_world, launch.world // launch.local_world, "ddp"
    else:
        devices, nodes, strategy = config.devices, 1, "ddp_spawn" if config.devices > 1 else "auto"
    if config.batch_size % (devices * nodes):
        raise EdgekdError(
            f"The batch size {config.batch_size} is not a multiple of the {devices * nodes} processes.",
            "Change --batch-size.",
        )
    # The first lines of the run state its precision and processes.
    logging.getLogger("lightning_utilities.core.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    with _unlaunched():
        processes = TorchElasticEnvironment() if launch else OwnProcesses()
        return Fabric(
            accelerator=config.accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
            precision=precision_of(config),
            plugins=[processes],
        )


def total(fabric: Fabric, value: Tensor) -> Tensor:
    """Sum a tensor over all processes."""
    return cast(Tensor, fabric.all_reduce(value, reduce_op="sum"))


def gathered(fabric: Fabric, own: Tensor) -> Tensor:
    """Return the rows `[b, …]` of all processes, `[B, …]`, with gradients if there are any."""
    if fabric.world_size == 1:
        return own
    return cast(Tensor, fabric.all_gather(own, sync_grads=own.requires_grad)).flatten(0, 1)


_FEW_PIXELS = 32 * 64**2
"""Pixels per step up to which one thread is as fast as two and leaves the other core to the views (docs/train.md)."""


@contextlib.contextmanager
def step_threads(fabric: Fabric, pixels: int) -> Iterator[None]:
    """Train steps of few `pixels` on one thread, whatever else the machine does; `OMP_NUM_THREADS` overrules it.

    The number of threads changes the last bits of the weights, so it follows from the settings, not from a timing.
    """
    before = torch.get_num_threads()
    chosen = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & set(os.environ)
    if fabric.device.type == "cpu" and not chosen and pixels <= _FEW_PIXELS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**30


def keep_freed_memory() -> bool:
    """Let glibc reuse large blocks instead of returning them to the kernel; return whether it accepts that.

    It maps every block beyond 32 MiB anew, and a batch's activations are that large: at every step the kernel then
    clears and maps the same pages again, about a tenth of a mobilenetv3 step at 128 px (docs/measurements.md).
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl
        return False
    # glibc on 32-bit machines accepts at most 512 KiB and returns 0.
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST - 1)
    )
