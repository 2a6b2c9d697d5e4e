"""Latency and throughput in fresh processes of the agent, with a stand-in for its models planted in the child."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmark_fakes import subject
from device_fakes import BRIEF, plant

import edgekd
from edgekd.benchmark.measure import timings
from edgekd.benchmark.measure.local import measure_artifacts
from edgekd.benchmark.measure.timings import throughput_rows
from edgekd.configs.benchmark import SpeedOptions
from edgekd.core.errors import EdgekdError
from edgekd.targets.devices.result import Clocked
from edgekd.targets.timing.intervals import rate_interval
from edgekd.targets.timing.stopwatch import rotating

PLANTED = '''
import os, sys, time, types
from pathlib import Path
import numpy
from edgekd.core.errors import EdgekdError

class Model:
    """Loads in as many ms as its process id says; its provider tells whether torch was there."""
    def __init__(self, name, threads):
        self.load_ms, self.threads, self.name = float(os.getpid()), threads or 7, name
        self.largest_batch = 1 if name == "single" else None
        self.provider = "with torch" if "torch" in sys.modules else "without torch"
    def prepare(self, encoded):
        return numpy.frombuffer(encoded, dtype="uint8").reshape(4, 4, 3)
    def run(self, images):
        assert images.dtype == "uint8" and images.shape[1:] == (4, 4, 3)
        if len(images) > 8:
            raise EdgekdError("It takes at most 8 images.", "")
        time.sleep((2 + 2 * len(images)) / 1000 / self.threads * (4 if self.name == "slow" else 1))

def open_model(folder, *, threads):
    name = Path(folder).resolve().name
    if name == "altered":
        raise EdgekdError("The artifact was altered.", "Export it again.")
    if name == "fatal":
        print("Illegal instruction: avx9", file=sys.stderr)
        os._exit(3)
    return Model(name, threads)

module = types.ModuleType("edgekd.targets.agent.model")
module.open_model = open_model
module.check_runtime = module.read_manifest = None
sys.modules["edgekd.targets.agent.model"] = module
'''
IMAGES = [bytes(48)] * 64


@pytest.fixture(autouse=True)
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, tmp_path / "planted", "sitecustomize", PLANTED)
    monkeypatch.setattr(timings, "RATE_QUICK", replace(BRIEF, runs=5, seconds=0.2))


def measured(
    *names: str, processes: int = 1, threads: int | None = None
) -> dict[str, list[Clocked]]:
    folders = {name: Path(name) for name in names}
    return measure_artifacts(folders, IMAGES, replace(BRIEF, processes=processes), threads=threads)


def test_processes_are_fresh_and_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch  # noqa: F401  the parent has it, the child must not

    # Files in the working folder are not imported.
    (tmp_path / "numpy.py").write_text("raise RuntimeError('the wrong numpy')")
    monkeypatch.chdir(tmp_path)
    found = measured("fast", "slow", processes=2)
    for fast, slow in zip(found["fast"], found["slow"], strict=True):
        assert (fast.provider, fast.threads) == ("without torch", 7)
        assert np.median(fast.samples.samples_ms) < np.median(slow.samples.samples_ms)
        for one in (fast, slow):
            assert len(one.samples.samples_ms) == len(one.samples.blocks) >= 20
            assert one.samples.complete
            assert one.samples.warmup_runs >= 4
    assert len({one.load_ms for parts in found.values() for one in parts}) == 4
    [fast], [slow] = measured("fast", "slow", threads=3).values()
    assert fast.load_ms == slow.load_ms, "one process, in which the two take turns"
    assert fast.threads == 3
    assert set(fast.samples.blocks) & set(slow.samples.blocks) == set()
    assert measured() == {}


def test_the_error_of_a_session_reaches_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with pytest.raises(EdgekdError) as caught:
        measured("fast", "altered")
    told = ("The artifact was altered.", "Export it again.")
    assert (caught.value.message, caught.value.hint) == told
    assert list(scratch.iterdir()) == []
    with pytest.raises(EdgekdError, match="for fatal ended with code 3: Illegal instruction: avx9"):
        measured("fatal")
    broken = subject("a", "artifact", lambda x: x, folder=tmp_path / "altered")
    with pytest.raises(EdgekdError, match="altered"):
        throughput_rows([broken], IMAGES, speed(1))


def speed(*batches: int, threads: tuple[int, ...] = ()) -> SpeedOptions:
    return SpeedOptions(quick=True, batch_sizes=batches, thread_counts=threads)


def test_a_known_time_for_each_batch(tmp_path: Path) -> None:
    subjects = [
        subject("torch", "torch", lambda x: x),
        subject("a", "artifact", lambda x: x, folder=tmp_path),
    ]
    rows = throughput_rows(subjects, IMAGES, speed(1, 8, threads=(1, 2)))
    grid = [(1, 1), (1, 2), (8, 1), (8, 2)]
    assert [(row.batch, row.threads) for row in rows] == grid
    # One image takes 4 ms of one thread, eight take 18 ms; sleeping only ever takes longer.
    for row, wanted in zip(rows, (250.0, 500.0, 8 / 0.018, 8 / 0.009), strict=False):
        assert row.images_per_s is not None
        assert row.images_per_s_ci95 is not None
        assert 0.1 * wanted < row.images_per_s < wanted
        low, high = row.images_per_s_ci95
        assert low <= row.images_per_s <= high
        assert row.calls >= 5
    # A session would run 16 images through a file for one, 16 times: that is no batch of 16.
    single = subject("one", "artifact", lambda x: x, folder=tmp_path / "single")
    _, large, one, in_pieces = throughput_rows([subjects[1], single], IMAGES, speed(1, 16))
    assert one.images_per_s is not None
    for row, reason in ((large, "It takes at most 8 images."), (in_pieces, "one image at a time")):
        assert (row.images_per_s, row.calls) == (None, 0)
        assert reason in str(row.reason)


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


def test_sizes_that_are_none(tmp_path: Path) -> None:
    for options in ({"batch_sizes": "1,eight"}, {"batch_sizes": "0"}, {"thread_counts": [2, -1]}):
        with pytest.raises(EdgekdError, match=r"whole numbers|below 1"):
            edgekd.benchmark(tmp_path, **options)
