from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifact_fakes import write_artifact
from benchmark_fakes import ONE_THREAD, SHORT, draw_nothing
from device_fakes import BRIEF, artifact_subject, be_brief, run_agent, two_suites, write_images
from trt_fakes import plant, write_trt_bundle

from edgekd.benchmark import device as devices
from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.evaluate.predictions import predict_suite
from edgekd.benchmark.results.storage import read_report
from edgekd.benchmark.subjects import Subject, Suite
from edgekd.core.errors import EdgekdError
from edgekd.core.files import cache_root
from edgekd.core.manifest import read_artifact
from edgekd.core.readers import sha256_file
from edgekd.evaluation.subjects import lone_artifact
from edgekd.targets.agent.job import Job, JobArtifact
from edgekd.targets.agent.store import read_step
from edgekd.targets.devices import drive
from edgekd.targets.devices.payload import write_agent
from edgekd.targets.trt import machine as trt_engine
from edgekd.targets.trt.machine import Gpu

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device with the stand-ins; the file gets a line for every engine that is built."""
    monkeypatch.setenv("PYTHONPATH", str(plant(tmp_path / "planted")), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_BUILDS", str(tmp_path / "builds"))
    be_brief(monkeypatch)
    return tmp_path / "builds"


@pytest.fixture
def suites(tmp_path: Path) -> list[Suite]:
    return two_suites(write_images(tmp_path / "images", 20))


def test_a_bundle_is_built_once_and_measured(
    builds: Path, suites: list[Suite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine has no TensorRT, so the artifact is a subject that only the device can run."""
    told: list[str] = []
    monkeypatch.setattr(drive, "say", told.append)
    bundle = lone_artifact(write_trt_bundle(tmp_path / "tensorrt-fp16"), [], [], elsewhere=True)
    assert not bundle.here
    speed = ONE_THREAD.model_copy(update={"batch_sizes": (8, 9)})
    [found] = devices.on_devices([bundle], suites, ["local"], speed)
    assert builds.read_text() == "10.3.0\n"
    [first, *_] = [line for line in told if "building the engine" in line or "logits of" in line]
    assert "building the engine of tensorrt-fp16 once, with tensorrt 10.3.0 for Orin" in first
    assert found.measured is not None
    onnx = artifact_subject(write_artifact(tmp_path / "fp32"))
    for n, suite in enumerate(suites):
        [here] = predict_suite([onnx], suite)
        np.testing.assert_allclose(found.measured.logits[n], here, rtol=1e-5)
    result = found.measured.result
    [clock] = result.model
    assert (clock.provider, result.placement) == ("tensorrt 10.3.0, Orin", None)
    eight, nine = result.rates
    assert eight.clock is not None
    assert "made for 8 images at a time, not for 9" in str(nine.reason)
    draw_nothing(monkeypatch)
    written = run_benchmark([found], suites, tmp_path / "out", speed=SHORT)
    assert read_report(tmp_path / "out") == written
    facts = written.environment["devices"][0]["artifacts"]["r/tensorrt-fp16@local"]["built"]
    expected = {"builder": "tensorrt", "gpu": "Orin", "compute_capability": "8.7"}
    assert facts.items() >= expected.items()
    assert not (cache_root() / "device").exists(), "nothing is left behind"


