from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_fakes import build, export, int8_files, pictures, write_onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from edgekd.core.errors import EdgekdError, NotHere
from edgekd.core.manifest import read_artifact
from edgekd.export import tensorrt as writer
from edgekd.export.graph import torch_logits
from edgekd.export.onnx.evaluate import EVALUATED_BY, onnx_evaluator
from edgekd.export.onnx.graphs import output_axis
from edgekd.export.quantize.tensorrt import TensorRtInt8, int8_scales
from edgekd.export.quantize.tensorrt_rules import findings
from edgekd.export.tensorrt import check_legal
from edgekd.targets import tensorrt
from edgekd.targets.session import open_session
from edgekd.targets.trt import machine as trt_machine
from edgekd.targets.trt.build import BuildError
from edgekd.targets.trt.machine import DEFAULT_AHEAD, Gpu, capabilities_of, choose, find_gpu

pytestmark = pytest.mark.usefixtures("graphs_once")

AHEAD = SimpleNamespace(
    __version__="1.7.1",
    ComputeCapability=SimpleNamespace(NONE=0, CURRENT=1, SM75=75, SM86=86, SM89=89, SM120=120),
)

FULL = SimpleNamespace(__version__="11.4.0")

ORIN = Gpu("Orin", "8.7")


def machine(
    patch: pytest.MonkeyPatch, gpu: Any = None, full: Any = None, ahead: Any = None
) -> None:
    """Let this machine have a GPU, TensorRT or TensorRT-RTX."""
    modules = {"tensorrt": full, "tensorrt-rtx": ahead}
    patch.setattr(trt_machine, "find_gpu", lambda: gpu)
    patch.setattr(trt_machine, "module", modules.__getitem__)


BOTH = {"gpu": ORIN, "full": FULL, "ahead": AHEAD}


@pytest.mark.parametrize(
    ("here", "wanted", "builder", "capabilities"),
    [
        ({}, (), None, ()),
        ({"gpu": ORIN}, (), None, ()),
        ({"gpu": ORIN, "full": FULL}, (), "tensorrt", ("8.7",)),
        ({"gpu": ORIN, "full": FULL}, ("8.6",), None, ("8.6",)),
        (BOTH, ("8.6",), "tensorrt-rtx", ("8.6",)),
        ({"full": FULL, "ahead": AHEAD}, (), "tensorrt-rtx", DEFAULT_AHEAD),
        ({"ahead": AHEAD}, ("8.9", "8.6", "8.9"), "tensorrt-rtx", ("8.9", "8.6")),
        ({"ahead": AHEAD}, ("8.6", "8.7"), None, ("8.6", "8.7")),
    ],
)
def test_the_choice_of_a_builder(
    monkeypatch: pytest.MonkeyPatch, here: dict, wanted: tuple, builder: str, capabilities: tuple
) -> None:
    machine(monkeypatch, **here)
    choice = choose(wanted, precision="int8")
    assert (choice.builder, choice.capabilities) == (builder, capabilities)
    assert choice.why


def test_capabilities_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, ahead=AHEAD)
    with pytest.raises(EdgekdError, match=r"no compute capability 5\.3"):
        choose(("5.3",), precision="int8")
    with pytest.raises(EdgekdError, match=r"no fp32 matrix product for compute capability 7\.5"):
        choose(("8.6", "7.5"), precision="fp32")
    assert choose(("7.5",), precision="fp16").builder == "tensorrt-rtx"
    assert capabilities_of(AHEAD) == ("7.5", "8.6", "8.9", "12.0")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trt") / "tensorrt-int8"
    with pytest.MonkeyPatch.context() as patch:
        machine(patch)
        patch.setattr(writer, "module", lambda name: None)
        export(build(), folder, "int8", target="tensorrt")
    return folder


