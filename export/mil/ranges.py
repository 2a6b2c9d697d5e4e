"""Range analysis for half precision: the ranges of all results of a float32 program on real images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.core.errors import EdgekdError
from edgekd.export.mil.evaluate import evaluate
from edgekd.export.mil.program import MilProgram

FP16_MAX = 65504.0
FP16_MIN_NORMAL = 2.0**-14
"""Smallest normal number; below it half precision loses digits, and an accelerator may flush to zero."""
MAX_ROUNDING = 0.01
"""Maximum relative rounding error of a tensor. It is 0.0003 in half precision if all numbers are in range."""


@dataclass(frozen=True)
class Hazard:
    """A layer whose result does not fit half precision."""

    layer: str
    op: str
    kind: Literal["overflow", "underflow"]
    largest: float
    """Largest magnitude of the result."""
    rounding: float
    """Relative rounding error of the result, infinity for an overflow."""

    @property
    def sentence(self) -> str:
        what = f"reaches {self.largest:.3g}, above half precision's 65504"
        if self.kind == "underflow":
            lost = f"{100 * self.rounding:.0f} %"
            what = f"loses {lost} in half precision: its largest value is {self.largest:.2g}"
        return f"{self.layer} ({self.op}) {what}"

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        return {name: None if value == float("inf") else value for name, value in values.items()}


@dataclass(frozen=True)
class Ranges:
    """Ranges and half-precision hazards of a program's layers, and its logits on the same images."""

    hazards: tuple[Hazard, ...]
    lows: dict[str, float]
    """Smallest value of each tensor."""
    highs: dict[str, float]
    """Largest value of each tensor."""
    logits: NDArray[np.float32]


def measure_ranges(program: MilProgram, images: NDArray[np.uint8]) -> Ranges:
    """Run `program` in float32 on RGB uint8 `[B, H, W, 3]` and measure every result.

    Numbers below the smallest normal one count as lost, since an accelerator may flush them to zero. Results that are
    not finite even in float32 are an `EdgekdError`.
    """
    name = program.logits
    outputs, seen = evaluate(program, images, [name], "float32", _statistics)
    hazards, lows, highs = [], {program.input_name: 0.0}, {program.input_name: 255.0}
    for op in program.ops:
        if op.name not in seen:
            continue
        low, high, error, power = seen[op.name].astype(np.float64).T  # [B] each
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise EdgekdError(
                f"The layer {op.name} gives numbers that are not finite on real images, in full precision too.",
                "Check the training run: its weights have probably diverged.",
            )
        for output in op.outputs:
            lows[output], highs[output] = float(low.min()), float(high.max())
        largest = float(max(-low.min(), high.max()))
        units = np.maximum(-low, high) ** 2
        total = float((power * units).sum())
        rounding = float(np.sqrt((error * units).sum() / total)) if total > 0 else 0.0
        if largest > FP16_MAX:
            hazards.append(Hazard(op.name, op.kind, "overflow", largest, float("inf")))
        elif rounding > MAX_ROUNDING:
            hazards.append(Hazard(op.name, op.kind, "underflow", largest, rounding))
    return Ranges(tuple(hazards), lows, highs, outputs[name].reshape(len(images), -1))


def layers_to_keep(program: MilProgram, hazards: Iterable[Hazard]) -> set[str]:
    """Return the layers that must stay in float32: those whose result half precision cannot hold, and their readers."""
    bad = {hazard.layer for hazard in hazards}
    tensors = {output for op in program.ops if op.name in bad for output in op.outputs}
    return {op.name for op in program.ops if op.name in bad or tensors & op.reads}


def _statistics(outputs: tuple[Tensor, ...]) -> Tensor:
    """Return float32 `[4]`: smallest, largest, what rounding moves, and the length.

    The last two are mean squares in units of the largest magnitude, so that neither tiny nor huge numbers leave
    float32's range when they are squared.
    """
    x = torch.cat([output.flatten() for output in outputs])
    half = x.clamp(-FP16_MAX, FP16_MAX).half().float()
    rounded = torch.where(x.abs() < FP16_MIN_NORMAL, 0.0, half)
    unit = x.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    error, power = ((x - rounded) / unit).square().mean(), (x / unit).square().mean()
    return torch.stack([x.amin(), x.amax(), error, power])
