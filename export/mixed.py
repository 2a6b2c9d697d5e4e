"""INT8 that stays within a gate: the layers that cost the most accuracy are kept in float, as few as it takes.

Each unit, a layer or an addition, is quantized alone and ranked by its effect on the logits, in domain and on corrupted
images, so the unseen domain takes no part. Then the worst are kept in float, as many as the gate needs: doubling, then
halving the interval, a handful of files. With all of them in float the file is FP32, so no gate is out of reach; what
the way there has cost is said. Both passes reuse one calibration. The ranking has a time limit: units are looked at in
the order of their weights' rounding error, so that the suspects have had their turn when it ends.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from edgekd.core.console import say, warn
from edgekd.core.errors import EdgekdError, GateFailed
from edgekd.core.predictor import in_batches
from edgekd.export.calibrators import Calibrator
from edgekd.export.dialect import C, Dialect
from edgekd.export.units import Unit
from edgekd.targets.timing.intervals import percentile
from edgekd.targets.timing.speed import in_words, speed_of, timed_in_turns

_RANKING = 16
"""Images of each kind that rank a unit: a logit error needs far fewer than an accuracy."""
SEARCH_SECONDS = 300.0
"""For ranking and for narrowing down how much stays in float."""
_HARDLY = 0.25
"""Share of the layers: with fewer in INT8, a file is hardly INT8 any more."""
_CHECKED, _SURELY = 256, 1.64
"""Other images that the parity check then takes, and the standard errors for passing it 19 times in 20."""
_NAMED = 8
"""Units in float that are named on the screen; `artifact.json` has them all."""


@dataclass(frozen=True)
class Yardstick:
    """What INT8 may cost, and the images that it is measured on."""

    pixels: NDArray[np.uint8]
    """`[N, H, W, 3]`, validation images of the training domains, prepared."""
    labels: NDArray[np.int64]
    """`[N]`, their classes."""
    proxy: NDArray[np.uint8]
    """`[N, H, W, 3]`, the same images corrupted: a stand-in for unseen domains made without them."""
    max_drop_id: float = math.inf
    """Points of top-1 on `pixels`, against FP32."""
    max_drop_ood: float = math.inf
    """Points of top-1 on `proxy`, against FP32."""
    search_seconds: float = SEARCH_SECONDS
    min_agreement: float = 0.0
    """Share of all these images, 0–1, on which INT8 must predict FP32's class, as the parity check asks afterwards."""

    def surely(self) -> Yardstick:
        """The same, asking for as much agreement here as makes the check on other images likely to pass."""
        share = self.min_agreement
        images = len(self.pixels) + len(self.proxy)
        error = math.sqrt(share * (1 - share) * (1 / images + 1 / _CHECKED)) if share < 1 else 0.0
        return dataclasses.replace(self, min_agreement=min(share + _SURELY * error, 1.0))


@dataclass(frozen=True)
class _Drops:
    id: float
    ood: float
    agreement: float

    def within(self, yardstick: Yardstick) -> bool:
        kept = self.id <= yardstick.max_drop_id and self.ood <= yardstick.max_drop_ood
        return kept and self.agreement >= yardstick.min_agreement

    def __str__(self) -> str:
        lost = f"{self.id:.1f} points on ID validation, {self.ood:.1f} on corrupted images"
        return f"{lost}, same class on {100 * self.agreement:.1f} %"


def quantize_within(
    fp32: Path,
    out: Path,
    calibration: NDArray[np.uint8],
    yardstick: Yardstick,
    *,
    dialect: Dialect[Any],
    calibrator: Calibrator = "minmax",
) -> dict[str, Any]:
    """Write the INT8 file `out` with as few layers and additions in float as keep it within the drops of `yardstick`.

    Args:
        dialect: who calibrates, writes and answers; its answers are logits.

    Returns:
        As the dialect's writer, and `mixed`: what was kept, the drops, and what they cost in MB; where the dialect is
        timed also in ms (p50 of one image on this machine, and why no claim about speed is made, if so), and the
            time of FP32.

    Raises:
        GateFailed: FP32 itself is outside the gate: a drop below 0 was asked for.
        EdgekdError: no validation images, or useless calibration images.
    """
    if len(yardstick.pixels) == 0:
        raise EdgekdError(
            "There are no validation images to measure the drop on.",
            "Leave out --max-drop-id and -ood.",
        )
    calibrated = dialect.calibrate(fp32, calibration, calibrator)
    right = _Reference(fp32, yardstick, dialect)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="search-") as folder:
        return _searched(calibrated, right, fp32, Path(folder), out)