def test_bundle_holds_what_a_device_needs_and_names_what_was_not_run(bundle: Path) -> None:
    artifact = read_artifact(bundle)
    assert list(artifact.files) == ["model.onnx", "build.sh", "build_engine.py"]
    names = {*artifact.files, "artifact.json", "labels.txt"}
    assert {path.name for path in bundle.iterdir()} == names
    assert (artifact.format, artifact.details["builder"]) == ("tensorrt", None)
    assert "its latency" in artifact.details["not_verified"]
    assert artifact.parity["run_by"] == EVALUATED_BY
    assert artifact.parity["cosine"] > 0.99
    assert artifact.quantization is not None
    assert artifact.quantization["ids"][1] == "image 1"
    assert artifact.quantization["calibrator"] == "mse", "steps are symmetric"


def test_failed_build_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> bytes:
        raise BuildError("no kernel for this layer")

    machine(monkeypatch, ahead=AHEAD)
    monkeypatch.setattr(writer, "module", lambda name: AHEAD)
    monkeypatch.setattr(writer, "parse", lambda trt, model: (None, None, []))
    monkeypatch.setattr(writer, "build", fail)
    with pytest.raises(EdgekdError, match=r"tensorrt-rtx 1\.7\.1 cannot build .*: no kernel"):
        export(build(), tmp_path / "a", "fp32", target="tensorrt")
    assert list(tmp_path.iterdir()) == []


FAKE_TRTEXEC = """#!/bin/sh
if [ "$1" = --help ]; then echo "  --stronglyTyped  keep the types"; exit 0; fi
for word in "$@"; do case "$word" in --saveEngine=*) echo plan > "${word#--saveEngine=}";; esac; done
echo "$@" > called
"""


def test_build_script_calls_trtexec_with_the_artifacts_shapes(bundle: Path, tmp_path: Path) -> None:
    folder, tool = shutil.copytree(bundle, tmp_path / "copy"), tmp_path / "trtexec"
    tool.write_text(FAKE_TRTEXEC)
    tool.chmod(0o755)
    environment = {**os.environ, "TRTEXEC": str(tool)}
    subprocess.run(["sh", folder / "build.sh"], env=environment, check=True)
    assert (folder / "called").read_text().split() == [
        "--onnx=model.onnx", "--saveEngine=device.engine.part", "--stronglyTyped", "--skipInference",
        "--minShapes=image:1x32x32x3", "--optShapes=image:1x32x32x3", "--maxShapes=image:32x32x32x3",
    ]  # fmt: skip
    assert (folder / "device.engine").read_text() == "plan\n"
    read_artifact(folder)  # the hashes of what was exported still hold
    export(build(), tmp_path / "b", "fp16", target="tensorrt", input="float")
    assert "--minShapes=image:1x3x32x32 " in (tmp_path / "b" / "build.sh").read_text()


