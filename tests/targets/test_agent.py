"""The agent by itself: what it is made of, what it says when it cannot work, and that it never works twice."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from artifact_fakes import CLASSES
from device_fakes import BRIEF, result_of, run_agent, write_images, write_job

import edgekd.core.errors
import edgekd.targets
from edgekd.core.errors import EdgekdError
from edgekd.targets.agent import __main__ as agent_main
from edgekd.targets.agent import steps
from edgekd.targets.agent.store import read_step, receive, write_step
from edgekd.targets.devices.payload import SHARED, agent_bytes, write_agent
from edgekd.targets.session import Placement


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    write_agent(tmp_path / "agent.pyz")
    return tmp_path / "agent.pyz"


def test_the_modules_in_it_are_the_packages_own(agent: Path) -> None:
    core = Path(edgekd.core.errors.__file__).parent
    rooms = Path(edgekd.targets.__file__).parents[1]
    with zipfile.ZipFile(agent) as archive:
        for name in SHARED:
            folder = core if "/" not in name else rooms
            assert archive.read(f"edgekd/{name}") == (folder / name).read_bytes()
        assert "edgekd/targets/agent/steps.py" in archive.namelist()
        for name in archive.namelist():
            ast.parse(archive.read(name), name, feature_version=(3, 9))
    assert agent_bytes() == agent_bytes() == agent.read_bytes()


def test_it_loads_nothing_that_a_device_lacks(agent: Path) -> None:
    code = (
        "import runpy, sys\n"
        "for name in ('torch', 'pydantic', 'typer', 'rich', 'platformdirs', 'onnx'): sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(agent)!r})\n"
        "import edgekd.targets.agent.__main__, edgekd.targets.onnxruntime, edgekd.targets.openvino, edgekd\n"
        "print(edgekd.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(agent))


def refusal(
    agent: Path, *words: str, options: tuple[str, ...] = (), data: bytes = b""
) -> list[str]:
    """Message and hint of a call that is refused."""
    command = [sys.executable, *options, str(agent), *words]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    assert done.returncode == 2
    return list(json.loads(done.stdout)["error"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
def test_a_device_that_lacks_numpy_or_space_is_one_sentence(agent: Path, tmp_path: Path) -> None:
    message, hint = refusal(agent, "probe", "x", options=("-S", "-E"))
    assert "lacks a package the agent needs" in message
    assert "pip install numpy pillow" in hint
    (tmp_path / "x.part").symlink_to("/dev/full")
    message, _ = refusal(agent, "receive", str(tmp_path), "x", "9", "0", data=b"123456789")
    assert message == "The device has no space left."


def test_a_batch_that_the_system_kills_is_a_refusal(agent: Path, tmp_path: Path) -> None:
    """As when memory runs out: the entry says so, the rest goes on, and it is not tried again."""
    job = write_job(tmp_path, write_images(tmp_path / "images", 8), grid=((1, 1), (64, 1)))
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *throughput-0-1*) kill -9 $$;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    code, told = run_agent(sys.executable, agent, "run", str(job), "--python", str(python))
    assert code == 0, told
    kept, refused = result_of(job / "edgekd-result.npz").artifacts[0].rates
    assert kept.clock is not None
    assert len(kept.clock.samples.samples_ms) >= BRIEF.runs
    assert (refused.batch, refused.clock) == (64, None)
    assert "out of memory?" in str(refused.reason)


def test_a_job_killed_midway_goes_on_and_counts_nothing_twice(agent: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 30)
    # 300 questions: two entries of the journal; then two processes for the clock.
    job = write_job(tmp_path, images, repeat=10, protocol=replace(BRIEF, seconds=0.3, processes=2))
    command = [sys.executable, str(agent), "run", str(job), "--stay"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (job / "done" / "latency-0-0.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    before = {path.name: path.stat().st_mtime_ns for path in (job / "done").glob("[!.]*.npz")}
    assert {"start.npz", "predict-0-0.npz", "predict-0-256.npz", "latency-0-0.npz"} <= set(before)
    assert not (job / "edgekd-result.npz").exists()
    assert run_agent(sys.executable, agent, "run", str(job))[0] == 0
    after = {path.name: path.stat().st_mtime_ns for path in (job / "done").glob("[!.]*.npz")}
    assert {name: after[name] for name in before} == before
    result = result_of(job / "edgekd-result.npz")
    [artifact] = result.artifacts
    assert artifact.logits.shape == (300, len(CLASSES))
    np.testing.assert_array_equal(artifact.logits[:30], artifact.logits[30:60])
    assert len(artifact.model) == 2
    for n, clock in enumerate(artifact.model):
        stored, _ = read_step(job / "done" / f"latency-0-{n}.npz")
        np.testing.assert_array_equal(clock.samples.samples_ms, stored["samples_ms_0"])
    assert result.facts["restarts"] == 0
    # Restarts of the device are counted; older agents called provider and source of a placement otherwise.
    arrays, facts = read_step(job / "edgekd-result.npz")
    facts["steps"]["endtoend-0"]["boot"] = "another"
    placement = {"asked": "CPU", "nodes": {"CPU": {"Conv": 2}}, "told_by": "a profile"}
    facts["steps"]["predict-0-0"]["placement"] = placement
    write_step(job / "edgekd-result.npz", arrays, facts)
    result = result_of(job / "edgekd-result.npz")
    assert result.facts["restarts"] == 1
    assert result.artifacts[0].placement == Placement("CPU", {"CPU": {"Conv": 2}}, "a profile")


def test_two_agents_take_turns(agent: Path, tmp_path: Path) -> None:
    images, longer = write_images(tmp_path / "images", 6), replace(BRIEF, seconds=0.5)
    job = write_job(tmp_path, images, protocol=longer)
    first = subprocess.Popen(
        [sys.executable, str(agent), "run", str(job)], stdout=subprocess.DEVNULL
    )
    while not (job / "done" / "start.npz").exists():
        time.sleep(0.02)
    code, told = run_agent(sys.executable, agent, "run", str(job))
    assert (first.wait(), code) == (0, 0)
    assert ["waiting for it" in message["say"] for message in told if "say" in message] == [True]


def test_a_copy_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    digest = hashlib.sha256(data).hexdigest()
    with pytest.raises(EdgekdError, match="stopped at 1000 of 256000 bytes"):
        receive(tmp_path, "x", len(data), digest, io.BytesIO(data[:1000]))
    receive(tmp_path, "x", len(data), digest, io.BytesIO(data[1000:]))
    assert (tmp_path / "x").read_bytes() == data
    with pytest.raises(EdgekdError, match="arrived damaged"):
        receive(tmp_path, "y", len(data), digest, io.BytesIO(data[::-1]))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_emulation_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_CPUINFO", str(tmp_path / "cpuinfo"))
    for machine, text, wanted in (
        ("x86_64", "vendor_id\t: GenuineIntel", False),
        ("aarch64", "CPU implementer\t: 0x41", False),
        ("aarch64", "CPU implementer\t: 0x00", True),
    ):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(steps.platform, "machine", lambda machine=machine: machine)
        assert steps.emulated() is wanted


def refused_classification(capsys: pytest.CaptureFixture[str], folder: Path, image: str) -> str:
    assert agent_main.main(["classify", str(folder), image]) == 2
    return str(json.loads(capsys.readouterr().out)["error"][0])


@pytest.mark.parametrize("name", ["/dev/zero", "missing.png", "."])
def test_an_image_that_is_no_regular_file_is_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    model = SimpleNamespace(prepare=len, run=None, classes=())
    monkeypatch.setattr(agent_main, "open_model", lambda folder, threads: model)
    assert name in refused_classification(capsys, tmp_path, name)


def test_an_error_of_the_devices_system_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refused(folder: Path, threads: int | None) -> None:
        raise PermissionError(13, "Permission denied", "/data/model.onnx")

    monkeypatch.setattr(agent_main, "open_model", refused)
    assert "/data/model.onnx" in refused_classification(capsys, tmp_path, "y.png")