def _searched(
    calibrated: C, reference: _Reference[C], fp32: Path, trials: Path, out: Path
) -> dict[str, Any]:
    """`quantize_within` after calibration; `trials` is a folder for files on the way."""
    yardstick, dialect = reference.yardstick, reference.dialect
    plain, trial = trials / f"plain{out.suffix}", trials / f"trial{out.suffix}"
    described = dialect.write(calibrated, plain)
    drops = reference.drops(plain)
    if drops.within(yardstick):
        for part in trials.glob(
            f"{plain.stem}.*"
        ):  # weights may lie beside the file under the same name
            part.rename(out.with_suffix(part.suffix))
        say(f"int8: all layers pass the gate ({drops})")
        return described | {"mixed": _facts((), drops, len(yardstick.pixels))}
    units = dialect.units(calibrated)
    say(
        f"int8: the gate needs mixed precision ({drops}); ranking {len(units)} layers and additions"
    )
    started = time.monotonic()
    deadline = started + yardstick.search_seconds
    order, ranked = rank(calibrated, units, reference, trial, deadline)
    if ranked < len(order):
        say(
            f"int8: time for {ranked} of {len(order)} within {yardstick.search_seconds:.0f} s (--search-seconds); "
            "the others come after them, by the rounding error of their weights"
        )
    kept, drops, shortest = _shortest_prefix(order, calibrated, reference, trial, deadline)
    if not shortest:
        say(
            "int8: the time ended before it was clear whether less in float would do (--search-seconds)"
        )
    searched = {
        "ranked_units": ranked,
        "shortest": shortest,
        "seconds": round(time.monotonic() - started, 1),
    }
    described = dialect.write(calibrated, out, keep=_nodes(kept))
    names = ", ".join(unit.name for unit in kept[:_NAMED])
    more = f" and {len(kept) - _NAMED} more (artifact.json)" if len(kept) > _NAMED else ""
    say(
        f"int8: {len(kept)} of {len(order)} layers and additions stay in float, {names}{more}: {drops}"
    )
    costs = _costs({"fp32": fp32, "plain": plain, "mixed": out}, yardstick, dialect)
    layers = sum(unit.weighted for unit in units)
    left = layers - sum(unit.weighted for unit in kept)
    if left < _HARDLY * layers:
        warn(
            f"The file is hardly INT8 any more: {left or 'none'} of {layers} layers are. "
            f"Take --{dialect.rest}, or allow a larger drop."
        )
    return described | {
        "mixed": _facts(kept, drops, len(yardstick.pixels)) | costs | {"search": searched}
    }


def rank(
    calibrated: C,
    units: Sequence[Unit],
    reference: _Reference[C],
    trial: Path,
    deadline: float = math.inf,
) -> tuple[list[Unit], int]:
    """`units`, the one with the largest effect on the logits first.

    The effect is the mean squared logit error with only this unit quantized, over the variance of the logits; the
    larger of the two on ID and on corrupted images.

    Args:
        deadline: of `time.monotonic()`; one unit is ranked in any case. Units without their turn come last, in the
            order of their weights' rounding error.

    Returns:
        The units, and how many of them were ranked.
    """
    dialect = reference.dialect
    errors = dialect.rounding(calibrated)
    waiting = sorted(units, key=lambda unit: -errors.get(unit.nodes[0], 0.0))
    effects: dict[Unit, float] = {}
    for unit in waiting:
        if effects and time.monotonic() >= deadline:
            break
        dialect.write(calibrated, trial, keep=_nodes([other for other in units if other != unit]))
        effects[unit] = reference.effect(trial)
    ranked = sorted(effects, key=lambda unit: -effects[unit])
    return ranked + [unit for unit in waiting if unit not in effects], len(ranked)


