"""TensorRT artifacts on a device, as far as the driver's calls: stand-ins take the place of TensorRT and CUDA.

No engine has been run by this test, and none on a GPU: see docs/devices.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmark_fakes import ONE_THREAD, SHORT
from device_fakes import (
    BRIEF,
    artifact_subject,
    run_agent,
    two_suites,
    write_artifact,
    write_images,
)
from trt_fakes import plant, write_trt_bundle

from edgekd.benchmark import device as devices
from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.evaluate.logits import predict_suite
from edgekd.benchmark.measure import timings
from edgekd.benchmark.report import write
from edgekd.benchmark.results.storage import read_report
from edgekd.benchmark.subjects import Subject, Suite
from edgekd.core.errors import EdgekdError
from edgekd.core.files import cache_root
from edgekd.core.manifest import read_artifact
from edgekd.core.readers import sha256_file
from edgekd.evaluation.subjects import lone_artifact
from edgekd.targets import trt_device
from edgekd.targets.agent.job import Job, JobArtifact
from edgekd.targets.agent.store import read_step
from edgekd.targets.devices import drive
from edgekd.targets.devices.payload import write_agent
from edgekd.targets.timing import stopwatch
from edgekd.targets.trt_builders import Gpu

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device with the stand-ins; the file gets a line for every engine that is built."""
    monkeypatch.setenv("PYTHONPATH", str(plant(tmp_path / "planted")))
    monkeypatch.setenv("FAKE_BUILDS", str(tmp_path / "builds"))
    monkeypatch.setattr(devices, "QUICK", BRIEF)
    monkeypatch.setattr(stopwatch, "QUICK", BRIEF)
    monkeypatch.setattr(timings, "RATE_QUICK", replace(BRIEF, name="throughput, quick"))
    return tmp_path / "builds"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(drive, "say", lines.append)
    return lines


@pytest.fixture
def suites(tmp_path: Path) -> list[Suite]:
    return two_suites(write_images(tmp_path / "images", 20))


