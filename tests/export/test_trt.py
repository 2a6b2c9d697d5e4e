"""The TensorRT target from the choice of a builder to the session, as far as a machine without a GPU goes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from test_export import build, export, pictures
from test_trt_rules import illegal

from edgekd.core.console import err
from edgekd.core.errors import EdgekdError, NotHere
from edgekd.core.manifest import read_artifact
from edgekd.export import tensorrt as writer
from edgekd.export.graph import torch_logits
from edgekd.export.tensorrt import EVALUATED_BY, check_legal
from edgekd.targets import tensorrt, trt_builders
from edgekd.targets.session import feed_for, open_session
from edgekd.targets.tensorrt import check_batch, cuda_call
from edgekd.targets.trt_build import BuildError
from edgekd.targets.trt_builders import DEFAULT_AHEAD, Gpu, capabilities_of, choose, find_gpu

AHEAD = SimpleNamespace(
    __version__="1.7.1",
    ComputeCapability=SimpleNamespace(NONE=0, CURRENT=1, SM75=75, SM86=86, SM89=89, SM120=120),
)
FULL = SimpleNamespace(__version__="11.4.0")
ORIN = Gpu("Orin", "8.7")


def machine(
    monkeypatch: pytest.MonkeyPatch,
    *,
    gpu: Gpu | None = None,
    full: Any | None = None,
    ahead: Any | None = None,
) -> None:
    monkeypatch.setattr(trt_builders, "find_gpu", lambda: gpu)
    monkeypatch.setattr(
        trt_builders, "module", lambda name: {"tensorrt": full, "tensorrt-rtx": ahead}[name]
    )


@pytest.mark.parametrize(
    ("here", "wanted", "builder", "capabilities", "why"),
    [
        ({}, (), None, (), "neither a GPU nor TensorRT-RTX"),
        ({"gpu": ORIN}, (), None, (), "tensorrt is not installed beside this Orin"),
        ({"gpu": ORIN, "full": FULL}, (), "tensorrt", ("8.7",), "this machine has it and a Orin"),
        ({"gpu": ORIN, "full": FULL}, ("8.6",), None, ("8.6",), "this GPU is 8.7, not 8.6"),
        (
            {"gpu": ORIN, "full": FULL, "ahead": AHEAD},
            ("8.6",),
            "tensorrt-rtx",
            ("8.6",),
            "without a GPU for 8.6",
        ),
        (
            {"full": FULL, "ahead": AHEAD},
            (),
            "tensorrt-rtx",
            DEFAULT_AHEAD,
            "the default; --compute-capability",
        ),
        ({"ahead": AHEAD}, ("8.9", "8.6", "8.9"), "tensorrt-rtx", ("8.9", "8.6"), "for 8.9, 8.6"),
        (
            {"ahead": AHEAD},
            ("8.6", "8.7"),
            None,
            ("8.6", "8.7"),
            "cannot build for 8.7 (Jetson Orin)",
        ),
    ],
)
def test_choice_and_its_reason(
    monkeypatch: pytest.MonkeyPatch,
    here: dict,
    wanted: tuple,
    builder: str | None,
    capabilities: tuple,
    why: str,
) -> None:
    machine(monkeypatch, **here)
    choice = choose(wanted, precision="int8")
    assert (choice.builder, choice.capabilities) == (builder, capabilities)
    assert why in choice.why


def test_capabilities_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, ahead=AHEAD)
    with pytest.raises(EdgekdError, match=r"no compute capability 5\.3"):
        choose(("5.3",), precision="int8")
    with pytest.raises(EdgekdError, match=r"no fp32 matrix product for compute capability 7\.5"):
        choose(("8.6", "7.5"), precision="fp32")
    assert choose(("7.5",), precision="fp16").builder == "tensorrt-rtx"
    assert capabilities_of(AHEAD) == ("7.5", "8.6", "8.9", "12.0")


def test_doctor_says_who_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    assert trt_builders.describe().startswith("bundles to build on the device (there is neither")
    machine(monkeypatch, ahead=AHEAD)
    assert trt_builders.describe().startswith(
        "engines by tensorrt-rtx 1.7.1 (it builds without a GPU"
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trt") / "tensorrt-int8"
    with pytest.MonkeyPatch.context() as patch:
        machine(patch)
        patch.setattr(writer, "module", lambda name: None)
        export(build(), folder, "int8", target="tensorrt")
    return folder


def test_bundle_holds_what_a_device_needs_and_says_what_was_not_run(bundle: Path) -> None:
    artifact = read_artifact(bundle)
    assert list(artifact.files) == ["model.onnx", "build.sh", "build_engine.py"]
    assert sorted(path.name for path in bundle.iterdir()) == sorted(
        [*artifact.files, "artifact.json", "labels.txt"]
    )
    assert artifact.format == "tensorrt"
    assert artifact.details["builder"] is None
    assert artifact.details["checked"] == ["edgekd's rules"]
    assert "its latency" in artifact.details["not_verified"]
    assert artifact.parity["run_by"] == EVALUATED_BY
    assert artifact.parity["cosine"] > 0.99
    assert artifact.quantization is not None
    assert artifact.quantization["ids"][1] == "image 1"
    assert artifact.quantization["calibrator"] == "mse", (
        "symmetric steps: this target's own default"
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_float_bundles_compute_the_student(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str
) -> None:
    machine(monkeypatch)
    artifact = export(build(), tmp_path / "a", precision, target="tensorrt")
    assert artifact.parity["passed"] is True
    images = pictures(8, seed=3)
    candidate = writer.onnx_evaluator(tmp_path / "a" / "model.onnx")(images)
    np.testing.assert_allclose(
        candidate, torch_logits(build(), images), atol=1e-5 if precision == "fp32" else 5e-3
    )


def test_one_line_says_the_choice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, ahead=AHEAD)
    monkeypatch.setattr(writer, "module", lambda name: None)
    monkeypatch.setattr(err, "width", 300)
    options = {"compute_capability": "8.7"}
    artifact = export(build(), tmp_path / "a", "fp32", target="tensorrt", **options)
    line = capsys.readouterr().err
    assert (
        "a bundle to build on the device, because TensorRT-RTX 1.7.1 cannot build for 8.7 (Jetson Orin)"
        in line
    )
    assert artifact.details["compute_capabilities"] == ["8.7"]


def test_misspelt_capability_and_foreign_option(tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match='"8" is no compute capability'):
        export(
            build(),
            tmp_path / "a",
            "fp32",
            target="tensorrt",
            compute_capability="8,6",
        )
    with pytest.raises(EdgekdError, match="onnxruntime has no option compute_capability"):
        export(build(), tmp_path / "a", "fp32", compute_capability="8.6")
    assert list(tmp_path.iterdir()) == []


def test_failed_build_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(monkeypatch, ahead=AHEAD)
    monkeypatch.setattr(writer, "module", lambda name: AHEAD)
    monkeypatch.setattr(writer, "parse", lambda trt, model: (None, None, []))

    def fail(*_: Any, **__: Any) -> bytes:
        raise BuildError("no kernel for this layer")

    monkeypatch.setattr(writer, "build", fail)
    with pytest.raises(
        EdgekdError, match=r"tensorrt-rtx 1\.7\.1 cannot build the engine for 8\.6, .*: no kernel"
    ):
        export(build(), tmp_path / "a", "fp32", target="tensorrt")
    assert list(tmp_path.iterdir()) == []


def test_illegal_graph_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    onnx.save(illegal("asymmetric activation"), tmp_path / "model.onnx")
    with pytest.raises(EdgekdError, match="would not take this model") as caught:
        check_legal(tmp_path / "model.onnx")
    assert "y_Q: Its zero point is not 0" in caught.value.message


FAKE_TRTEXEC = """#!/bin/sh
if [ "$1" = --help ]; then echo "  --stronglyTyped  keep the types"; exit 0; fi
for word in "$@"; do case "$word" in --saveEngine=*) echo plan > "${word#--saveEngine=}";; esac; done
echo "$@" > called
"""


def test_build_script_calls_trtexec_with_the_artifacts_shapes(bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "copy")
    tool = tmp_path / "trtexec"
    tool.write_text(FAKE_TRTEXEC)
    tool.chmod(0o755)
    done = subprocess.run(
        ["sh", folder / "build.sh"], env={**os.environ, "TRTEXEC": str(tool)}, check=True
    )
    assert done.returncode == 0
    words = (folder / "called").read_text().split()
    assert words[:4] == [
        "--onnx=model.onnx",
        "--saveEngine=device.engine.part",
        "--stronglyTyped",
        "--skipInference",
    ]
    assert words[4:] == [
        "--minShapes=image:1x32x32x3",
        "--optShapes=image:1x32x32x3",
        "--maxShapes=image:32x32x32x3",
    ]
    assert (folder / "device.engine").read_text() == "plan\n"
    read_artifact(folder)  # the hashes of what was exported still hold


def test_build_scripts_without_tensorrt_are_one_sentence(bundle: Path) -> None:
    environment = {**os.environ, "TRTEXEC": "/nowhere/trtexec"}
    done = subprocess.run(
        ["sh", bundle / "build.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "trtexec was not found" in done.stderr
    code = f"""