def test_build_scripts_without_tensorrt_are_one_sentence(bundle: Path) -> None:
    environment = {**os.environ, "TRTEXEC": "/nowhere/trtexec"}
    words = ["sh", str(bundle / "build.sh")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "trtexec was not found" in done.stderr
    code = "import runpy, sys; sys.modules['tensorrt'] = None; sys.argv = ['build_engine.py']; "
    code += f"runpy.run_path({str(bundle / 'build_engine.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_bundle_is_verified_without_torch(bundle: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None
from pathlib import Path
import numpy as np
from edgekd.export.parity import runner
from edgekd.core.manifest import read_artifact
artifact = read_artifact(Path({str(bundle)!r}))
size = artifact.preprocess.size
print(runner(artifact.folder, artifact)[0](np.zeros((3, size, size, 3), np.uint8)).shape[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "3", done.stderr


DETAILS = {
    "builder": "tensorrt-rtx",
    "builder_version": "1.7.1.116",
    "compute_capabilities": ["8.6", "8.9"],
}


def test_engine_of_another_gpu_or_version_is_named() -> None:
    fits = Gpu("RTX 3080", "8.6")
    tensorrt.refuse_mismatch(DETAILS, fits, "1.7.1.116")
    with pytest.raises(NotHere, match=r"compute capability 8\.6, 8\.9, and this Orin has 8\.7"):
        tensorrt.refuse_mismatch(DETAILS, ORIN, "1.7.1.116")
    with pytest.raises(EdgekdError, match=r"tensorrt-rtx 1\.7\.1\.116, and here is 1\.8\.0"):
        tensorrt.refuse_mismatch(DETAILS, fits, "1.8.0")


def test_what_cannot_run_here_is_named_and_never_replaced(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotHere, match="holds no engine yet") as caught:
        open_session(bundle)
    assert "sh build.sh" in caught.value.hint
    with pytest.raises(EdgekdError, match="no providers"):
        open_session(bundle, provider="cuda")
    folder = shutil.copytree(bundle, tmp_path / "copy")
    (folder / "device.engine").write_bytes(b"plan")
    monkeypatch.setattr(tensorrt, "runtime", lambda name: None)
    with pytest.raises(NotHere, match="needs the Python package tensorrt"):
        open_session(folder)
    monkeypatch.setattr(tensorrt, "runtime", lambda name: FULL)
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: None)
    with pytest.raises(NotHere, match="needs an NVIDIA GPU"):
        open_session(folder)
    export(build(), tmp_path / "a", "fp32")
    for provider in ("cuda", "tensorrt", "tensorrt-rtx"):
        with pytest.raises(NotHere, match="This build of ONNX Runtime has no"):
            open_session(tmp_path / "a", provider=provider)
    with pytest.raises(EdgekdError) as caught:
        open_session(tmp_path / "a", provider="cudaa")
    assert '"cuda"' in caught.value.hint


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_engine_on_a_gpu(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    if find_gpu() is None:
        pytest.skip("there is no NVIDIA GPU")
    export(build(), tmp_path / "a", precision, target="tensorrt")
    session = open_session(tmp_path / "a")
    reference = torch_logits(build(), pictures(32, seed=5))
    for batch in (1, 32, 5, 1):
        logits = session.run(pictures(32, seed=5)[:batch])
        assert np.abs(logits - reference[:batch]).max() < 0.05 * np.ptp(reference)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    return int8_files(TensorRtInt8(), tmp_path_factory.mktemp("scheme"))


def test_logits_stay_close(files: tuple[Path, Path, dict]) -> None:
    images = pictures(200, seed=1)
    reference, candidate = onnx_evaluator(files[0])(images), onnx_evaluator(files[1])(images)
    assert not np.array_equal(reference, candidate), "nothing was quantised"
    centred = reference - reference.mean(axis=0)
    assert np.square(candidate - reference).mean() < 0.01 * np.square(centred).mean()


def test_graph_is_what_tensorrt_takes(files: tuple[Path, Path, dict]) -> None:
    model = onnx.load(files[1])
    assert findings(model) == []
    assert {entry.key: entry.value for entry in model.metadata_props} == {"k": "v"}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pairs = [one for one in model.graph.node if one.op_type.lower().endswith("quantizelinear")]
    assert {str(constants[one.input[2]].dtype) for one in pairs} == {"int8"}
    # A float32 layer would be slow.
    assert {str(constants[one.input[1]].dtype) for one in pairs} == {"float16"}
    writer = {name: one.op_type for one in model.graph.node for name in one.output}
    [add] = [one for one in model.graph.node if one.op_type == "Add" and "shift" not in one.input]
    assert [writer[name] for name in add.input] == ["DequantizeLinear"] * 2
    first = model.graph.node[[one.op_type for one in model.graph.node].index("Cast")]
    assert first.input[0] == "image"
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    described = files[2]
    assert described["quantized_layers"] == 4  # stem, depthwise, pointwise, head
    assert len(described["float_layers"]) == 2  # squeeze and excite
    assert described["calibration_images"] == 64
    # Weights are rounded to their own channel's scale.
    before = {one.name: numpy_helper.to_array(one) for one in onnx.load(files[0]).graph.initializer}
    weight = before["backbone.pointwise.weight"]
    scale = constants["backbone.pointwise.weight/scales"].astype(np.float64)
    np.testing.assert_allclose(scale, np.abs(weight).max(axis=(1, 2, 3)) / 127, rtol=1e-3)
    restored = constants["backbone.pointwise.weight/integers"] * scale[:, None, None, None]
    assert (np.abs(restored - weight).max(axis=(1, 2, 3)) <= 0.55 * scale).all()


def test_a_scaled_residual_beside_a_quantized_reader_stays_in_float(tmp_path: Path) -> None:
    """ConvNeXt's: the sum's one side goes into the next depthwise layer too, its other side comes from a product."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 1)
            self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.gamma = nn.Parameter(torch.rand(8, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            y = nn.functional.gelu(self.depthwise(x))
            return (x + self.gamma * self.head(y)).mean((2, 3))

    fp32 = write_onnx(Scaled(), 8, tmp_path / "a")
    assert TensorRtInt8().quantize(fp32, tmp_path / "b", pictures(32))["quantized_layers"] == 4
    assert findings(onnx.load(tmp_path / "b")) == []


def test_scales_by_hand() -> None:
    scales = int8_scales(np.array([127.0, 12.7, 0.0, 1e-7], np.float32))
    assert scales.dtype == np.float16
    np.testing.assert_allclose(scales.astype(np.float64), [1, 0.1, 2**-20, 2**-20], rtol=1e-3)


def test_what_tensorrt_cannot_take_is_named(files: tuple[Path, Path, dict], tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match=r"activation wide reaches 7e\+04"):
        TensorRtInt8().check_extremes({"wide": (np.float32(-70000), np.float32(1))})
    with pytest.raises(EdgekdError, match="alike"):
        TensorRtInt8().quantize(files[0], tmp_path / "x.onnx", np.repeat(pictures(1), 8, axis=0))
    onnx.save(illegal("asymmetric activation"), tmp_path / "model.onnx")
    with pytest.raises(EdgekdError, match="y_Q: Its zero point is not 0"):
        check_legal(tmp_path / "model.onnx")
    with pytest.raises(EdgekdError, match='"8"'):
        export(build(), tmp_path / "a", "fp32", target="tensorrt", compute_capability="8,6")


def legal() -> ModelProto:
    """uint8 image → normalisation → quantized Conv → residual Add of two quantized maps → quantized Gemm."""
    rng, make = np.random.default_rng(0), helper.make_node

    def pair(name: str) -> list[NodeProto]:
        return [
            make("QuantizeLinear", [name, "s", "z"], [f"{name}_q"], name=f"{name}_Q"),
            make("DequantizeLinear", [f"{name}_q", "s", "z"], [f"{name}_d"], name=f"{name}_DQ"),
        ]

    def weight(name: str) -> NodeProto:
        inputs = [name, f"{name}_s", f"{name}_z"]
        return make("DequantizeLinear", inputs, [f"{name}_d"], name=f"{name}_DQ", axis=0)

    nodes = [
        weight("w"),
        weight("v"),
        make("Cast", ["image"], ["x"], name="cast", to=TensorProto.FLOAT),
        *pair("x"),
        make("Conv", ["x_d", "w_d", "b"], ["y"], name="conv"),
        *pair("y"),
        make("Add", ["x_d", "y_d"], ["r"], name="add"),
        make("ReduceMean", ["r", "axes"], ["f"], name="mean", keepdims=0),
        *pair("f"),
        make("Gemm", ["f_d", "v_d", "c"], ["logits"], name="head", transB=1),
    ]
    constants = {
        "s": np.float32(0.02), "z": np.int8(0), "axes": np.array([2, 3]),
        "w": rng.integers(-127, 128, (4, 4, 1, 1), dtype=np.int8), "b": np.zeros(4, np.float32),
        "w_s": np.full(4, 0.01, np.float32), "w_z": np.zeros(4, np.int8),
        "v": rng.integers(-127, 128, (3, 4), dtype=np.int8), "c": np.zeros(3, np.float32),
        "v_s": np.full(3, 0.01, np.float32), "v_z": np.zeros(3, np.int8),
    }  # fmt: skip
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 4, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "legal", [image], [logits], stored)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


Edit = Callable[[ModelProto], None]


def node(model: ModelProto, name: str) -> NodeProto:
    return next(item for item in model.graph.node if item.name == name)


def put(**values: Any) -> Edit:
    """Set or add constants."""

    def edit(model: ModelProto) -> None:
        for name, value in values.items():
            for known in [one for one in model.graph.initializer if one.name == name]:
                model.graph.initializer.remove(known)
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))

    return edit


def wire(*names: str, place: int, to: str) -> Edit:
    """Let the nodes `names` read the tensor `to`."""

    def edit(model: ModelProto) -> None:
        for name in names:
            node(model, name).input[place] = to

    return edit


def insert(
    before: str, op: str, inputs: list[str], output: str, name: str, **attributes: Any
) -> Edit:
    """Put a node where its inputs exist already."""

    def edit(model: ModelProto) -> None:
        position = [item.name for item in model.graph.node].index(before)
        made = helper.make_node(op, inputs, [output], name=name, **attributes)
        model.graph.node.insert(position, made)

    return edit


def set_axis(*names: str, axis: int) -> Edit:
    def edit(model: ModelProto) -> None:
        for name in names:
            del node(model, name).attribute[:]
            node(model, name).attribute.append(helper.make_attribute("axis", axis))

    return edit


def newer_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 26


def without_zero_point(model: ModelProto) -> None:
    """Then ONNX means uint8."""
    for name in ("x_Q", "x_DQ"):
        del node(model, name).input[2]


def image_as_integers(model: ModelProto) -> None:
    """The uint8 image taken for already quantized values."""
    put(zu=np.uint8(0))(model)
    node(model, "x_DQ").input[:] = ["image", "s", "zu"]


def weight_scale(*values: float) -> Edit:
    return put(w_s=np.array(values, np.float32))


INT8_BIAS = insert("conv", "DequantizeLinear", ["b8", "s", "z"], "b_d", "b_DQ")

POOL = {"kernel_shape": [1, 1]}

ILLEGAL: dict[str, tuple[str, str, list[Edit]]] = {
    "newer opset": ("opset", "opset", [newer_opset]),
    "ConvInteger": ("operator", "integer", [insert("conv", "ConvInteger", ["x_q", "w"], "u", "integer")]),
    "foreign domain": (
        "operator", "foreign", [insert("conv", "QGemm", ["f"], "u", "foreign", domain="com.microsoft")]),
    "float64": ("double", "wide", [insert("conv", "Cast", ["x"], "u", "wide", to=TensorProto.DOUBLE)]),
    "image reshaped before the cast": ("uint8-input", "reshape", [
        put(shape=np.array([-1, 4, 8, 8])), insert("cast", "Reshape", ["image", "shape"], "flat", "reshape"),
        wire("cast", place=0, to="flat")]),
    "image read as int8": ("uint8-input", "x_DQ", [image_as_integers]),
    "image read as int8, its type": ("type", "x_DQ", [image_as_integers]),
    "Q without DQ": (
        "quantize-without-dequantize", "x_Q", [insert("conv", "MaxPool", ["x_q"], "p", "pool", **POOL)]),
    "DQ without Q": ("dequantize-without-quantize", "x_DQ", [
        insert("x_DQ", "MaxPool", ["x_q"], "p", "pool", **POOL), wire("x_DQ", place=0, to="p")]),
    "uint8 activation": ("type", "x_Q", [put(zu=np.uint8(0)), wire("x_Q", "x_DQ", place=2, to="zu")]),
    "no zero point": ("type", "x_Q", [without_zero_point]),
    "asymmetric activation": (
        "zero-point", "y_Q", [put(z1=np.int8(-5)), wire("y_Q", "y_DQ", place=2, to="z1")]),
    "asymmetric weight": ("zero-point", "w_DQ", [put(w_z=np.array([0, 0, 3, 0], np.int8))]),
    "one zero point for four scales": ("zero-point", "w_DQ", [put(w_z=np.int8(0))]),
    "computed scale": ("scale", "y_Q", [
        insert("y_Q", "ReduceMax", ["y"], "dynamic", "range", keepdims=0),
        wire("y_Q", "y_DQ", place=1, to="dynamic")]),
    "scale 0": ("scale", "w_DQ", [weight_scale(0.01, 0, 0.01, 0.01)]),
    "negative scale": ("scale", "w_DQ", [weight_scale(0.01, -0.01, 0.01, 0.01)]),
    "infinite scale": ("scale", "w_DQ", [weight_scale(0.01, np.inf, 0.01, 0.01)]),
    "blocks": ("scale", "w_DQ", [
        put(w_s=np.full((4, 2, 1, 1), 0.01, np.float32), w_z=np.zeros((4, 2, 1, 1), np.int8))]),
    "three scales for four channels": (
        "axis", "w_DQ", [weight_scale(0.01, 0.01, 0.01), put(w_z=np.zeros(3, np.int8))]),
    "input channels": ("axis", "w_DQ", [set_axis("w_DQ", axis=1)]),
    "per-channel activation": ("per-channel-activation", "x_Q", [
        put(s4=np.full(4, 0.02, np.float32), z4=np.zeros(4, np.int8)), wire("x_Q", "x_DQ", place=1, to="s4"),
        wire("x_Q", "x_DQ", place=2, to="z4"), set_axis("x_Q", "x_DQ", axis=1)]),
    "float input": ("half-quantized", "conv", [wire("conv", place=0, to="x")]),
    "int32 bias": ("bias", "conv", [
        put(bi=np.zeros(4, np.int32), bs=np.full(4, 1e-4, np.float32), bz=np.zeros(4, np.int32)),
        insert("conv", "DequantizeLinear", ["bi", "bs", "bz"], "b_d", "b_DQ", axis=0),
        wire("conv", place=2, to="b_d")]),
    "int8 bias": ("bias", "conv", [put(b8=np.zeros(4, np.int8)), INT8_BIAS, wire("conv", place=2, to="b_d")]),
    "int8 bias by Add": (
        "bias", "add", [put(b8=np.zeros((1, 4, 1, 1), np.int8)), INT8_BIAS, wire("add", place=0, to="b_d")]),
    "half a residual": ("residual", "add", [wire("add", place=1, to="y")]),
}  # fmt: skip


def illegal(case: str) -> ModelProto:
    model = legal()
    for edit in ILLEGAL[case][2]:
        edit(model)
    return model


@pytest.mark.parametrize("case", ILLEGAL)
def test_each_rule_finds_its_graph(case: str) -> None:
    assert findings(legal()) == []
    assert ILLEGAL[case][:2] in {(one.rule, one.node) for one in findings(illegal(case))}


@pytest.mark.parametrize(
    ("op", "transposed", "axis"),
    [("Conv", 0, 0), ("ConvTranspose", 0, 1), ("Gemm", 0, 1), ("Gemm", 1, 0), ("MatMul", 0, 1)],
)
def test_axis_of_output_channels(op: str, transposed: int, axis: int) -> None:
    attributes = {"transB": transposed} if transposed else {}
    assert output_axis(helper.make_node(op, ["x", "w"], ["y"], **attributes), 2) == axis


NVIDIA_REFUSES = (
    "ConvInteger", "foreign domain", "image reshaped before the cast", "image read as int8", "uint8 activation",
    "asymmetric activation", "asymmetric weight", "one zero point for four scales", "scale 0", "negative scale",
    "blocks", "three scales for four channels", "int32 bias",
)  # fmt: skip


@pytest.mark.parametrize("case", [None, *NVIDIA_REFUSES])
def test_nvidias_parser_refuses_what_the_rules_refuse(case: str | None) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from edgekd.targets.trt.build import parse

    model = illegal(case) if case else legal()
    assert bool(parse(trt, model.SerializeToString())[2]) == bool(case)
