"""INT8 within an accuracy budget: revert as few groups as possible to float.

Each group (a layer or an addition) is quantized alone and ranked by its effect on the logits of in-domain and of
corrupted images; the unseen domain is not used. Then the worst groups stay in float. Their number is found by doubling
and bisection, which takes a few files. With all groups in float the file is FP32, so every budget can be met, and the
cost is reported. Ranking and search share one calibration and have a time limit.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgekd.core.console import say, warn
from edgekd.core.errors import GateFailed
from edgekd.core.manifest import Precision
from edgekd.core.predictor import Predictor, in_batches
from edgekd.export.quantize.calibration import Calibrator

C = TypeVar("C")
"""A calibrated model."""
ToLogits = Callable[[NDArray[np.float32]], NDArray[np.float32]]
_RANKING = 16
"""Number of images of each kind for ranking; a logit error needs far fewer images than an accuracy does."""
SEARCH_SECONDS = 300.0
"""Time limit of the ranking and the search."""
_HARDLY = 0.25
"""Share of INT8 layers below which a warning is printed."""
_CHECKED, _SURELY = 256, 1.64
"""Number of images of the later parity check, and standard errors for a 95 % probability of passing it."""
_NAMED = 8
"""Maximum number of printed groups in float; `artifact.json` has all of them."""


@dataclass(frozen=True)
class Group:
    """Nodes that are quantized together: a layer or an addition, with the operations after it.

    The groups include every operation that INT8 changes, so a file with all groups in float is the FP32 file.
    """

    name: str
    """Readable name: the module of its weights, the addition after such a module, or the node's own name."""
    nodes: tuple[str, ...]
    """Names of its nodes, the leading one first."""
    weighted: bool
    """Whether it is a convolution or a matrix product."""


class Scheme(ABC, Generic[C]):
    """A quantization scheme."""

    rest: ClassVar[Precision]
    """Precision of the nodes in float."""

    @abstractmethod
    def calibrate(self, fp32: Path, images: NDArray[np.uint8], calibrator: Calibrator) -> C:
        """Calibrate an FP32 ONNX file on preprocessed RGB images, uint8 `[N, H, W, 3]`.

        No images, only equal images, another shape, and activations that are not finite are an `EdgekdError`.
        """

    @abstractmethod
    def write(self, calibrated: C, out: Path, *, in_float: Collection[str] = ()) -> dict[str, Any]:
        """Write the INT8 file, with the nodes named `in_float` in float.

        Returns:
            For `artifact.json`: method, number of images, layers in float.
        """

    def quantize(
        self, fp32: Path, out: Path, images: NDArray[np.uint8], calibrator: Calibrator = "minmax"
    ) -> dict[str, Any]:
        """Write the INT8 file `out` of an FP32 file; arguments, result and errors as `calibrate` and `write`."""
        return self.write(self.calibrate(fp32, images, calibrator), out)

    @abstractmethod
    def groups(self, calibrated: C) -> list[Group]:
        """Return the disjoint groups that `write` quantizes, in graph order."""

    @abstractmethod
    def open(self, path: Path) -> Predictor:
        """Return a predictor for a file (logits or embeddings) on one thread."""


@dataclass(frozen=True)
class AccuracyBudget:
    """Limits on the loss of INT8, and the images for measuring it."""

    pixels: NDArray[np.uint8]
    """`[N, H, W, 3]`, preprocessed validation images of the training domains."""
    labels: NDArray[np.int64]
    """`[N]`, their classes."""
    proxy: NDArray[np.uint8]
    """`[N, H, W, 3]`, the same images with corruptions, a proxy for unseen domains."""
    max_drop_id: float = math.inf
    """Maximum loss of top-1 on `pixels` against FP32, in points."""
    max_drop_ood: float = math.inf
    """Maximum loss of top-1 on `proxy` against FP32, in points."""
    search_seconds: float = SEARCH_SECONDS
    min_agreement: float = 0.0
    """Minimum agreement with FP32 on all these images, 0–1, for the parity check."""

    def surely(self) -> AccuracyBudget:
        """Return the budget with a higher agreement, so that the parity check on other images is likely to pass."""
        share = self.min_agreement
        images = len(self.pixels) + len(self.proxy)
        error = math.sqrt(share * (1 - share) * (1 / images + 1 / _CHECKED)) if share < 1 else 0.0
        return dataclasses.replace(self, min_agreement=min(share + _SURELY * error, 1.0))