class _Reference(Generic[C]):
    """What FP32 says about the yardstick's images, and files of the dialect beside it."""

    def __init__(self, fp32: Path, yardstick: Yardstick, dialect: Dialect[C]) -> None:
        self.yardstick, self.dialect = yardstick, dialect
        self.sets = (yardstick.pixels, yardstick.proxy)
        self.logits = self._answers(fp32)

    def drops(self, path: Path) -> _Drops:
        now = self._answers(path)
        lost = [
            100 * (self._right(a) - self._right(b)) for a, b in zip(self.logits, now, strict=True)
        ]
        same = [a.argmax(axis=1) == b.argmax(axis=1) for a, b in zip(self.logits, now, strict=True)]
        return _Drops(lost[0], lost[1], agreement=float(np.concatenate(same).mean()))

    def effect(self, path: Path) -> float:
        errors = []
        for said, now in zip(self.logits, self._answers(path, _RANKING), strict=True):
            some = said[:_RANKING].astype(np.float64)
            error = np.square(now - some).mean()
            errors.append(float(error / max(np.square(some - some.mean(axis=0)).mean(), 1e-12)))
        return max(errors)

    def _answers(self, path: Path, most: int | None = None) -> list[NDArray[np.float32]]:
        """What a file says about the first `most` images of each set; opened once, which can be most of the work."""
        run = self.dialect.open(path)
        return [in_batches(run, images[:most]) for images in self.sets]

    def _right(self, logits: NDArray[np.float32]) -> float:
        return float((logits.argmax(axis=1) == self.yardstick.labels).mean())


def _shortest_prefix(
    order: Sequence[Unit], calibrated: C, reference: _Reference[C], trial: Path, deadline: float
) -> tuple[tuple[Unit, ...], _Drops, bool]:
    """The shortest start of `order` that passes, as far as doubling and halving find it, and whether halving ended."""
    yardstick = reference.yardstick.surely()

    def tried(count: int) -> _Drops:
        reference.dialect.write(calibrated, trial, keep=_nodes(order[:count]))
        return reference.drops(trial)

    fails, passes = 0, 1
    while not (drops := tried(passes)).within(yardstick):
        if passes == len(order):
            raise GateFailed(
                f"The gate is out of reach: even with everything in float the file drops {drops}.",
                "Allow a larger drop; 0 is FP32's own accuracy.",
            )
        fails, passes = passes, min(2 * passes, len(order))
    best = drops
    while passes - fails > 1 and time.monotonic() < deadline:
        middle = (fails + passes) // 2
        drops = tried(middle)
        if drops.within(yardstick):
            passes, best = middle, drops
        else:
            fails = middle
    return tuple(order[:passes]), best, passes - fails == 1


def _costs(
    files: Mapping[str, Path], yardstick: Yardstick, dialect: Dialect[Any]
) -> dict[str, Any]:
    """What the nodes in float cost, said and for `artifact.json`; ms only where they mean something.

    Args:
        files: `fp32`, `plain` and `mixed`; their weights may lie beside them under the same name.
    """
    sizes = {
        name: sum(part.stat().st_size for part in file.parent.glob(f"{file.stem}.*"))
        for name, file in files.items()
    }
    mb = (sizes["mixed"] - sizes["plain"]) / 1e6
    if not dialect.timed:
        say(f"int8: they cost {mb:+.2f} MB; what they cost in ms, only the device can tell")
        return {"cost_mb": round(mb, 3)}
    found = timed_in_turns(
        {name: dialect.open(file) for name, file in files.items()}, yardstick.pixels[:8]
    )
    p50 = {name: percentile(one.samples_ms, 50) for name, one in found.items()}
    speed = speed_of("mixed", "plain", found)
    say(
        f"int8: they cost {mb:+.2f} MB; the file {in_words(speed, 'all in INT8')} (p50 {p50['mixed']:.2f} ms, "
        f"{p50['plain']:.2f} all in INT8, {p50['fp32']:.2f} in FP32)"
    )
    return {
        "cost_ms": round(p50["mixed"] - p50["plain"], 3),
        "cost_mb": round(mb, 3),
        "fp32_ms": round(p50["fp32"], 3),
        "speed_withheld": speed.withheld,
    }


def _nodes(units: Sequence[Unit]) -> list[str]:
    return [name for unit in units for name in unit.nodes]


def _facts(kept: Sequence[Unit], drops: _Drops, images: int) -> dict[str, Any]:
    return {
        "kept_in_float": [unit.name for unit in kept],
        "drop_id_points": round(drops.id, 3),
        "drop_proxy_points": round(drops.ood, 3),
        "agreement": round(drops.agreement, 4),
        "images": images,
    }
