"""The log of a training run (console, metrics.jsonl, loggers), written by process 0, and its evaluation steps."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
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
from edgekd.distill.loggers import Loggers

Speed = tuple[int, float, float]
"""Images, seconds of waiting for data and total seconds of a run, without the first step of each process."""

EVALUATIONS = 10
"""Number of evaluations of a callback if source validation is only evaluated at the end."""


def evaluation_steps(span: range, every: int | None) -> tuple[int, ...]:
    """Return the evaluation steps of a stage, ascending: multiples of `every`, or ten evenly spread, and its last step.

    Args:
        span: the stage's steps, counted from 0 over the whole run.
    """
    if every:
        found = {done for done in range(span.start + 1, span.stop) if done % every == 0}
    else:
        parts = range(1, EVALUATIONS)
        found = {span.start + -(-len(span) * part // EVALUATIONS) for part in parts}
    return tuple(sorted(found | {span.stop}))


class Progress:
    """Count, time and display the steps of a run.

    On resuming, lines of metrics.jsonl and TensorBoard from after the last checkpoint are dropped, so that every step
    appears once.

    Args:
        config: `out`, and interval and targets of the log.
        steps: of the whole run. resume_at: steps done before.
        before: `speed` of the run before the checkpoint.
        stages: names of the stages that have steps.
    """

    def __init__(
        self,
        config: TrainConfig,
        fabric: Fabric,
        steps: int,
        resume_at: int = 0,
        before: Speed = (0, 0.0, 0.0),
        stages: Sequence[str] = ("train",),
    ) -> None:
        self._path = config.folder / "metrics.jsonl"
        self._before, self._log_every, self._fabric = before, config.log_every, fabric
        self._steps, self._resume_at, self._stages = steps, resume_at, list(stages)
        self._images = 0
        self._waited_s = 0.0
        self._warm: float | None = None
        self._last_step = self._last_line = 0.0
        self._bar: Bar | None = None
        self._board: Loggers | None = None
        if fabric.is_global_zero:
            _keep_until(self._path, resume_at)
            self._board = Loggers(config.logger, config.folder, resume_at)
            if err.is_terminal:
                self._bar = _bar("{task.fields[note]}")
                self._task = self._bar.add_task("train", total=steps, completed=resume_at, note="")
        self._started = time.perf_counter()  # services take seconds to open

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        if self._board:
            self._board.close()

    @property
    def seconds(self) -> float:
        """Return the seconds since this process started training."""
        return time.perf_counter() - self._started

    @property
    def images_per_second(self) -> float:
        """Return the throughput over all steps but the first, which includes start-up."""
        images, _, seconds = self.speed()
        return images / max(1e-9, seconds)

    @property
    def data_wait_percent(self) -> float:
        """Return the percentage of time spent waiting for data."""
        _, waited_s, seconds = self.speed()
        return 100 * waited_s / max(1e-9, seconds)

    def speed(self) -> Speed:
        """Return the speed of the whole run up to the last step."""
        images, waited_s, seconds = self._before
        here = self._last_step - (self._warm or self._last_step)
        return images + self._images, waited_s + self._waited_s, seconds + here

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude a block from the run's seconds and speed."""
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
        waited_s: float,
    ) -> None:
        """Record an optimizer step of `images` images over all processes that waited `waited_s` seconds for data."""
        self._last_step = time.perf_counter()
        if self._warm is None:
            self._warm = self._last_step
        else:
            self._images += images
            self._waited_s += waited_s
        if (step + 1) % self._log_every and step + 1 != self._steps:
            if self._bar:
                self._bar.update(self._task, completed=step + 1)
            return
        shown = {}
        for name, value in {"loss": loss, **values}.items():
            mean = self._fabric.all_reduce(value.detach().float(), reduce_op="mean")
            shown[name] = float(cast(Tensor, mean))
        if self._fabric.is_global_zero:
            self._log(step + 1, stage, shown.pop("loss"), shown, lr)

    def _log(self, done: int, stage: str, loss: float, terms: dict[str, float], lr: float) -> None:
        speed, wait = self.images_per_second, self.data_wait_percent
        rates = {"images_per_second": round(speed, 2), "data_wait_percent": round(wait, 2)}
        line = {"step": done, "stage": stage, "loss": loss, "terms": terms, "lr": lr}
        self._write(line | rates)
        if self._board:
            scalars = {"loss": loss, "lr": lr} | {f"terms/{k}": v for k, v in terms.items()}
            self._board.log({f"train/{name}": value for name, value in scalars.items()}, done)
        number = f"{self._stages.index(stage) + 1} of {len(self._stages)}"
        rate = f"{speed:.0f} images/s  data_wait {wait:.0f} %"
        note = f"stage {number}: {stage}  loss {loss:.4f}  {rate}"
        if self._bar:
            self._bar.update(self._task, completed=done, note=note)
        elif time.perf_counter() - self._last_line > 10 or done == self._steps:
            self._last_line = time.perf_counter()
            left = self.seconds / (done - self._resume_at) * (self._steps - done)
            say(f"step {done}/{self._steps}  {note}  about {left:.0f} s left")

    def evaluated(self, done: int, accuracy: float, *, final: bool = False) -> None:
        """Record an accuracy on source validation, 0–1."""
        self._write({"step": done, "val_top1": accuracy})
        if self._board:
            self._board.log({"val/top1": accuracy}, done)
        if final:
            say(f"ID validation accuracy {100 * accuracy:.1f} %")

    def attach(self, title: str, kind: str, paths: Sequence[Path]) -> None:
        """Attach files to the run in loggers that store files."""
        if self._board:
            self._board.attach(title, kind, paths)

    def _write(self, record: Mapping[str, object]) -> None:
        with disk_errors(self._path), open(self._path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")


@contextlib.contextmanager
def counting(title: str, total: int, fabric: Fabric) -> Iterator[Callable[[int], None]]:
    """Show a progress bar over `total` items, or a line every 10 s without a terminal; yield `advance(n)`."""
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
    """Return the step of a line of metrics.jsonl; infinity for a truncated line."""
    try:
        return float(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _keep_until(path: Path, step: int) -> None:
    if path.exists():
        lines = read_text(path, "log of the run").splitlines()
        write_text(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))