@dataclass(frozen=True)
class Drops:
    """Loss of a file against FP32 in points of top-1, and the share of images with the same class."""

    id: float
    ood: float
    agreement: float

    def within(self, budget: AccuracyBudget) -> bool:
        kept = self.id <= budget.max_drop_id and self.ood <= budget.max_drop_ood
        return kept and self.agreement >= budget.min_agreement

    def __str__(self) -> str:
        lost = f"{self.id:.1f} points on ID validation, {self.ood:.1f} on corrupted images"
        return f"{lost}, same class on {100 * self.agreement:.1f} %"


def quantize_within(
    fp32: Path,
    out: Path,
    calibration: NDArray[np.uint8],
    budget: AccuracyBudget,
    *,
    scheme: Scheme[Any],
    calibrator: Calibrator = "minmax",
    to_logits: ToLogits | None = None,
) -> dict[str, Any]:
    """Write the INT8 file `out` with as few groups in float as possible within `budget`.

    `to_logits` converts the output of a file that ends in an embedding to logits. The result is that of `Scheme.write`
    with `mixed`: the groups in float, the drops, and the cost in MB. A requested drop below 0 is a `GateFailed`.
    """
    calibrated = scheme.calibrate(fp32, calibration, calibrator)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="search-") as folder:
        search = Search(fp32, budget, scheme, calibrated, Path(folder), out.suffix, to_logits)
        return search.run(out)


