"""What survives a kill, written by process 0 by way of a temporary file."""

from __future__ import annotations

import io
import multiprocessing
import os
import shlex
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from edgekd.configs.train import TrainConfig
from edgekd.core.console import say
from edgekd.core.errors import EdgekdError, Stopped
from edgekd.core.files import write_bytes
from edgekd.core.readers import read_torch
from edgekd.distill.averaging import LastWeights
from edgekd.distill.job import Job
from edgekd.distill.launch import Fabric
from edgekd.distill.progress import Progress
from edgekd.distill.students import Student
from edgekd.distill.validate import source_accuracy
from edgekd.distill.visual_bank import VisualBank


class StopRequest:
    """For a block, SIGINT and SIGTERM do not interrupt but are noted in `number`, so that the work can end in order.

    A third signal interrupts. Outside the main thread, signals are not handled.

    Args:
        forward: pass each signal on to the processes that this one started, and wait for them.
    """

    def __init__(self, *, forward: bool = False) -> None:
        self.number: int | None = None
        self._forward = forward
        self._count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # as in a shell's background job
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self.number = self.number or number
        if self._count > 2:
            raise Stopped(number)
        if self._forward:
            for child in multiprocessing.active_children():
                if child.pid is not None:
                    os.kill(child.pid, number)


class Checkpoint:
    """What survives a kill: the last checkpoint, and the best weights so far."""

    def __init__(self, config: TrainConfig, fabric: Fabric) -> None:
        assert config.out is not None
        self.out = config.out
        self.path = self.out / "checkpoint.pt"
        self.best_path = self.out / "best.pt"
        self.fabric = fabric
        self.request = StopRequest()
        """Whether to stop; signals reach it while it is entered."""
        self._every, self._seconds = config.checkpoint_every, 60 * config.checkpoint_minutes
        self._saved_at = time.monotonic()
        self.average: LastWeights | None = None
        self.visual: VisualBank | None = None
        self.best_accuracy = -1.0
        self.best_step = 0
        self.seconds_before = 0.0
        self.speed_before = (0, 0.0, 0.0)
        self._loaded: dict[str, Any] = {}

    def after_step(self, done: int) -> tuple[bool, bool]:
        """Return whether a checkpoint is due after `done` steps, and whether to stop then; alike on all processes."""
        stop = self.request.number is not None
        late = time.monotonic() - self._saved_at > self._seconds
        if self.fabric.world_size > 1:
            flags = torch.tensor([stop, late], dtype=torch.float32, device=self.fabric.device)
            stop, late = (bool(flag) for flag in self.fabric.all_reduce(flags, reduce_op="sum"))
        return stop or late or done % self._every == 0, stop

    def stopped(self, done: int, steps: int) -> Stopped:
        """Return what to raise where a run of `steps` steps stops after `done` of them, with its checkpoint written."""
        return Stopped(
            self.request.number or signal.SIGTERM,
            f"Stopped after step {done} of {steps}; a checkpoint is written.",
            f"Go on with: edgekd train --resume --out {shlex.quote(str(self.out))}",
        )

    def save(
        self,
        done: int,
        student: Student,
        average: LastWeights | None,
        optimizer: torch.optim.Optimizer | None,
        progress: Progress,
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
                "seconds": self.seconds_before + progress.seconds,
                "speed": progress.speed(),
                "best": (self.best_accuracy, self.best_step),
            }
            _write_torch(self.path, state)
        self._saved_at = time.monotonic()
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
            self.speed_before = self._loaded.get("speed", self.speed_before)
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
