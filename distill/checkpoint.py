"""What survives a kill, written by process 0 by way of a temporary file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from edgekd.console import say
from edgekd.distill.averaging import LastWeights
from edgekd.distill.job import Job
from edgekd.distill.progress import Progress
from edgekd.distill.students import Student
from edgekd.distill.validate import source_accuracy
from edgekd.distill.visual_bank import VisualBank
from edgekd.errors import EdgekdError
from edgekd.files import write_bytes
from edgekd.readers import read_torch


class Checkpoint:
    """What survives a kill: the last checkpoint, and the best weights so far."""

    def __init__(self, out: Path, fabric: Fabric) -> None:
        self.path = out / "checkpoint.pt"
        self.best_path = out / "best.pt"
        self.fabric = fabric
        self.average: LastWeights | None = None
        self.visual: VisualBank | None = None
        self.best_accuracy = -1.0
        self.best_step = 0
        self.seconds_before = 0.0
        self._loaded: dict[str, Any] = {}

    def save(
        self,
        done: int,
        student: Student,
        average: LastWeights | None,
        optimizer: torch.optim.Optimizer | None,
        seconds: float,
    ) -> None:
        """Write the checkpoint after `done` steps, on process 0, by way of a temporary file."""
        if self.fabric.is_global_zero:
            state = {
                "done": done,
                "student": student.state_dict(),
                "average": average.state_dict() if average else None,
                "visual": self.visual.state_dict() if self.visual else None,
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
        self._loaded = read_torch(self.path, "checkpoint", "Train again with --overwrite.")
        try:
            student.load_state_dict(self._loaded["student"])
            if self.visual is not None:
                self.visual.load_state_dict(self._loaded["visual"])
            torch.set_rng_state(self._loaded["rng"])
            self.seconds_before = float(self._loaded["seconds"])
            self.best_accuracy, self.best_step = self._loaded["best"]
            done = int(self._loaded["done"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise EdgekdError(
                f"The checkpoint {self.path} does not belong to this run.",
                "Train again with --overwrite.",
            ) from error
        say(f"resuming after step {done}")
        return done

    def restore_stage(self, optimizer: torch.optim.Optimizer, average: LastWeights) -> None:
        """Load what belongs to the stage that was interrupted."""
        optimizer.load_state_dict(self._loaded["optimizer"])
        average.load_state_dict(self._loaded["average"])

    def evaluate(self, job: Job, done: int, progress: Progress) -> None:
        """Mean accuracy over the source domains' validation images; keeps the best weights."""
        if self.fabric.is_global_zero:
            assert self.average is not None
            averaged = self.average.module
            accuracy = source_accuracy(averaged, job.bank, job.images, job.split.val)
            progress.evaluated(done, accuracy)
            if accuracy > self.best_accuracy:
                self.best_accuracy, self.best_step = accuracy, done
                if job.config.select == "best":
                    _write_torch(self.best_path, averaged.state_dict())
        self.fabric.barrier()


def _write_torch(path: Path, value: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getbuffer())
