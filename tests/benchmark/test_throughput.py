from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmark_fakes import subject
from device_fakes import plant

import edgekd
from edgekd.benchmark.measure import timings
from edgekd.benchmark.measure.timings import throughput_rows
from edgekd.configs.benchmark import SpeedOptions
from edgekd.core.errors import EdgekdError
from edgekd.targets.timing.intervals import rate_interval
from edgekd.targets.timing.stopwatch import rotating

PLANTED = """
import sys, time, types
from pathlib import Path
import numpy

class Model:
    load_ms, provider = 1.0, "planted"
    def __init__(self, threads, largest_batch):
        self.threads, self.largest_batch = threads or 4, largest_batch
    def prepare(self, encoded):
        return numpy.zeros((16, 16, 3), dtype="uint8")
    def run(self, images):
        if len(images) > 8:
            from edgekd.core.errors import EdgekdError
            raise EdgekdError("It takes at most 8 images.", "")
        time.sleep((2 + 2 * len(images)) / 1000 / self.threads)

def open_model(folder, *, threads):
    return Model(threads, 1 if Path(folder).resolve().name == "single" else None)

module = types.ModuleType("edgekd.targets.agent.model")
module.open_model = open_model
module.check_runtime = module.read_manifest = None
sys.modules["edgekd.targets.agent.model"] = module
"""

IMAGES = [b"as the stand-in pleases"] * 6


def speed(*batches: int, threads: tuple[int, ...] = ()) -> SpeedOptions:
    return SpeedOptions(quick=True, batch_sizes=batches, thread_counts=threads)


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, tmp_path / "planted", "sitecustomize", PLANTED)
    brief = {
        "warmup_runs": 4,
        "warmup_s": 0.01,
        "warmup_limit_s": 0.1,
        "seconds": 0.2,
        "block_s": 0.02,
    }
    monkeypatch.setattr(timings, "RATE_QUICK", replace(timings.RATE_QUICK, **brief))


@pytest.mark.usefixtures("planted")
def test_a_known_time_for_each_batch(tmp_path: Path) -> None:
    subjects = [
        subject("torch", "torch", lambda x: x),
        subject("a", "artifact", lambda x: x, folder=tmp_path),
    ]
    rows = throughput_rows(subjects, IMAGES, speed(1, 8, 16, threads=(1, 2)))
    assert [(row.subject, row.batch, row.threads) for row in rows] == [
        ("a", 1, 1), ("a", 1, 2), ("a", 8, 1), ("a", 8, 2), ("a", 16, 1), ("a", 16, 2)
    ]  # fmt: skip
    # One image takes 4 ms of one thread, eight take 18 ms; sleeping only ever takes longer.
    for row, wanted in zip(rows, (250.0, 500.0, 8 / 0.018, 8 / 0.009), strict=False):
        assert row.images_per_s is not None
        assert row.images_per_s_ci95 is not None
        assert 0.1 * wanted < row.images_per_s < wanted
        low, high = row.images_per_s_ci95
        assert low <= row.images_per_s <= high
        assert row.calls >= 5
    for row in rows[4:]:
        assert (row.images_per_s, row.calls, row.reason) == (None, 0, "It takes at most 8 images.")


@pytest.mark.usefixtures("planted")
def test_a_batch_is_never_taken_in_pieces(tmp_path: Path) -> None:
    """A session would run eight images through a file for one, eight times: that is no batch of eight."""
    single = subject("a", "artifact", lambda x: x, folder=tmp_path / "single")
    one, eight = throughput_rows([single], IMAGES, speed(1, 8))
    assert one.images_per_s is not None
    assert (eight.images_per_s, eight.reason) == (
        None,
        "The file is made for one image at a time, not for 8. Use smaller batches.",
    )


def test_a_file_that_refuses_one_image_ends_it(tmp_path: Path) -> None:
    broken = subject("a", "artifact", lambda x: x, folder=tmp_path)
    with pytest.raises(EdgekdError):
        throughput_rows([broken], IMAGES, speed(1))


def test_batches_go_round_and_repeat_where_images_are_few() -> None:
    seen: list[list[int]] = []
    images = np.arange(5, dtype=np.uint8)[:, None, None, None]
    for batch in (2, 7):
        run_once = rotating(lambda x: seen.append(x.ravel().tolist()), images, batch)
        for query in range(3):
            run_once(query)
    assert seen == [[0, 1], [2, 3], [0, 1]] + 3 * [[0, 1, 2, 3, 4, 0, 1]]


def test_the_interval_of_a_rate() -> None:
    blocks = np.repeat(np.arange(20), 10)
    assert rate_interval(np.full(200, 4.0), blocks, 2) == pytest.approx((500.0, 500.0))
    # Blocks of 2 and of 4 ms, ten of each: about 8 / 3 ms for 8 images, that is 8 / 3 per ms at 3 ms on average.
    low, high = rate_interval(np.where(blocks % 2 == 0, 2.0, 4.0), blocks, 8)
    assert low < 8 / 0.003 < high
    # The mean of 20 blocks of ±1 ms has a standard error of 1 / √20 ms.
    assert high - low == pytest.approx(8 / 0.003**2 * 2 * 1.96 * 0.001 / 20**0.5, rel=0.15)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_sizes": "1,eight"}, "not a list of whole numbers"),
        ({"batch_sizes": "0"}, "below 1"),
        ({"thread_counts": [2, -1]}, "below 1"),
    ],
)
def test_sizes_that_are_none(options: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match=said):
        edgekd.benchmark(tmp_path, **options)
