"""The images that take turns while the clock runs, prepared and as they lie in files."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgekd.benchmark.device import latency_places
from edgekd.benchmark.evaluate.accuracy import prepare
from edgekd.benchmark.measure.intervals import percentile
from edgekd.benchmark.subjects import Subject, Suite
from edgekd.targets.devices.payload import encoded_image


def encoded_of(suites: Sequence[Suite]) -> list[bytes]:
    """The images that the clock runs on as they lie in files, with drawn ones as PNG."""
    number, chosen = latency_places(suites)
    return [encoded_image(suites[number].images, index) for index in chosen.tolist()]


def buffers_of(
    models: Iterable[Subject], suites: Sequence[Suite]
) -> tuple[dict[str, NDArray[np.uint8]], dict[str, float]]:
    """For each preprocess hash at least 64 prepared images, and the median time to read and prepare one, in ms."""
    number, chosen = latency_places(suites)
    suite = suites[number]
    buffers: dict[str, NDArray[np.uint8]] = {}
    prepare_ms: dict[str, float] = {}
    for preprocess in {subject.preprocess.hash: subject.preprocess for subject in models}.values():
        images, times = [], []
        for index in chosen.tolist():
            before = time.perf_counter_ns()
            images.append(prepare(suite.images, index, preprocess))
            times.append((time.perf_counter_ns() - before) / 1e6)
        buffers[preprocess.hash] = np.stack(images)  # [64, H, W, 3]
        prepare_ms[preprocess.hash] = percentile(np.asarray(times), 50)
    return buffers, prepare_ms
