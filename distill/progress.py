"""What a training run says while it runs: a bar, metrics.jsonl and TensorBoard, written by process 0 alone."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import cast

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from torch import Tensor

from edgekd.configs.train import TrainConfig
from edgekd.core.console import err, say
from edgekd.core.files import disk_errors, write_text
from edgekd.core.readers import parse_json, read_text
from edgekd.distill.launch import Fabric
from edgekd.distill.loader import Prefetcher
from edgekd.distill.recipes import get_recipe


class Progress:
    """Counts, measures and shows the steps of one run.

    Lines of metrics.jsonl and of TensorBoard that a killed run wrote after its last checkpoint are dropped on
    resuming, so every step stands there once.
    """

    def __init__(
        self,
        out: Path,
        steps: int,
        config: TrainConfig,
        fabric: Fabric,
        resume_at: int,
        before: tuple[int, float, float] = (0, 0.0, 0.0),
    ) -> None:
        """`before`: the `speed` of the part of the run that a checkpoint has kept."""
        self._path = out / "metrics.jsonl"
        self._before = before
        self._log_every = config.log_every
        self._fabric = fabric
        self._steps = steps
        self._stages = [
            stage.name for stage in get_recipe(config.recipe, config.stages).stages if stage.share
        ]
        self._resume_at = resume_at
        self._images = 0
        self._waited_s = 0.0
        self._started = time.perf_counter()
        self._warm: float | None = None
        self._last_step = 0.0
        self._last_line = 0.0
        self._bar: Bar | None = None
        self._board = None
        if fabric.is_global_zero:
            _keep_until(self._path, resume_at)
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=resume_at + 1)
            if err.is_terminal:
                self._bar = _bar("{task.fields[note]}")
                self._task = self._bar.add_task("train", total=steps, completed=resume_at, note="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
        if self._board:
            self._board.close()

    @property
    def seconds(self) -> float:
        """Since this process started training."""
        return time.perf_counter() - self._started

    @property
    def images_per_second(self) -> float:
        """Over all steps but the first, which pays for start-up."""
        images, _, seconds = self.speed()
        return images / max(1e-9, seconds)

    @property
    def data_wait_percent(self) -> float:
        """Part of the time that training stood still for data."""
        _, waited_s, seconds = self.speed()
        return 100 * waited_s / max(1e-9, seconds)

    def speed(self) -> tuple[int, float, float]:
        """Return images, seconds waited for data and seconds of the whole run, without each process's first step.

        What comes after the last step is not training.
        """
        images, waited_s, seconds = self._before
        here = self._last_step - (self._warm or self._last_step)
        return images + self._images, waited_s + self._waited_s, seconds + here

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within the block is no training: it counts in no time and no speed."""
        since = time.perf_counter()
        try:
            yield
        finally:
            away = time.perf_counter() - since
            self._started += away
            self._last_step += away
            if self._warm is not None:
                self._warm += away

    def step(
        self,
        step: int,
        stage: str,
        loss: Tensor,
        values: Mapping[str, Tensor],
        lr: float,
        images: int,
        batches: Prefetcher,
    ) -> None:
        """Record one optimizer step of `images` images over all processes."""
        self._last_step = time.perf_counter()
        if self._warm is None:
            self._warm = self._last_step
        else:
            self._images += images
            self._waited_s += batches.waited_s
        batches.reset()
        if (step + 1) % self._log_every and step + 1 != self._steps:
            if self._bar:
                self._bar.update(self._task, completed=step + 1)
            return
        shown = {
            name: float(
                cast(Tensor, self._fabric.all_reduce(value.detach().float(), reduce_op="mean"))
            )
            for name, value in {"loss": loss, **values}.items()
        }
        if not self._fabric.is_global_zero:
            return
        total = shown.pop("loss")
        self._write(
            {
                "step": step + 1,
                "stage": stage,
                "loss": total,
                "terms": shown,
                "lr": lr,
                "images_per_second": round(self.images_per_second, 2),
                "data_wait_percent": round(self.data_wait_percent, 2),
            }
        )
        if self._board:
            for name, value in {
                "loss": total,
                "lr": lr,
                **{f"terms/{k}": v for k, v in shown.items()},
            }.items():
                self._board.add_scalar(f"train/{name}", value, step + 1)
        number = self._stages.index(stage) + 1 if stage in self._stages else 1
        note = (
            f"stage {number} of {len(self._stages)}: {stage}  loss {total:.4f}  {self.images_per_second:.0f} images/s  "
            f"data_wait {self.data_wait_percent:.0f} %"
        )
        if self._bar:
            self._bar.update(self._task, completed=step + 1, note=note)
        elif time.perf_counter() - self._last_line > 10 or step + 1 == self._steps:
            self._last_line = time.perf_counter()
            rate = self.seconds / (step + 1 - self._resume_at)
            say(
                f"step {step + 1}/{self._steps}  {note}  about {rate * (self._steps - step - 1):.0f} s left"
            )

    def evaluated(self, done: int, accuracy: float, *, final: bool = False) -> None:
        """Record an accuracy on source validation, 0–1."""
        self._write({"step": done, "val_top1": accuracy})
        if self._board:
            self._board.add_scalar("val/top1", accuracy, done)
        if final:
            say(f"ID validation accuracy {100 * accuracy:.1f} %")

    def _write(self, record: Mapping[str, object]) -> None:
        with disk_errors(self._path), open(self._path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")

    @staticmethod
    @contextlib.contextmanager
    def counting(title: str, total: int, fabric: Fabric) -> Iterator[Callable[[int], None]]:
        """A bar over `total` things (a line every 10 s where there is no terminal); yields `advance(n)`."""
        done, started, last_line = 0, time.perf_counter(), time.perf_counter()
        bar = _bar("") if fabric.is_global_zero and err.is_terminal else None
        task = bar.add_task(title, total=total) if bar else None

        def advance(n: int) -> None:
            nonlocal done, last_line
            done = min(total, done + n)
            if bar and task is not None:
                bar.update(task, completed=done)
            elif fabric.is_global_zero and time.perf_counter() - last_line > 10:
                last_line = time.perf_counter()
                left = (last_line - started) / done * (total - done)
                say(f"{title}: {done:,} of {total:,}, about {left:.0f} s left")

        with bar or contextlib.nullcontext():
            yield advance
        say(f"{title}: {total:,} in {time.perf_counter() - started:.1f} s")


def _bar(extra: str) -> Bar:
    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn(extra),
        console=err,
    )


def _step_of(line: str) -> float:
    """The step a line of metrics.jsonl belongs to; of a torn line, one beyond all steps."""
    try:
        return float(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _keep_until(path: Path, step: int) -> None:
    if path.exists():
        lines = read_text(path, "log of the run").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        write_text(path, "".join(line + "\n" for line in kept))
