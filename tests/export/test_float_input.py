"""Files that take floats instead of pixels: the same answers, and nothing of the normalisation inside."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import test_embedding as embedding
import torch
import trt_fakes
from onnx import TensorProto, helper
from test_export import CLASSES, PREPROCESS, build, export, pictures
from torch import nn

from edgekd.cli import main
from edgekd.cli.doctor import target_lines
from edgekd.configs.export import ExportConfig
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import Artifact, read_artifact
from edgekd.data.images import decode
from edgekd.export.graph import Deployable, torch_logits
from edgekd.export.onnx_graph import with_float_input
from edgekd.export.quantize.search import AccuracyBudget
from edgekd.targets import profiles
from edgekd.targets.agent.model import open_model
from edgekd.targets.feed import feed_of, normalising
from edgekd.targets.registry import artifact_name
from edgekd.targets.session import open_session
from edgekd.targets.tensorrt import Engine

ASSETS = Path(os.environ.get("EDGEKD_ASSETS", Path(__file__).parents[3] / "shared" / "assets"))
IMAGES = pictures(40, seed=7)


class Tokens(nn.Module):
    """Asks for the batch size, as a transformer's class token does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, stride=8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.conv(x).flatten(2).transpose(1, 2)  # [B, 16, 8]
        return torch.cat([self.token.expand(len(x), -1, -1), maps.relu()], dim=1).mean(1)


def float_file(
    folder: Path, precision: str = "fp32", target: str = "onnxruntime", **changes: Any
) -> Artifact:
    model = changes.pop("model", None) or build()
    return export(model, folder, precision, target=target, input="float", **changes)


def by_hand(images: np.ndarray) -> np.ndarray:
    """What other programs do, in float64."""
    values = (images.astype(np.float64) / 255 - np.array(PREPROCESS.mean)) / np.array(
        PREPROCESS.std
    )
    return values.transpose(0, 3, 1, 2).astype(np.float32)


def share_of_range(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.ptp(expected))


def test_normalising_by_hand() -> None:
    image = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    image[0, 0, 1] = (255, 51, 102)
    found = normalising((0.5, 0.2, 0.4), (0.5, 0.1, 0.2))(image)
    assert (found.shape, found.dtype) == ((1, 3, 2, 2), np.float32)
    np.testing.assert_allclose(found[0, :, 0, 1], (1, 0, 0), atol=1e-6)
    np.testing.assert_allclose(found[0, :, 1, 1], (-1, -2, -2), atol=1e-6)
    np.testing.assert_allclose(
        normalising(PREPROCESS.mean, PREPROCESS.std)(IMAGES[::2]), by_hand(IMAGES[::2]), atol=2e-6
    )
    with pytest.raises(EdgekdError, match="takes image, which is not fed here"):
        feed_of({"dtype": "image"}, {})


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixels") / "a"
    export(build(), folder, "fp32")
    return folder


@pytest.fixture(scope="module")
def fp32(pixels: Path) -> Path:
    float_file(pixels.with_name("b"), fp32_path=pixels / "model.onnx")
    return pixels.with_name("b")


def test_the_file_takes_what_other_programs_feed(fp32: Path) -> None:
    artifact = read_artifact(fp32)
    [taken] = artifact.inputs
    assert (taken.name, taken.dtype, taken.shape) == ("image", "float32", ("batch", 3, 32, 32))
    assert taken.layout.startswith("NCHW RGB, normalised")
    assert artifact.input == "float"
    model = onnx.load(fp32 / "model.onnx")
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu", "ReduceMean", "Gemm"]
    assert {tensor.name for tensor in model.graph.initializer}.isdisjoint({"scale", "shift"})
    runtime = onnxruntime.InferenceSession(fp32 / "model.onnx", providers=["CPUExecutionProvider"])
    assert (runtime.get_inputs()[0].type, runtime.get_inputs()[0].shape) == (
        "tensor(float)",
        ["batch", 3, 32, 32],
    )
    expected = torch_logits(build(), IMAGES)
    assert share_of_range(runtime.run(None, {"image": by_hand(IMAGES)})[0], expected) < 1e-5


def test_sessions_take_pixels_all_the_same(fp32: Path, pixels: Path) -> None:
    session = open_session(fp32, threads=1)
    assert share_of_range(session.run(IMAGES), open_session(pixels, threads=1).run(IMAGES)) < 1e-5
    placement = session.placement()
    assert placement is not None
    assert sum(placement.nodes["CPUExecutionProvider"].values()) > 0
    with pytest.raises(EdgekdError, match=r"takes uint8 \[B, 32, 32, 3\], not float32"):
        session.run(by_hand(IMAGES))  # type: ignore[arg-type]