import runpy, sys
sys.modules["tensorrt"] = None
sys.argv = ["build_engine.py"]
runpy.run_path({str(bundle / "build_engine.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_bundle_without_engine_does_not_run_here(bundle: Path) -> None:
    with pytest.raises(NotHere, match="holds no engine yet") as caught:
        open_session(bundle)
    assert "sh build.sh" in caught.value.hint


def test_bundle_is_verified_without_torch(bundle: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None
from pathlib import Path
import numpy as np
from edgekd.artifacts.verify import _runner
from edgekd.core.manifest import read_artifact
artifact = read_artifact(Path({str(bundle)!r}))
size = artifact.preprocess.size
print(_runner(artifact.folder, artifact)(np.zeros((3, size, size, 3), np.uint8)).shape[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "3", done.stderr


DETAILS = {
    "builder": "tensorrt-rtx",
    "builder_version": "1.7.1.116",
    "compute_capabilities": ["8.6", "8.9"],
}


def test_engine_of_another_gpu_or_version_is_named() -> None:
    tensorrt.refuse_mismatch(DETAILS, Gpu("RTX 3080", "8.6"), "1.7.1.116")
    with pytest.raises(
        NotHere, match=r"built for compute capability 8\.6, 8\.9, and this Orin has 8\.7"
    ):
        tensorrt.refuse_mismatch(DETAILS, ORIN, "1.7.1.116")
    with pytest.raises(
        EdgekdError, match=r"built by tensorrt-rtx 1\.7\.1\.116, and here is 1\.8\.0"
    ):
        tensorrt.refuse_mismatch(DETAILS, Gpu("RTX 3080", "8.6"), "1.8.0")


def test_engine_without_its_package_or_without_a_gpu(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(bundle, tmp_path / "copy")
    (folder / "device.engine").write_bytes(b"plan")
    monkeypatch.setattr(tensorrt, "_module", lambda name: None)
    with pytest.raises(NotHere, match="needs the Python package tensorrt"):
        open_session(folder)
    monkeypatch.setattr(tensorrt, "_module", lambda name: FULL)
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: None)
    with pytest.raises(NotHere, match="needs an NVIDIA GPU"):
        open_session(folder)


def test_batch_that_was_not_built() -> None:
    check_batch(32, 32)
    with pytest.raises(EdgekdError, match="batches of up to 32, not 33"):
        check_batch(33, 32)


def test_cuda_answers() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    from cuda.bindings import runtime

    good = runtime.cudaError_t.cudaSuccess
    assert cuda_call((good,)) is None
    assert cuda_call((good, 7)) == 7
    with pytest.raises(EdgekdError, match="cudaErrorMemoryAllocation"):
        cuda_call((runtime.cudaError_t.cudaErrorMemoryAllocation, None))


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "tensorrt-rtx"])
def test_provider_that_is_not_there_is_never_replaced(provider: str, tmp_path: Path) -> None:
    export(build(), tmp_path / "a", "fp32")
    with pytest.raises(NotHere, match="This build of ONNX Runtime has no"):
        open_session(tmp_path / "a", provider=provider)
    with pytest.raises(EdgekdError, match='no provider "cudaa"') as caught:
        open_session(tmp_path / "a", provider="cudaa")
    assert caught.value.hint == 'Did you mean "cuda"?'


def test_provider_of_an_engine_is_refused(bundle: Path) -> None:
    with pytest.raises(EdgekdError, match="has one runtime and no providers"):
        open_session(bundle, provider="cuda")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_tensorrt_rtx_builds_a_real_engine(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    if find_gpu() is not None:
        pytest.skip("with a GPU the engine is built for it")
    options = {"compute_capability": "8.6"}
    artifact = export(build(), tmp_path / "a", precision, target="tensorrt", **options)
    assert next(iter(artifact.files)) == "model.engine"
    assert artifact.details["builder"] == "tensorrt-rtx"
    assert artifact.details["compute_capabilities"] == ["8.6"]
    assert len(artifact.details["checked"]) == 2
    assert artifact.parity["run_by"] == EVALUATED_BY
    assert json.loads((tmp_path / "a" / "artifact.json").read_text())["details"]["max_batch"] == 32
    with pytest.raises(NotHere, match="needs an NVIDIA GPU"):
        open_session(tmp_path / "a")


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_engine_on_a_gpu_computes_the_student(
    tmp_path: Path, precision: str, cuda_graph: bool
) -> None:
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    if find_gpu() is None:
        pytest.skip("there is no NVIDIA GPU")
    export(build(), tmp_path / "a", precision, target="tensorrt")
    data = read_artifact(tmp_path / "a").model_dump(mode="json")
    engine, _ = tensorrt.open_engine(
        data["details"], tmp_path / "a", feed=feed_for(data), cuda_graph=cuda_graph
    )
    reference = torch_logits(build(), pictures(32, seed=5))
    for batch in (1, 32, 5, 1):
        logits, timing = engine.timed(pictures(32, seed=5)[:batch])
        assert np.abs(logits - reference[:batch]).max() < 0.05 * np.ptp(reference)
        assert min(timing.h2d_ms, timing.compute_ms, timing.d2h_ms) > 0