def test_a_bundle_is_built_once_and_measured(
    builds: Path,
    said: list[str],
    suites: list[Suite],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This machine has no TensorRT, so the artifact is a subject that only the device can ask."""
    bundle = lone_artifact(write_trt_bundle(tmp_path / "tensorrt-fp16"), [], [], elsewhere=True)
    assert not bundle.here
    onnx = artifact_subject(write_artifact(tmp_path / "fp32"))
    [found, beside] = devices.on_devices(
        [bundle, onnx], suites, ["local"], ONE_THREAD.model_copy(update={"batch_sizes": (8, 9)})
    )
    assert builds.read_text() == "10.3.0\n"
    assert (
        "local: building the engine of tensorrt-fp16 once, with tensorrt 10.3.0 for Orin; this may take long"
        in said
    )
    places = [
        n for n, line in enumerate(said) if "building the engine" in line or "logits of" in line
    ]
    assert "building" in said[places[0]], "before anything else is done"
    assert found.measured is not None
    for n, suite in enumerate(suites):
        [here] = predict_suite([onnx], suite)
        np.testing.assert_allclose(found.measured.logits[n], here, rtol=1e-5)
    [clock] = found.measured.result.model
    assert clock.provider == "tensorrt 10.3.0, Orin"
    assert found.measured.result.placement is None
    eight, nine = found.measured.result.rates
    assert eight.clock is not None
    assert nine.reason == "The file is made for 8 images at a time, not for 9. Use smaller batches."
    assert found.measured.result.built is not None
    assert found.measured.result.built.seconds >= 0
    assert beside.measured is not None
    assert beside.measured.result.built is None

    monkeypatch.setattr(write, "draw_picture", lambda _, path: path.touch())
    written = run_benchmark([found, beside], suites, tmp_path / "out", speed=SHORT)
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert read_report(tmp_path / "out") == written
    built = told["environment"]["devices"][0]["artifacts"]["r/tensorrt-fp16@local"]["built"]
    assert (built["builder"], built["gpu"], built["compute_capability"]) == (
        "tensorrt",
        "Orin",
        "8.7",
    )
    text = (tmp_path / "out" / "report.md").read_text()
    assert "builder tensorrt, version 10.3.0, gpu Orin, compute capability 8.7" in text
    rows = {row.subject: row for row in written.placements}
    assert rows["tensorrt-fp16@local"].nodes is None
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

    assert ready().startswith(
        "10.3.0: building the engine of artifact-x once, with tensorrt 10.3.0 for Orin"
    )
    assert ready() == "10.3.0: the engine of artifact-x was built here before, by tensorrt 10.3.0"
    monkeypatch.setenv("FAKE_TENSORRT", "10.4.0")
    assert ready().startswith(
        "10.4.0: building the engine of artifact-x once, with tensorrt 10.4.0 for Orin"
    )
    assert builds.read_text() == "10.3.0\n10.4.0\n"


@pytest.mark.parametrize(
    ("lacking", "message", "hint"),
    [
        ("tensorrt", "cannot load tensorrt (it is gone)", "pip install tensorrt"),
        ("cuda", "cannot load cuda.bindings (it is gone)", "pip install cuda-python"),
        ("gpu", "no NVIDIA GPU with a working driver", "nvidia-smi"),
    ],
)
def test_what_the_device_lacks_is_refused_before_anything_is_sent(
    builds: Path,
    suites: list[Suite],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lacking: str,
    message: str,
    hint: str,
) -> None:
    gone = "raise ImportError('it is gone')"
    if lacking == "tensorrt":
        (tmp_path / "planted" / "tensorrt.py").write_text(gone)
    elif lacking == "cuda":
        (tmp_path / "planted" / "cuda" / "bindings" / "runtime.py").write_text(gone)
    else:
        monkeypatch.setenv("FAKE_NO_GPU", "1")
    with pytest.raises(EdgekdError) as caught:
        devices.on_devices([subject(write_trt_bundle(tmp_path / "b"))], suites, ["local"], SHORT)
    assert caught.value.message.startswith("local: ")
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert not builds.exists()
    assert [path.name.split("-")[0] for path in (cache_root() / "device").iterdir()] == ["edgekd"]


@pytest.mark.parametrize(
    ("details", "message", "hint"),
    [
        (
            {
                "builder": "tensorrt",
                "builder_version": "10.3.0",
                "compute_capabilities": ["8.6", "8.9"],
            },
            "built for compute capability 8.6, 8.9, and this Orin has 8.7",
            "--compute-capability 8.7",
        ),
        (
            {"builder": "tensorrt", "builder_version": "11.1.0", "compute_capabilities": ["8.7"]},
            "built by tensorrt 11.1.0, and here is 10.3.0",
            "Install tensorrt 11.1.0 on the device",
        ),
        (
            {
                "builder": "tensorrt-rtx",
                "builder_version": "1.7.1",
                "compute_capabilities": ["8.7"],
            },
            "cannot load tensorrt_rtx",
            "pip install tensorrt-rtx-cu13",
        ),
    ],
)
@pytest.mark.usefixtures("builds")
def test_an_engine_for_another_device_is_refused_before_anything_is_sent(
    suites: list[Suite], tmp_path: Path, details: dict[str, object], message: str, hint: str
) -> None:
    (tmp_path / "planted" / "tensorrt_rtx.py").write_text("raise ImportError('it is gone')")
    with pytest.raises(EdgekdError) as caught:
        devices.on_devices(
            [subject(write_trt_bundle(tmp_path / "b", **details))], suites, ["local"], SHORT
        )
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert [path.name.split("-")[0] for path in (cache_root() / "device").iterdir()] == ["edgekd"]


@pytest.mark.usefixtures("builds")
def test_a_refused_model_is_one_sentence(
    suites: list[Suite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_REFUSAL", "no kernel for this layer")
    with pytest.raises(
        EdgekdError,
        match=r"tensorrt 10\.3\.0 cannot build the engine of b on this Orin: .*no kernel",
    ):
        devices.on_devices([subject(write_trt_bundle(tmp_path / "b"))], suites, ["local"], SHORT)


@pytest.mark.usefixtures("builds")
def test_an_engine_that_lies_in_the_folder_is_run_as_it_is(tmp_path: Path) -> None:
    """More images than it was built for are run in pieces, as the accuracy run needs it."""
    details = {"builder": "tensorrt", "builder_version": "10.3.0", "compute_capabilities": ["8.7"]}
    folder = write_trt_bundle(tmp_path / "ahead", **details)
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
    monkeypatch.setattr(trt_device, "find_gpu", lambda: Gpu("made up", "8.6"))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    folder = write_trt_bundle(tmp_path / "b")
    told: list[str] = []
    manifest = json.loads((folder / "artifact.json").read_text())
    built = trt_device.ready_engine(manifest, folder, told.append)
    assert built is not None
    assert (built["builder"], built["version"]) == ("tensorrt-rtx", trt.__version__)
    assert built["sha256"] == sha256_file(folder / "device.engine")
    assert json.loads((folder / "device.engine.json").read_text()) == built
    assert trt_device.ready_engine(manifest, folder, told.append) == built
    assert "was built here before" in told[-1]
    assert sorted(path.name for path in folder.iterdir()) == [
        "artifact.json", "device.engine", "device.engine.json", "model.onnx"
    ]  # fmt: skip


def test_an_engine_without_our_note_is_somebody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As build.sh leaves one in a bundle's folder: it is used, and not called ours."""
    monkeypatch.setattr(
        trt_device, "check_tensorrt", lambda details: ("tensorrt", None, Gpu("Orin", "8.7"))
    )
    folder = write_trt_bundle(tmp_path / "b")
    (folder / "device.engine").write_text("plan")
    told: list[str] = []
    assert (
        trt_device.ready_engine(
            json.loads((folder / "artifact.json").read_text()), folder, told.append
        )
        is None
    )
    assert told == ["b has an engine that was built here by other means"]


def subject(folder: Path) -> Subject:
    """Of an artifact that does not run here."""
    artifact = read_artifact(folder)

    def predict(images: object) -> np.ndarray:
        raise AssertionError("it was asked here")

    preprocess, classes = artifact.preprocess, artifact.classes
    return Subject(
        artifact.name, "r", "artifact", "fp16", preprocess, predict, classes, folder, here=False
    )