def test_real_images_get_the_same_logits(fp32: Path, pixels: Path) -> None:
    if not ASSETS.is_dir():
        pytest.skip("the shared assets are not here")
    files = sorted(ASSETS.glob("pacs/*/*/*.jpg"))[::40][:48]
    assert len(files) == 48
    images = np.stack([PREPROCESS.pixels(decode(path)) for path in files])
    found, expected = (open_session(folder, threads=1).run(images) for folder in (fp32, pixels))
    assert share_of_range(found, expected) < 1e-5


def test_the_documented_lines_feed_it(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    [code] = [
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "planes" in block
    ]
    (tmp_path / "onnxruntime-int8-float-input").symlink_to(fp32)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert (
        share_of_range(names["logits"], open_session(fp32, threads=1).run(names["pixels"][None]))
        < 1e-5
    )


def test_the_device_agent_gives_the_same_answers(fp32: Path) -> None:
    model = open_model(fp32, threads=1)
    np.testing.assert_array_equal(
        model.run(IMAGES[:1]), open_session(fp32, threads=1).run(IMAGES[:1])
    )
    placement = model.placement()
    assert placement is not None
    assert placement.nodes


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_pass_parity_and_are_the_same_network(
    pixels: Path, tmp_path: Path, target: str, precision: str
) -> None:
    base = pixels / "model.onnx"
    plain = export(build(), tmp_path / "plain", precision, target=target, fp32_path=base)
    floats = float_file(tmp_path / "floats", precision, target, fp32_path=base)
    assert floats.parity["passed"] is True
    assert floats.quantization == plain.quantization
    models = [onnx.load(tmp_path / name / "model.onnx") for name in ("plain", "floats")]
    before, after = (Counter(node.op_type for node in model.graph.node) for model in models)
    half = (target, precision) != (
        "onnxruntime",
        "int8",
    )  # a cast from bytes became one from float32
    assert before - after == Counter(Reshape=2, Mul=1, Add=1, Transpose=1, Cast=0 if half else 1)
    assert after - before == Counter()
    assert floats.parity["max_error_relative"] < 1.5 * plain.parity["max_error_relative"] + 1e-3


def test_tensorrt_builds_with_the_shapes_of_the_floats(pixels: Path, tmp_path: Path) -> None:
    base = pixels / "model.onnx"
    float_file(tmp_path / "a", "fp16", "tensorrt", fp32_path=base)
    script = (tmp_path / "a" / "build.sh").read_text()
    assert (
        "--minShapes=image:1x3x32x32 --optShapes=image:1x3x32x32 --maxShapes=image:32x3x32x32"
        in script
    )
    export(build(), tmp_path / "b", "fp16", target="tensorrt", fp32_path=base)
    script = (tmp_path / "b" / "build.sh").read_text()
    assert (
        "--minShapes=image:1x32x32x3 --optShapes=image:1x32x32x3 --maxShapes=image:32x32x32x3"
        in script
    )


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_openvino_takes_floats(pixels: Path, tmp_path: Path, precision: str) -> None:
    openvino = pytest.importorskip("openvino", reason='needs pip install "edgekd[openvino]"')
    artifact = float_file(tmp_path / "a", precision, "openvino", fp32_path=pixels / "model.onnx")
    assert artifact.parity["passed"] is True
    taken = openvino.Core().read_model(tmp_path / "a" / "model.xml").input(0)
    assert (str(taken.get_element_type()), taken.partial_shape[1].get_length()) == (
        "<Type: 'float32'>",
        3,
    )
    expected = torch_logits(build(), IMAGES)
    found = open_session(tmp_path / "a", threads=1).run(IMAGES)
    assert share_of_range(found, expected) < (1e-5 if precision == "fp32" else 0.05)
    np.testing.assert_allclose(
        open_model(tmp_path / "a", threads=1).run(IMAGES[:1]), found[:1], atol=1e-6
    )


def test_a_network_that_asks_for_the_batch(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = Deployable(Tokens(), nn.Linear(8, len(CLASSES)), PREPROCESS)
    artifact = float_file(tmp_path / "a", model=model)
    assert any(
        node.op_type == "Shape" for node in onnx.load(tmp_path / "a" / "model.onnx").graph.node
    )
    assert artifact.parity["max_error_relative"] < 1e-5


@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
def test_a_largest_drop_works_for_every_target(target: str, pixels: Path, tmp_path: Path) -> None:
    if target == "openvino":
        pytest.importorskip("openvino", reason='needs pip install "edgekd[openvino]"')
    images, base = pictures(48, seed=3), pixels / "model.onnx"
    labels = torch_logits(build(), images).argmax(axis=1)
    limits = AccuracyBudget(images, labels, images, 0.0, 0.0, min_agreement=1.0)
    artifact = float_file(tmp_path / "a", "int8", target, budget=limits, fp32_path=base)
    assert artifact.quantization is not None
    assert artifact.quantization["mixed"]["agreement"] == 1.0
    assert artifact.parity["passed"] is True
    assert artifact.input == "float"


def test_a_largest_drop_works(pixels: Path, tmp_path: Path) -> None:
    images, base = pictures(48, seed=3), pixels / "model.onnx"
    labels = torch_logits(build(), images).argmax(axis=1)
    kept = float_file(
        tmp_path / "a",
        "int8",
        budget=AccuracyBudget(images, labels, images, 0.0, 0.0),
        fp32_path=base,
    )
    assert kept.quantization is not None
    assert "mixed" in kept.quantization
    assert kept.parity["passed"] is True
    assert kept.input == "float"


def test_embeddings_of_floats(tmp_path: Path) -> None:
    embedding.export(tmp_path / "plain", "onnxruntime", "fp32")
    base = tmp_path / "plain" / "model.onnx"
    embedding.export(tmp_path / "floats", "onnxruntime", "fp32", input="float", fp32_path=base)
    plain, floats = (open_session(tmp_path / name, threads=1) for name in ("plain", "floats"))
    assert share_of_range(floats.embed(IMAGES), plain.embed(IMAGES)) < 1e-5
    agent = open_model(tmp_path / "floats", threads=1)
    assert agent.embed is not None
    np.testing.assert_array_equal(agent.embed(IMAGES[:2]), floats.embed(IMAGES[:2]))


def test_an_engine_is_fed_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the driver's calls: the stand-in answers with the mean of each plane it was given."""
    changes = {
        "(-1, 16, 16, 3)": "(-1, 3, 16, 16)",
        "c_uint8": "c_float",
        "axis=(1, 2)": "axis=(2, 3)",
    }
    source = trt_fakes.TENSORRT
    for old, new in changes.items():
        assert old in source
        source = source.replace(old, new)
    trt, cuda = ModuleType("fake_tensorrt"), ModuleType("fake_cuda")
    exec(source, trt.__dict__)
    exec(trt_fakes.CUDA, cuda.__dict__)
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = cuda  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    plan = json.dumps({"version": trt.__version__, "largest": [8]})
    loaded = trt.Runtime(None).deserialize_cuda_engine(plan)
    engine = Engine(loaded, feed=normalising(PREPROCESS.mean, PREPROCESS.std))
    images = IMAGES[:5, ::2, ::2]
    np.testing.assert_allclose(engine.run(images), by_hand(images).mean(axis=(2, 3)), atol=1e-5)


def test_another_graph_is_refused() -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["x"], "cast", to=TensorProto.FLOAT),
            helper.make_node("Sigmoid", ["x"], ["y"], "squeeze"),
        ],
        "other",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 4, 4, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 4, 3])],
    )
    with pytest.raises(EdgekdError, match="Sigmoid squeeze is not what follows pixels"):
        with_float_input(helper.make_model(graph))