def test_what_was_built_is_used_again_until_tensorrt_is_another(
    builds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_agent(tmp_path / "agent.pyz")
    folder = write_trt_bundle(tmp_path / "artifact-x")
    job = Job((JobArtifact("r/x", folder.name, (0,), (0,)),), "images-x.zip", BRIEF, None)
    (tmp_path / "job-x").mkdir()
    (tmp_path / "job-x" / "job.json").write_text(job.to_json())

    def ready() -> str:
        code, told = run_agent(
            sys.executable, tmp_path / "agent.pyz", "ready", str(tmp_path / "job-x")
        )
        assert code == 0, told
        [built] = read_step(tmp_path / "job-x" / "done" / "ready.npz")[1]["built"]
        assert built["sha256"] == sha256_file(folder / "device.engine")
        return f"{built['version']}: {told[0]['say']}"

    assert ready().startswith("10.3.0: building the engine of artifact-x once")
    assert ready() == "10.3.0: the engine of artifact-x was built here before, by tensorrt 10.3.0"
    monkeypatch.setenv("FAKE_TENSORRT", "10.4.0")
    assert ready().startswith("10.4.0: building the engine of artifact-x once")
    assert builds.read_text() == "10.3.0\n10.4.0\n"


TENSORRT = {"builder": "tensorrt", "builder_version": "10.3.0", "compute_capabilities": ["8.7"]}
RTX = {"builder": "tensorrt-rtx", "builder_version": "1.7.1", "compute_capabilities": ["8.7"]}


@pytest.mark.parametrize(
    ("lacking", "details", "message", "hint"),
    [
        ("tensorrt.py", {}, "cannot load tensorrt (it is gone)", "pip install tensorrt"),
        ("cuda/bindings/runtime.py", {}, "cannot load cuda.bindings", "pip install cuda-python"),
        ("gpu", {}, "no NVIDIA GPU with a working driver", "nvidia-smi"),
        ("", TENSORRT | {"compute_capabilities": ["8.6", "8.9"]},
         "for compute capability 8.6, 8.9, and this Orin has 8.7", "--compute-capability 8.7"),
        ("", TENSORRT | {"builder_version": "11.1.0"}, "built by tensorrt 11.1.0, and here is 10.3.0",
         "Install tensorrt 11.1.0 on the device"),
        ("tensorrt_rtx.py", RTX, "cannot load tensorrt_rtx", "pip install tensorrt-rtx-cu13"),
    ],
)  # fmt: skip
def test_what_the_device_cannot_run_is_refused_before_anything_is_sent(
    builds: Path, suites: list[Suite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    lacking: str, details: dict[str, Any], message: str, hint: str,
) -> None:  # fmt: skip
    if lacking == "gpu":
        monkeypatch.setenv("FAKE_NO_GPU", "1")
    elif lacking:
        (tmp_path / "planted" / lacking).write_text("raise ImportError('it is gone')")
    with pytest.raises(EdgekdError) as caught:
        devices.on_devices(
            [subject(write_trt_bundle(tmp_path / "b", **details))], suites, ["local"], SHORT
        )
    assert caught.value.message.startswith("local: ")
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert [path.name.split("-")[0] for path in (cache_root() / "device").iterdir()] == ["edgekd"]
    assert not builds.exists()


@pytest.mark.usefixtures("builds")
def test_a_refused_model_is_one_sentence(
    suites: list[Suite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_REFUSAL", "no kernel for this layer")
    bundle = subject(write_trt_bundle(tmp_path / "b"))
    with pytest.raises(EdgekdError, match=r"cannot build the engine of b on this Orin: .*kernel"):
        devices.on_devices([bundle], suites, ["local"], SHORT)


@pytest.mark.usefixtures("builds")
def test_an_engine_that_lies_in_the_folder_is_run_as_it_is(tmp_path: Path) -> None:
    """More images than it was built for are run in pieces, as the accuracy run needs it."""
    folder = write_trt_bundle(tmp_path / "ahead", **TENSORRT)
    (folder / "model.engine").write_text(
        json.dumps({"version": "10.3.0", "largest": [8, 16, 16, 3]})
    )
    code = f"""
from pathlib import Path
import numpy as np
from edgekd.targets.session import open_session
session = open_session(Path({str(folder)!r}))
images = np.random.default_rng(0).integers(0, 256, (21, 16, 16, 3), dtype=np.uint8)
np.testing.assert_allclose(session.run(images), images.mean(axis=(1, 2)), rtol=1e-5)
print(session.largest_batch, session.provider)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "8 tensorrt 10.3.0, Orin"


def test_real_tensorrt_rtx_builds_what_lies_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVIDIA's builder needs no GPU; only that there is one is made up, and nothing runs the engine."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    monkeypatch.setattr(trt_engine, "find_gpu", lambda: Gpu("made up", "8.6"))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    folder = write_trt_bundle(tmp_path / "b")
    told: list[str] = []
    manifest = json.loads((folder / "artifact.json").read_text())
    built = trt_engine.ready_engine(manifest, folder, told.append)
    assert built is not None
    assert (built["builder"], built["version"]) == ("tensorrt-rtx", trt.__version__)
    assert built["sha256"] == sha256_file(folder / "device.engine")
    assert json.loads((folder / "device.engine.json").read_text()) == built
    assert trt_engine.ready_engine(manifest, folder, told.append) == built
    assert "was built here before" in told[-1]
    assert sorted(path.name for path in folder.iterdir()) == [
        "artifact.json", "device.engine", "device.engine.json", "model.onnx"
    ]  # fmt: skip


def test_an_engine_without_our_note_is_somebody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As build.sh leaves one in a bundle's folder: it is used, and not called ours."""
    found = ("tensorrt", None, Gpu("Orin", "8.7"))
    monkeypatch.setattr(trt_engine, "check_tensorrt", lambda details: found)
    folder = write_trt_bundle(tmp_path / "b")
    (folder / "device.engine").write_text("plan")
    told: list[str] = []
    manifest = json.loads((folder / "artifact.json").read_text())
    assert trt_engine.ready_engine(manifest, folder, told.append) is None
    assert told == ["b has an engine that was built here by other means"]


def subject(folder: Path) -> Subject:
    """Of an artifact that does not run here."""
    artifact = read_artifact(folder)

    def predict(images: object) -> np.ndarray:
        raise AssertionError("it was asked here")

    facts = ("r", "artifact", "fp16", artifact.preprocess, predict, artifact.classes, folder)
    return Subject(artifact.name, *facts, here=False)
