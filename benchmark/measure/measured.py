"""An artifact's numbers that come from a device instead of from this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.measure.intervals import percentile
from edgekd.targets.devices.result import Built, Clocked, Rate
from edgekd.targets.session import Placement


@dataclass(frozen=True, eq=False)
class Measured:
    """One artifact on one device.

    Attributes:
        model: the model's clock, one entry per process.
        whole: the clock from encoded image to logits, one process.
        prepare_ms: the part of each of `whole`'s samples that decoding and resizing took, `[n]`.
        logits: position of the suite → float32 `[n, C]`, columns in the suite's class order.
        facts: what the report says about the device; shared by all artifacts measured there.
        same_pixels: share of the compared images that the device prepared bit for bit as this machine does; None
            where none were compared.
        placement: which nodes ran where; None from an agent that did not ask.
        rates: its throughput, where that was asked for.
        built: the engine that the device built for itself; None where the file runs as it is.
    """

    model: list[Clocked]
    whole: Clocked
    prepare_ms: NDArray[np.float64]
    logits: Mapping[int, NDArray[np.float32]]
    facts: dict[str, Any]
    same_pixels: float | None
    placement: Placement | None = None
    rates: tuple[Rate, ...] = ()
    built: Built | None = None

    def row_facts(self) -> dict[str, Any]:
        """What a latency row says beyond the model's clock."""
        return {"prepare_p50_ms": percentile(self.prepare_ms, 50)}