class Search(Generic[C]):
    """One search; `trials` is a folder for temporary files."""

    def __init__(
        self,
        fp32: Path,
        budget: AccuracyBudget,
        scheme: Scheme[C],
        calibrated: C,
        trials: Path,
        suffix: str = ".onnx",
        to_logits: ToLogits | None = None,
    ) -> None:
        self.fp32, self.budget, self.scheme, self.calibrated = fp32, budget, scheme, calibrated
        self.plain, self.trial = trials / f"plain{suffix}", trials / f"trial{suffix}"
        self.to_logits = to_logits or (lambda found: found)
        self.reference = self._logits(fp32)

    def run(self, out: Path) -> dict[str, Any]:
        """Write the file `out`; returns as `quantize_within`."""
        budget, scheme = self.budget, self.scheme
        described = scheme.write(self.calibrated, self.plain)
        drops = self.drops(self.plain)
        if drops.within(budget):
            # Weights may be next to the file under the same name.
            for part in self.plain.parent.glob(f"{self.plain.stem}.*"):
                part.rename(out.with_suffix(part.suffix))
            say(f"int8: all layers pass the gate ({drops})")
            return described | {"mixed": self._facts((), drops)}
        groups = scheme.groups(self.calibrated)
        say(
            f"int8: the gate needs mixed precision ({drops}); ranking {len(groups)} layers and additions"
        )
        started = time.monotonic()
        deadline = started + budget.search_seconds
        order, ranked = self.rank(groups, deadline)
        if ranked < len(order):
            say(
                f"int8: ranked {ranked} of {len(order)} within {budget.search_seconds:.0f} s (--search-seconds); "
                "the others come after them"
            )
        kept, drops, shortest = self._shortest_prefix(order, deadline)
        if not shortest:
            say(
                "int8: the search stopped at its time limit; fewer groups in float may suffice (--search-seconds)"
            )
        seconds = round(time.monotonic() - started, 1)
        described = scheme.write(self.calibrated, out, in_float=_nodes(kept))
        self._report(kept, order, drops)
        return described | {
            "mixed": self._facts(kept, drops)
            | self._cost(out)
            | {"search": {"ranked_units": ranked, "shortest": shortest, "seconds": seconds}}
        }

    def rank(self, groups: Sequence[Group], deadline: float = math.inf) -> tuple[list[Group], int]:
        """Return `groups` by descending effect on the logits, and the number of ranked ones.

        The effect is the mean squared logit error with only this group quantized, divided by the variance of the
        logits, and the larger one of ID and corrupted images. At least one group is ranked. Groups not reached before
        `deadline`, in `time.monotonic()` seconds, come last.
        """
        effects: dict[Group, float] = {}
        for group in groups:
            if effects and time.monotonic() >= deadline:
                break
            others = _nodes([other for other in groups if other != group])
            self.scheme.write(self.calibrated, self.trial, in_float=others)
            effects[group] = self._effect(self.trial)
        ranked = sorted(effects, key=lambda group: -effects[group])
        return ranked + [group for group in groups if group not in effects], len(ranked)

    def drops(self, path: Path) -> Drops:
        """Return the loss of a file against FP32."""
        labels, pairs = self.budget.labels, zip(self.reference, self._logits(path), strict=True)
        lost, same = [], []
        for before, now in pairs:
            classes = before.argmax(axis=1), now.argmax(axis=1)
            right = [float((found == labels).mean()) for found in classes]
            lost.append(100 * (right[0] - right[1]))
            same.append(classes[0] == classes[1])
        return Drops(lost[0], lost[1], agreement=float(np.concatenate(same).mean()))

    def _effect(self, path: Path) -> float:
        errors = []
        for reference, now in zip(self.reference, self._logits(path, _RANKING), strict=True):
            some = reference[:_RANKING].astype(np.float64)
            error = np.square(now - some).mean()
            errors.append(float(error / max(np.square(some - some.mean(axis=0)).mean(), 1e-12)))
        return max(errors)

    def _logits(self, path: Path, most: int | None = None) -> list[NDArray[np.float32]]:
        """Return the logits of the first `most` images of each set; the file is opened once, since that can be slow."""
        run = self.scheme.open(path)
        sets = (self.budget.pixels, self.budget.proxy)
        return [self.to_logits(in_batches(run, images[:most])) for images in sets]

    def _shortest_prefix(
        self, order: Sequence[Group], deadline: float
    ) -> tuple[tuple[Group, ...], Drops, bool]:
        """Return the shortest passing prefix of `order`, by doubling and bisection, and whether bisection finished."""
        budget = self.budget.surely()

        def tried(count: int) -> Drops:
            self.scheme.write(self.calibrated, self.trial, in_float=_nodes(order[:count]))
            return self.drops(self.trial)

        fails, passes = 0, 1
        while not (drops := tried(passes)).within(budget):
            if passes == len(order):
                raise GateFailed(
                    f"The limit cannot be met: even with everything in float the file loses {drops}.",
                    "Allow a larger drop; 0 is the accuracy of FP32.",
                )
            fails, passes = passes, min(2 * passes, len(order))
        best = drops
        while passes - fails > 1 and time.monotonic() < deadline:
            middle = (fails + passes) // 2
            drops = tried(middle)
            if drops.within(budget):
                passes, best = middle, drops
            else:
                fails = middle
        return tuple(order[:passes]), best, passes - fails == 1

    def _report(self, kept: Sequence[Group], order: Sequence[Group], drops: Drops) -> None:
        names = ", ".join(group.name for group in kept[:_NAMED])
        more = f" and {len(kept) - _NAMED} more (artifact.json)" if len(kept) > _NAMED else ""
        say(
            f"int8: {len(kept)} of {len(order)} layers and additions stay in float, {names}{more}: {drops}"
        )
        layers = sum(group.weighted for group in order)
        left = layers - sum(group.weighted for group in kept)
        if left < _HARDLY * layers:
            warn(
                f"Only {left} of {layers} layers are in INT8. Use --{self.scheme.rest}, or allow a larger drop."
            )

    def _cost(self, out: Path) -> dict[str, Any]:
        """Print and return the additional size of the groups in float, in MB (10⁶ bytes)."""
        plain, mixed = (
            sum(part.stat().st_size for part in file.parent.glob(f"{file.stem}.*"))
            for file in (self.plain, out)
        )
        mb = (mixed - plain) / 1e6
        say(f"int8: they add {mb:+.2f} MB")
        return {"cost_mb": round(mb, 3)}

    def _facts(self, kept: Sequence[Group], drops: Drops) -> dict[str, Any]:
        return {
            "kept_in_float": [group.name for group in kept],
            "drop_id_points": round(drops.id, 3),
            "drop_proxy_points": round(drops.ood, 3),
            "agreement": round(drops.agreement, 4),
            "images": len(self.budget.pixels),
        }


def _nodes(groups: Sequence[Group]) -> list[str]:
    return [name for group in groups for name in group.nodes]
