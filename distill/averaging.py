"""Which weights a run evaluates and saves: the last ones, their moving average, or SWAD's valley of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from edgekd.core.files import replacing
from edgekd.core.readers import read_torch
from edgekd.distill.students import Student


class LastWeights:
    """No averaging."""

    label = "weights"

    def __init__(self, student: Student) -> None:
        self.module = student
        """The weights to evaluate now."""

    def update(self, student: Student, step: int) -> None:
        """Called after step `step` (from 0) of the stage."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""

    def result(self) -> Student:
        """The weights to save, and `label` to describe them."""
        return self.module


class Ema(LastWeights):
    """Exponential moving average of parameters and buffers, with timm's warm-up of the decay."""

    def __init__(self, student: Student, decay: float) -> None:
        self._ema = ModelEmaV3(student, decay=decay, use_warmup=True)
        super().__init__(cast(Student, self._ema.module))
        self.label = f"EMA {decay:g}"

    def update(self, student: Student, step: int) -> None:
        self._ema.update(student, step=step)

    def state_dict(self) -> dict[str, Any]:
        return self.module.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.module.load_state_dict(state)


@dataclass(frozen=True)
class Valley:
    """Where the validation loss is low and flat: evaluations `first` to `last`, both inside; None while it still falls.

    `left`: the loss has climbed out again, so `last` is final.
    """

    first: int | None
    last: int
    left: bool


def find_valley(
    losses: list[float], patience: int = 3, tolerance: int = 6, ratio: float = 0.3
) -> Valley:
    """SWAD's start and end (Cha et al., NeurIPS 2021, algorithm 1), on the validation losses of evaluations 0, 1, ….

    Start: the first evaluation that the next `patience − 1` do not improve on. The threshold is the mean loss of these
    `patience` times `1 + ratio`. End: the evaluation before the first `tolerance` in a row that lie above it.

    The authors' program, when its tolerance is longer than its patience, also takes in segments from before the start
    that lie below the threshold; the algorithm in the paper does not, and neither does this.
    """
    first = next(
        (
            i
            for i in range(len(losses) - patience + 1)
            if losses[i] <= min(losses[i : i + patience])
        ),
        None,
    )
    if first is None:
        return Valley(None, len(losses) - 1, False)
    threshold = sum(losses[first : first + patience]) / patience * (1 + ratio)
    # Looked for from the evaluation after the one that settled the start.
    for end in range(first + max(1, patience - tolerance + 1), len(losses) - tolerance + 1):
        if min(losses[end : end + tolerance]) > threshold:
            return Valley(first, end - 1, True)
    return Valley(first, len(losses) - 1, False)


class Swad(LastWeights):
    """Dense averages of every step's weights between two evaluations, and in the end their mean over the valley.

    Segments lie in `folder` as long as they may still count; `loss` is measured on the un-averaged weights.

    Args:
        every: steps between evaluations. steps: of the whole stage.
        loss: source validation loss of a student; None on processes that only keep step.
    """

    def __init__(
        self,
        student: Student,
        folder: Path,
        every: int,
        steps: int,
        loss: Callable[[Student], float] | None,
        rule: Mapping[str, float],
    ) -> None:
        super().__init__(student)
        self._student, self._folder, self._loss = student, folder, loss
        self._every, self._steps, self._rule = every, steps, dict(rule)
        self._segment = AveragedModel(student, use_buffers=True)
        self._losses: list[float] = []
        self._counts: list[int] = []

    def update(self, student: Student, step: int) -> None:
        self._segment.update_parameters(student)
        if (step + 1) % self._every and step + 1 != self._steps:
            return
        if self._loss is not None:
            number = len(self._losses)
            self._losses.append(self._loss(student))
            self._counts.append(int(self._segment.n_averaged))
            valley = self._valley()
            if not valley.left:
                self._write(number)
            # A start can only lie among the last few; one that is found stays.
            first = (
                valley.first
                if valley.first is not None
                else number - int(self._rule["patience"]) + 1
            )
            for path in self._folder.glob("[!.]*.pt"):
                if int(path.stem) < first or (valley.left and int(path.stem) > valley.last):
                    path.unlink()
        self._segment.n_averaged.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {
            "segment": self._segment.state_dict(),
            "losses": self._losses,
            "counts": self._counts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._segment.load_state_dict(state["segment"])
        self._losses, self._counts = list(state["losses"]), list(state["counts"])

    def result(self) -> Student:
        valley = self._valley()
        first = valley.last if valley.first is None else valley.first
        chosen = range(first, valley.last + 1)
        mean: dict[str, Tensor] = {}
        for number in chosen:
            share = self._counts[number] / sum(self._counts[i] for i in chosen)
            for name, value in read_torch(
                self._folder / f"{number}.pt", "segment's average"
            ).items():
                if value.is_floating_point():
                    mean[name] = mean[name] + share * value if name in mean else share * value
                else:
                    mean[name] = value
        self._student.load_state_dict(mean)
        begin, end = sum(self._counts[:first]) + 1, sum(self._counts[: valley.last + 1])
        found = (
            ""
            if valley.first is not None
            else "; the loss never stopped falling, so the last segment"
        )
        self.label = f"SWAD average of the stage's steps {begin} to {end}{found}"
        return self._student

    def _valley(self) -> Valley:
        return find_valley(
            self._losses,
            int(self._rule["patience"]),
            int(self._rule["tolerance"]),
            self._rule["ratio"],
        )

    def _write(self, number: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        state = {
            name: value.detach().cpu() for name, value in self._segment.module.state_dict().items()
        }
        with replacing(self._folder / f"{number}.pt") as temporary:
            torch.save(state, temporary)
