"""Checkpoints: the last state and the best weights of a run, and signals that stop it cleanly."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn

from edgekd.configs.train import TrainConfig
from edgekd.core.console import say
from edgekd.core.errors import Stopped
from edgekd.core.tensors import loaded_from, read_torch, write_torch
from edgekd.distill.averaging import LastWeights
from edgekd.distill.launch import Fabric
from edgekd.distill.losses import Batch
from edgekd.distill.models.batchnorm import Fold
from edgekd.distill.progress import Progress, Speed


class Task(ABC):
    """What the loop trains: an image classifier, or a vision-language student."""

    model: nn.Module
    """All parameters that train."""
    source: Callable[[int], Any]
    """Makes the raw batch of a step."""

    @abstractmethod
    def train_only(self, parts: tuple[str, ...]) -> None:
        """Freeze all parts of the model but these."""

    @abstractmethod
    def views(self, raw: Any) -> Any:
        """Return the student's input for a raw batch."""

    @abstractmethod
    def teacher_features(self, raw: Any) -> Any:
        """Return the teacher's features of the same input, None without a teacher."""

    @abstractmethod
    def forward(self, model: nn.Module, views: Any, teacher: Any, raw: Any) -> Batch:
        """Return the student's output and its targets."""

    @abstractmethod
    def names(self, raw: Any) -> list[str]:
        """Return the names of a batch's images."""

    @abstractmethod
    def accuracy(self, model: nn.Module) -> float:
        """Return the mean accuracy over the source domains' validation images, 0–1."""

    @abstractmethod
    def loss(self, model: nn.Module) -> float:
        """Return the loss on source validation (for SWAD)."""

    def folds(self) -> list[Fold]:
        """Return the BatchNorms of the model that a forward pass may fold into convolutions."""
        return []

    def update(self, teacher: Any) -> None:
        """Update state that follows the teacher's features, after a step."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state besides the model's."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        return None


class StopRequest:
    """Record SIGINT and SIGTERM in `number` within a block instead of interrupting, so that work can end cleanly.

    A third signal interrupts. Outside the main thread, signals are not handled.

    Args:
        forward: pass each signal on to child processes.
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
    """The last checkpoint and the best weights of a run, written atomically by process 0.

    Args:
        config: `out`, the checkpoint interval, and whether the best weights are kept.
        command: the command to print for resuming.
    """

    def __init__(self, config: TrainConfig, fabric: Fabric, command: str = "edgekd train") -> None:
        self.out = config.folder
        self.path = self.out / "checkpoint.pt"
        self.best_path = self.out / "best.pt"
        self.request = StopRequest()
        """The request to stop; it receives signals while it is entered."""
        self.done = 0
        """Number of steps in the last checkpoint."""
        self.best_accuracy = -1.0
        self.best_step = 0
        self.stale = 0
        """Number of evaluations since the best one."""
        self.seconds_before = 0.0
        self.speed_before: Speed = (0, 0.0, 0.0)
        self._fabric, self._config, self._command = fabric, config, command
        self._saved_at = time.monotonic()
        self._loaded: dict[str, Any] = {}

    @property
    def patience_over(self) -> bool:
        """Return whether source validation has not improved for `patience` evaluations."""
        return self._config.patience is not None and self.stale >= self._config.patience

    def due(self, done: int) -> tuple[bool, bool]:
        """Return whether a checkpoint is due after `done` steps, and whether to stop; equal on all processes."""
        stop = self.request.number is not None
        late = time.monotonic() - self._saved_at > 60 * self._config.checkpoint_minutes
        if self._fabric.world_size > 1:
            flags = torch.tensor([stop, late], dtype=torch.float32, device=self._fabric.device)
            stop, late = (bool(flag) for flag in self._fabric.all_reduce(flags, reduce_op="sum"))
        return stop or late or done % self._config.checkpoint_every == 0, stop

    def stopped(self, done: int, steps: int) -> Stopped:
        """Return the exception for a run that stops after `done` of `steps` steps, after its checkpoint is written."""
        return Stopped(
            self.request.number or signal.SIGTERM,
            f"Stopped after step {done} of {steps}; a checkpoint was written.",
            f"Resume with: {self._command} --resume --out {shlex.quote(str(self.out))}",
        )

    def save(
        self,
        done: int,
        task: Task,
        average: LastWeights | None,
        optimizer: torch.optim.Optimizer | None,
        progress: Progress,
    ) -> None:
        """Write the checkpoint after `done` steps; at the end of a stage, without average and optimizer."""
        if self._fabric.is_global_zero:
            state = {
                "done": done,
                "student": task.model.state_dict(),
                "task": task.state_dict(),
                "average": average.state_dict() if average else None,
                "optimizer": optimizer.state_dict() if optimizer else None,
                "rng": torch.get_rng_state(),
                "seconds": self.seconds_before + progress.seconds,
                "speed": progress.speed(),
                "best": (self.best_accuracy, self.best_step),
                "stale": self.stale,
            }
            write_torch(self.path, state)
        self.done = done
        self._saved_at = time.monotonic()
        self._fabric.barrier()

    def restore(self, task: Task) -> int:
        """Load the checkpoint into `task`; return the steps done, 0 without a checkpoint."""
        if not self.path.exists():
            say("no checkpoint was written yet; starting from the first step")
            return 0
        self._loaded = read_torch(self.path, "checkpoint", "Train again with --overwrite.")
        with loaded_from(self.path):
            task.model.load_state_dict(self._loaded["student"])
            task.load_state_dict(self._loaded["task"])
            torch.set_rng_state(self._loaded["rng"])
            self.seconds_before = float(self._loaded["seconds"])
            images, waited_s, seconds = self._loaded["speed"]
            self.speed_before = int(images), float(waited_s), float(seconds)
            accuracy, step = self._loaded["best"]
            self.best_accuracy, self.best_step = float(accuracy), int(step)
            self.stale = int(self._loaded.get("stale", 0))
            self.done = int(self._loaded["done"])
        say(f"resuming after step {self.done}")
        return self.done

    def restore_stage(self, optimizer: torch.optim.Optimizer, average: LastWeights) -> None:
        """Load the state of the interrupted stage."""
        with loaded_from(self.path):
            optimizer.load_state_dict(self._loaded["optimizer"])
            for weight, moments in optimizer.state.items():
                if any(moments[name].shape != weight.shape for name in ("exp_avg", "exp_avg_sq")):
                    raise ValueError("moments of other weights")
            average.load_state_dict(self._loaded["average"])

    def evaluate(self, done: int, task: Task, average: LastWeights, progress: Progress) -> None:
        """Measure the accuracy on source validation, and keep the best weights."""
        if self._fabric.is_global_zero:
            accuracy = task.accuracy(average.module)
            progress.evaluated(done, accuracy)
            self.stale += 1
            if accuracy > self.best_accuracy:
                self.best_accuracy, self.best_step, self.stale = accuracy, done, 0
                if self._config.select == "best":
                    write_torch(self.best_path, average.module.state_dict())
        self.stale = self._fabric.broadcast(self.stale)
        if self.patience_over:
            say(
                f"source validation has not improved for {self.stale} evaluations: stopping after step {done}"
            )

    def remove(self) -> None:
        """Remove the files of a finished run."""
        for path in (self.path, self.best_path):
            path.unlink(missing_ok=True)
