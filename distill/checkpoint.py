"""What survives a kill, written by process 0 by way of a temporary file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from timm.utils import ModelEmaV3
from torch import nn

from edgekd.console import say
from edgekd.distill.job import Job
from edgekd.distill.progress import Progress
from edgekd.distill.students import Student
from edgekd.distill.validate import source_accuracy
from edgekd.files import write_bytes


class Checkpoint:
    """What survives a kill: the last checkpoint, and the best weights so far."""

    def __init__(self, out: Path, fabric: Fabric) -> None:
        self.path = out / "checkpoint.pt"
        self.best_path = out / "best.pt"
        self.fabric = fabric
        self.averaged: nn.Module | None = None
        self.best_accuracy = -1.0
        self.best_step = 0
        self.seconds_before = 0.0
        self._loaded: dict[str, Any] = {}

    def save(
        self,
        done: int,
        student: Student,
        ema: ModelEmaV3 | None,
        optimizer: torch.optim.Optimizer | None,
        seconds: float,
    ) -> None:
        """Write the checkpoint after `done` steps, on process 0, by way of a temporary file."""
        if self.fabric.is_global_zero:
            state = {
                "done": done,
                "student": student.state_dict(),
                "ema": ema.module.state_dict() if ema else None,
                "optimizer": optimizer.state_dict() if optimizer else None,
                "rng": torch.get_rng_state(),
                "seconds": self.seconds_before + seconds,
                "best": (self.best_accuracy, self.best_step),
            }
            _write_torch(self.path, state)
        self.fabric.barrier()

    def restore(self, student: Student) -> int:
        """Load the checkpoint into `student`; returns the steps done, 0 without a checkpoint."""
        if not self.path.exists():
            say("no checkpoint was written yet; starting from the first step")
            return 0
        self._loaded = torch.load(self.path, map_location="cpu", weights_only=True)
        student.load_state_dict(self._loaded["student"])
        torch.set_rng_state(self._loaded["rng"])
        self.seconds_before = self._loaded["seconds"]
        self.best_accuracy, self.best_step = self._loaded["best"]
        say(f"resuming after step {self._loaded['done']}")
        return int(self._loaded["done"])

    def restore_stage(self, optimizer: torch.optim.Optimizer, ema: ModelEmaV3 | None) -> None:
        """Load what belongs to the stage that was interrupted."""
        optimizer.load_state_dict(self._loaded["optimizer"])
        if ema and self._loaded["ema"]:
            ema.module.load_state_dict(self._loaded["ema"])

    def evaluate(self, job: Job, done: int, progress: Progress) -> None:
        """Mean accuracy over the source domains' validation images; keeps the best weights."""
        if self.fabric.is_global_zero:
            assert isinstance(self.averaged, Student)
            accuracy = source_accuracy(self.averaged, job.bank, job.images, job.split.val)
            progress.evaluated(done, accuracy)
            if accuracy > self.best_accuracy:
                self.best_accuracy, self.best_step = accuracy, done
                if job.config.select == "best":
                    _write_torch(self.best_path, self.averaged.state_dict())
        self.fabric.barrier()


def _write_torch(path: Path, value: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getbuffer())
