"""Weight averaging: none, exponential moving average, or SWAD."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from edgekd.core.tensors import loaded_from, read_torch, write_torch


class LastWeights:
    """No averaging; the base of the averages."""

    label = "weights"

    def __init__(self, model: nn.Module) -> None:
        self.module = model
        """The weights to evaluate now."""

    def update(self, model: nn.Module, step: int) -> None:
        """Include the weights after step `step` (from 0) of the stage."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for resuming."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def result(self) -> nn.Module:
        """Return the weights to save; `label` describes them."""
        return self.module


class Ema(LastWeights):
    """Exponential moving average of parameters and buffers, with timm's warm-up of the decay."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._ema = ModelEmaV3(model, decay=decay, use_warmup=True)
        super().__init__(self._ema.module)
        self.label = f"EMA {decay:g}"

    def update(self, model: nn.Module, step: int) -> None:
        self._ema.update(model, step=step)

    def state_dict(self) -> dict[str, Any]:
        return self.module.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.module.load_state_dict(state)


@dataclass(frozen=True)
class Valley:
    """Evaluations `first` to `last`, inclusive, of low and flat validation loss; None while the loss still falls.

    `left` is true if the loss has risen again, so `last` is final.
    """

    first: int | None
    last: int
    left: bool


def find_valley(
    losses: list[float], patience: int = 3, tolerance: int = 6, ratio: float = 0.3
) -> Valley:
    """Return SWAD's start and end (Cha et al., NeurIPS 2021, algorithm 1) in the losses of evaluations 0, 1, ….

    Start: the first evaluation that is not improved by the next `patience − 1`. Threshold: `1 + ratio` times the mean
    loss of these `patience` evaluations. End: the evaluation before the first `tolerance` consecutive ones above it.

    If its tolerance is longer than its patience, the authors' program also includes segments before the start that are
    below the threshold. The algorithm in the paper does not, and neither does this function.
    """
    starts = range(len(losses) - patience + 1)
    first = next((i for i in starts if losses[i] <= min(losses[i : i + patience])), None)
    if first is None:
        return Valley(None, len(losses) - 1, False)
    threshold = sum(losses[first : first + patience]) / patience * (1 + ratio)
    # The search starts at the evaluation after the one that determined the start.
    for end in range(first + max(1, patience - tolerance + 1), len(losses) - tolerance + 1):
        if min(losses[end : end + tolerance]) > threshold:
            return Valley(first, end - 1, True)
    return Valley(first, len(losses) - 1, False)


class Swad(LastWeights):
    """SWAD: average the weights of every step between two evaluations (a segment), then the segments of the valley.

    Segments are files in `folder` while they may still be needed. `loss` is measured on the weights of single steps.

    Args:
        every: steps between evaluations. steps: of the whole stage.
        loss: source validation loss of a model; None on processes that only keep step.
        rule: `patience`, `tolerance` and `ratio` of `find_valley`.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        every: int,
        steps: int,
        loss: Callable[[nn.Module], float] | None,
        rule: Mapping[str, Any],
    ) -> None:
        super().__init__(model)
        self._folder, self._loss, self._rule = folder, loss, rule
        self._every, self._steps = every, steps
        self._segment = AveragedModel(model, use_buffers=True)
        self._losses: list[float] = []
        self._counts: list[int] = []

    def update(self, model: nn.Module, step: int) -> None:
        self._segment.update_parameters(model)
        if (step + 1) % self._every and step + 1 != self._steps:
            return
        if self._loss is not None:
            number = len(self._losses)
            self._losses.append(self._loss(model))
            self._counts.append(int(self._segment.n_averaged))
            valley = find_valley(self._losses, **self._rule)
            if not valley.left:
                self._write(number)
            # The start is among the last few evaluations; once found, it does not change.
            earliest = number - self._rule["patience"] + 1
            first = earliest if valley.first is None else valley.first
            for path in self._folder.glob("[0-9]*.pt"):
                if int(path.stem) < first or (valley.left and int(path.stem) > valley.last):
                    path.unlink()
        self._segment.n_averaged.zero_()

    def state_dict(self) -> dict[str, Any]:
        segment = self._segment.state_dict()
        return {"segment": segment, "losses": self._losses, "counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._segment.load_state_dict(state["segment"])
        self._losses, self._counts = list(state["losses"]), list(state["counts"])

    def result(self) -> nn.Module:
        valley = find_valley(self._losses, **self._rule)
        first = valley.last if valley.first is None else valley.first
        chosen = range(first, valley.last + 1)
        mean: dict[str, Tensor] = {}
        with loaded_from(self._folder):
            for number in chosen:
                share = self._counts[number] / sum(self._counts[i] for i in chosen)
                segment = read_torch(self._folder / f"{number}.pt", "segment's average")
                for name, value in segment.items():
                    if value.is_floating_point():
                        mean[name] = mean[name] + share * value if name in mean else share * value
                    else:
                        mean[name] = value
            self.module.load_state_dict(mean)
        begin, end = sum(self._counts[:first]) + 1, sum(self._counts[: valley.last + 1])
        self.label = f"SWAD average of the stage's steps {begin} to {end}"
        if valley.first is None:
            self.label += "; the loss never stopped falling, so the last segment"
        return self.module

    def _write(self, number: int) -> None:
        state = self._segment.module.state_dict()
        path = self._folder / f"{number}.pt"
        write_torch(path, {name: value.detach().cpu() for name, value in state.items()})
