from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_fakes import SIZE, Block, pictures
from onnx import numpy_helper
from torch import nn

from edgekd.core.errors import EdgekdError
from edgekd.core.preprocess import Preprocess
from edgekd.export.graph import Deployable
from edgekd.export.onnx import export_onnx
from edgekd.export.onnx_eval import onnx_evaluator
from edgekd.export.quantize.tensorrt import TensorRtInt8, int8_scales
from edgekd.export.quantize.tensorrt_rules import findings


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    folder = tmp_path_factory.mktemp("scheme")
    model = Deployable(Block(), nn.Linear(16, 4), Preprocess(size=SIZE))
    export_onnx(model, folder / "fp32.onnx", size=SIZE, metadata={"k": "v"})
    return (
        folder / "fp32.onnx",
        folder / "int8.onnx",
        TensorRtInt8().quantize(folder / "fp32.onnx", folder / "int8.onnx", pictures(64)),
    )


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
    pairs = [
        node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]
    assert {str(constants[node.input[2]].dtype) for node in pairs} == {"int8"}
    assert {str(constants[node.input[1]].dtype) for node in pairs} == {"float16"}, (
        "a float32 layer would be slow"
    )
    writer = {name: node.op_type for node in model.graph.node for name in node.output}
    add = [node for node in model.graph.node if node.op_type == "Add" and "shift" not in node.input]
    assert [[writer[name] for name in node.input] for node in add] == [
        ["DequantizeLinear", "DequantizeLinear"]
    ]
    first = model.graph.node[[node.op_type for node in model.graph.node].index("Cast")]
    assert first.input[0] == "image"
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_squeeze_excite_stays_float_and_is_recorded(files: tuple[Path, Path, dict]) -> None:
    described = files[2]
    assert described["quantized_layers"] == 4  # stem, depthwise, pointwise, head
    assert len(described["float_layers"]) == 2
    assert described["calibration_images"] == 64


def test_weights_are_rounded_to_their_own_channels_scale(files: tuple[Path, Path, dict]) -> None:
    constants = {
        item.name: numpy_helper.to_array(item) for item in onnx.load(files[1]).graph.initializer
    }
    before = {
        item.name: numpy_helper.to_array(item) for item in onnx.load(files[0]).graph.initializer
    }
    weight = before["backbone.pointwise.weight"]
    scale = constants["backbone.pointwise.weight/scales"].astype(np.float64)
    np.testing.assert_allclose(scale, np.abs(weight).max(axis=(1, 2, 3)) / 127, rtol=1e-3)
    restored = constants["backbone.pointwise.weight/integers"] * scale[:, None, None, None]
    error = np.abs(restored - weight).max(axis=(1, 2, 3))
    assert (error <= 0.55 * scale).all()


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

    model = Deployable(Scaled(), nn.Linear(8, 4), Preprocess(size=SIZE))
    export_onnx(model, tmp_path / "a", size=SIZE, metadata={})
    assert (
        TensorRtInt8().quantize(tmp_path / "a", tmp_path / "b", pictures(32))["quantized_layers"]
        == 4
    )
    assert findings(onnx.load(tmp_path / "b")) == []


def test_scales_by_hand() -> None:
    scales = int8_scales(np.array([127.0, 12.7, 0.0, 1e-7], np.float32))
    assert scales.dtype == np.float16
    np.testing.assert_allclose(scales.astype(np.float64), [1, 0.1, 2**-20, 2**-20], rtol=1e-3)


def test_tiny_activations_keep_their_values(tmp_path: Path) -> None:
    """A range below float16's normal numbers still gets 127 steps."""

    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 1, bias=False)
            self.first.weight.data *= 2e-3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 500 * self.second(self.first(x)).mean((2, 3))

    export_onnx(
        Deployable(Faint(), nn.Linear(8, 4), Preprocess(size=SIZE)),
        tmp_path / "a",
        size=SIZE,
        metadata={},
    )
    TensorRtInt8().quantize(tmp_path / "a", tmp_path / "b", pictures(32))
    images = pictures(64, seed=1)
    reference, candidate = (
        onnx_evaluator(tmp_path / "a")(images),
        onnx_evaluator(tmp_path / "b")(images),
    )
    assert (
        np.square(candidate - reference).mean()
        < 0.01 * np.square(reference - reference.mean(axis=0)).mean()
    )


def test_what_half_precision_cannot_hold_is_named() -> None:
    with pytest.raises(EdgekdError, match=r"activation wide reaches 7e\+04"):
        TensorRtInt8().check_extremes({"wide": (np.float32(-70000), np.float32(1))})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.repeat(pictures(1), 8, axis=0), "alike"),
        (np.zeros((0, SIZE, SIZE, 3), np.uint8), "no calibration images"),
    ],
)
def test_useless_calibration_is_refused(
    files: tuple[Path, Path, dict], tmp_path: Path, images: np.ndarray, message: str
) -> None:
    with pytest.raises(EdgekdError, match=message):
        TensorRtInt8().quantize(files[0], tmp_path / "x.onnx", images)
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "deit_tiny_patch16_224"])
def test_students_become_legal_graphs(name: str, tmp_path: Path) -> None:
    import timm

    size = 64 if "mobilenet" in name else 224
    student = timm.create_model(name, num_classes=0).eval()
    model = Deployable(student, nn.Linear(student.num_features, 4), Preprocess(size=size))
    if "mobilenet" in name:
        model.head = nn.Linear(1024, 4)
    export_onnx(model, tmp_path / "fp32.onnx", size=size, metadata={})
    images = np.random.default_rng(0).integers(0, 256, (4, size, size, 3), dtype=np.uint8)
    described = TensorRtInt8().quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", images)
    assert described["quantized_layers"] > 20
    assert findings(onnx.load(tmp_path / "int8.onnx")) == []
    onnxruntime.InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