def refused(*arguments: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", *arguments])
    assert caught.value.code == 2


def test_names_and_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert artifact_name("openvino", "int8") == "openvino-int8"
    assert (
        artifact_name("openvino", "int8", embedding=True, input="float")
        == "openvino-int8-embedding-float-input"
    )
    refused(str(tmp_path), "--input", "flaot")
    assert 'There is no input "flaot"' in capsys.readouterr().err
    refused(str(tmp_path), "--target", "coreml", "--input", "float")
    assert "coreml" in capsys.readouterr().err
    with pytest.raises(EdgekdError, match="coreml"):
        float_file(tmp_path / "a", target="coreml")


NPU = """
name = "my-npu"
summary = "A board of mine"
runtime = "ONNX Runtime, CPU"
precisions = ["int8"]
input = "float"

[because]
runtime = "page"
precisions = "page"
input = "page"

[sources.page]
title = "The board's page"
url = "https://example.org/board"
"""


def test_a_profile_may_ask_for_floats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "my-npu.toml"
    path.write_text(NPU)
    inputs = [
        profiles.follow_profile(ExportConfig(profile=profile, input=given), {"input"}).input
        for profile in (None, str(path), "raspberry-pi-5")
        for given in (None, "uint8", "float")
    ]
    assert inputs == [None, "uint8", "float", "float", "uint8", "float", None, "uint8", "float"]
    assert "my-npu: input float (https://example.org/board, not checked)" in capsys.readouterr().err
    monkeypatch.setattr(profiles, "FOLDER", tmp_path)
    assert any("ONNX Runtime, CPU; int8; input float" in line for line in target_lines())
    assert (
        "    runtime and precisions and input: https://example.org/board, not checked"
        in target_lines()
    )
    path.write_text(NPU.replace('input = "page"\n', ""))
    with pytest.raises(EdgekdError, match="input has no source"):
        profiles.load_profile(path)
    path.write_text(NPU.replace('"float"', '"nchw"'))
    with pytest.raises(EdgekdError, match="input: Input should be 'uint8', 'float' or 'picture'"):
        profiles.load_profile(path)
