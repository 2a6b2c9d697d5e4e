"""Latency in fresh processes of the agent: a stand-in for its models is planted in the child through PYTHONPATH."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from device_fakes import BRIEF, plant

from edgekd.benchmark.measure.local import measure_artifacts
from edgekd.core.errors import EdgekdError
from edgekd.targets.devices.result import Clocked

PLANTED = '''
import os, sys, time, types
from pathlib import Path
import numpy

class Model:
    """Loads in as many ms as its process id says; its provider tells whether torch was there."""
    def __init__(self, name, threads):
        self.load_ms, self.threads, self.largest_batch = float(os.getpid()), threads or 7, None
        self.slow = name == "slow"
        self.provider = "with torch" if "torch" in sys.modules else "without torch"
    def prepare(self, encoded):
        return numpy.frombuffer(encoded, dtype="uint8").reshape(4, 4, 3)
    def run(self, images):
        assert images.dtype == "uint8" and images.shape == (1, 4, 4, 3)
        time.sleep(0.003 if self.slow else 0.001)

def open_model(folder, *, threads):
    name = Path(folder).resolve().name
    if name == "altered":
        from edgekd.core.errors import EdgekdError
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


@pytest.fixture(autouse=True)
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, tmp_path / "planted", "sitecustomize", PLANTED)


def measured(
    *names: str, processes: int = 1, threads: int | None = None
) -> dict[str, list[Clocked]]:
    folders = {name: Path(name) for name in names}
    images = [bytes(48)] * 64
    return measure_artifacts(folders, images, replace(BRIEF, processes=processes), threads=threads)


def test_one_fresh_process_for_all_artifacts_without_torch() -> None:
    import torch  # noqa: F401  the parent has it, the child must not

    found = measured("fast", "slow")
    [fast], [slow] = found["fast"], found["slow"]
    assert fast.load_ms == slow.load_ms
    assert fast.provider == "without torch"
    assert fast.threads == 7
    assert 1.0 <= np.median(fast.samples.samples_ms) < np.median(slow.samples.samples_ms)
    for one in (fast, slow):
        assert len(one.samples.samples_ms) == len(one.samples.blocks) >= 20
        assert one.samples.complete
        assert one.samples.warmup_runs >= 4
    assert set(fast.samples.blocks) & set(slow.samples.blocks) == set()


def test_several_processes_are_each_fresh() -> None:
    found = measured("fast", "slow", processes=2, threads=3)
    processes = [one.load_ms for parts in found.values() for one in parts]
    assert len(processes) == len(set(processes)) == 4
    assert {one.threads for parts in found.values() for one in parts} == {3}


def test_the_error_of_a_session_reaches_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with pytest.raises(EdgekdError) as caught:
        measured("fast", "altered")
    assert (caught.value.message, caught.value.hint) == (
        "The artifact was altered.",
        "Export it again.",
    )
    assert list(scratch.iterdir()) == []


def test_a_process_that_dies_is_reported_with_its_last_words() -> None:
    with pytest.raises(EdgekdError, match="for fatal ended with code 3: Illegal instruction: avx9"):
        measured("fatal")


def test_files_in_the_working_folder_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise RuntimeError('the wrong numpy')")
    monkeypatch.chdir(tmp_path)
    assert len(measured("fast")["fast"]) == 1


def test_nothing_to_measure_starts_nothing() -> None:
    assert measured() == {}
