from __future__ import annotations

import copy
import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl
from torch import nn

from edgekd.benchmark.measure.counting import Counted, count_folder, count_onnx
from edgekd.core.errors import EdgekdError
from edgekd.core.preprocess import Preprocess
from edgekd.evaluation.flops import count_torch
from edgekd.export.artifact import torch_logits
from edgekd.export.graph import Deployable, UnitHead, fold_head, fuse
from edgekd.export.onnx.write import export_onnx
from edgekd.export.parity import check, compare


class Small(nn.Module):
    """A convolution, a BatchNorm with statistics that matter, and the pooling timm uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.norm.running_mean = torch.randn(8)
        self.norm.running_var = torch.rand(8) + 0.5
        self.drop = nn.Dropout(0.5)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.pool(self.norm(self.conv(x)).relu()).flatten(1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Deployable, Path]:
    model = Deployable(Small(), nn.Linear(8, 5), Preprocess(size=32))
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(model.train(), path, size=32, metadata={"classes": json.dumps(["ä", "b"])})
    return model, path


def images(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def test_file_computes_the_eval_mode_model_for_any_batch(exported: tuple[Deployable, Path]) -> None:
    model, path = exported
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [taken], [given] = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape) == ("image", "tensor(uint8)", ["batch", 32, 32, 3])
    assert (given.name, given.type, given.shape) == ("logits", "tensor(float)", ["batch", 5])
    assert model.training, "export must leave the mode of the model alone"
    for batch in (1, 7):
        found = session.run(None, {"image": images(batch)})[0]
        expected = torch_logits(copy.deepcopy(model).eval(), images(batch))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    # It holds our metadata and no local path.
    proto, raw = onnx.load(path), path.read_bytes()
    [entry] = proto.metadata_props
    assert (entry.key, json.loads(entry.value)) == ("classes", ["ä", "b"])
    for trace in (b".py", b"site-packages", b"stack_trace", str(Path.home()).encode() + b"/"):
        assert trace not in raw
    assert not list(path.parent.glob("*.data")), "weights belong into the one file"
    operators = {node.op_type for node in proto.graph.node}
    assert not operators & {"Shape", "Gather", "Range", "BatchNormalization", "Dropout"}


def test_models_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x[:, 0]).real

    model = Deployable(Odd(), nn.Linear(32, 2), Preprocess(size=32))
    with pytest.raises(EdgekdError, match="cannot be written as ONNX") as caught:
        export_onnx(model, tmp_path / "m.onnx", size=32, metadata={})
    assert "\n" not in str(caught.value)
    with torch.device("meta"):
        huge = nn.Linear(30_000, 30_000)
    with pytest.raises(EdgekdError, match=r"3\.6 GB"):
        export_onnx(huge, tmp_path / "m.onnx", size=32, metadata={})
    assert not (tmp_path / "m.onnx").exists()


def assert_computes(model: Deployable, path: Path, size: int) -> onnx.ModelProto:
    """Write an ONNX file, which must compute the model for several batch sizes."""
    export_onnx(model, path, size=size, metadata={})
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
        found = session.run(None, {"image": pixels})[0]
        np.testing.assert_allclose(found, torch_logits(model, pixels), atol=1e-4)
    return onnx.load(path)


def test_only_the_cast_reads_the_image_where_a_graph_needs_the_batch_size(tmp_path: Path) -> None:
    vit: Any = timm.create_model("test_vit", num_classes=0, img_size=32).eval()
    model = Deployable(vit, nn.Linear(vit.num_features, 3), Preprocess(size=32)).eval()
    proto = assert_computes(model, tmp_path / "vit.onnx", 32)
    assert any(node.op_type == "Shape" for node in proto.graph.node), "the case this test is about"
    assert [node.op_type for node in proto.graph.node if "image" in node.input] == ["Cast"]
    windows: Any = Deployable(Windows(), nn.Linear(8, 5), Preprocess(size=32)).eval()
    assert_computes(windows, tmp_path / "x.onnx", 32)
    assert windows.backbone.attention.attn.fused_attn, "the given model stays as it is"


class Windows(nn.Module):
    """Attention within windows, as MaxViT has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = MaxxVitTransformerCfg(dim_head=4, window_size=(8, 8))
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.attention = PartitionAttentionCl(8, cfg=config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2))


PREPROCESS = Preprocess(size=16, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))


def test_normalisation_is_that_of_the_formula_per_channel() -> None:
    head = nn.Linear(3 * 16 * 16, 3 * 16 * 16, bias=False)
    nn.init.eye_(head.weight)
    model = Deployable(nn.Flatten(), head, PREPROCESS)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    found = torch_logits(model, pixels).reshape(2, 3, 16, 16)
    expected = (pixels / 255.0 - np.array(PREPROCESS.mean)) / np.array(PREPROCESS.std)
    np.testing.assert_allclose(found, expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    with pytest.raises(EdgekdError, match="gives 8 values but the text bank has 5"):
        fold_head(nn.Linear(12, 8), torch.randn(6, 5), 1.0)


@pytest.mark.parametrize("with_projector", [True, False])
@pytest.mark.parametrize("length", [0.01, 300.0])
def test_unit_head_gives_unit_vectors(with_projector: bool, length: float) -> None:
    torch.manual_seed(2)
    features = length * torch.randn(50, 16)
    projector = nn.Linear(16, 16, bias=False) if with_projector else None
    raw = projector(features) if projector is not None else features
    head = UnitHead(projector, 16, float(raw.detach().norm(dim=1).mean()))
    expected = nn.functional.normalize(raw, dim=1)
    torch.testing.assert_close(head(features), expected, rtol=1e-5, atol=1e-6)
    # 16^¼ = 2, far from both ends of half precision.
    inner = head.projector(features) if head.projector is not None else features * head.factor
    assert inner.norm(dim=1).mean().item() == pytest.approx(2.0, rel=1e-4)
    assert not any(parameter.requires_grad for parameter in head.parameters())


FAMILIES = {"fastvit_t8": 64, "levit_128s": 224, "mobileone_s0": 64, "repvit_m0_9": 64}


def network(name: str) -> nn.Module:
    """A timm model with random weights and BatchNorm statistics unlike 0 and 1."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_families_fuse_to_equal_outputs(name: str) -> None:
    model, size = network(name).train(), FAMILIES[name]
    kept = copy.deepcopy(model.state_dict())
    example = torch.randn(2, 3, size, size)
    fused, error = fuse(model, example)
    assert error is not None
    assert error <= 1e-5
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, fused))
    assert after < before
    assert model.training
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    again, error = fuse(fused, example)
    assert (again is fused, error) == (True, None)


class Wrong(nn.Module):
    """A block whose fused form forgets its bias, or raises."""

    def __init__(self, raises: bool) -> None:
        super().__init__()
        self.raises, self.layer = raises, nn.Linear(4, 4)

    def fuse(self) -> nn.Module:
        if self.raises:
            raise AttributeError("no such branch")
        plain = nn.Linear(4, 4, bias=False)
        plain.weight = self.layer.weight
        return plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("raises", [False, True])
def test_a_wrong_fusion_is_refused(raises: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(Wrong(raises))
    assert fuse(model, torch.randn(2, 4)) == (model, None)
    assert "fused" in capsys.readouterr().err
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert fuse(plain, torch.randn(1, 3, 8, 8)) == (plain, None)


def constant(name: str, *shape: int, dtype: type = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ones(shape, dtype=dtype), name)


def write(path: Path, nodes: list[Any], constants: list[Any], side: object = 8) -> Path:
    shape = ["batch", 6, side, side]
    taken = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    given = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [taken], [given], constants)
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path


NETWORK = [
    # depthwise 3 × 3, stride 2: [1, 6, 8, 8] → [1, 6, 4, 4]; 96 outputs of 9 products
    helper.make_node("Conv", ["x", "w", "b"], ["c"], group=6, pads=[1, 1, 1, 1], strides=[2, 2]),
    helper.make_node("Clip", ["c", "low"], ["r"]),
    # back to [1, 5, 8, 8]: each of the 96 inputs meets 5 × 2 × 2 weights
    helper.make_node("ConvTranspose", ["r", "t"], ["u"], strides=[2, 2]),
    helper.make_node("Flatten", ["u"], ["f"]),
    helper.make_node("MatMul", ["f", "m"], ["h"]),  # [1, 320] × [320, 7]
    helper.make_node("Gemm", ["h", "g", "gb"], ["y"], transB=1),  # [1, 7] × [7, 3]
]

WEIGHTS = [constant("w", 6, 1, 3, 3), constant("b", 6), constant("low"), constant("t", 6, 5, 2, 2),
           constant("m", 320, 7), constant("g", 3, 7), constant("gb", 3)]  # fmt: skip

BY_HAND = Counted(parameters=54 + 6 + 120 + 2240 + 21 + 3, macs=96 * 9 + 96 * 20 + 320 * 7 + 7 * 3)


def test_quantized_weights_count_and_their_scales_do_not(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w8", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("DequantizeLinear", ["b32", "bs"], ["bd"], axis=0),
        helper.make_node("Conv", ["xd", "wd", "bd"], ["y"]),
    ]
    constants = [
        constant("s"), constant("z", dtype=np.uint8), constant("w8", 4, 6, 1, 1, dtype=np.int8), constant("ws", 4),
        constant("wz", 4, dtype=np.int8), constant("b32", 4, dtype=np.int32), constant("bs", 4),
    ]  # fmt: skip
    found = count_onnx(write(tmp_path / "m.onnx", nodes, constants))
    assert found == Counted(parameters=24 + 4, macs=4 * 64 * 6)


def test_a_graph_is_counted_by_hand_and_what_cannot_be_counted_is_none(tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", NETWORK, WEIGHTS)
    assert count_folder(tmp_path) == BY_HAND
    # The side of the image is unknown, so is that of the convolution's output.
    found = count_onnx(write(tmp_path / "m.onnx", NETWORK[:1], WEIGHTS[:2], side="side"))
    assert found == Counted(parameters=60, macs=None)
    (tmp_path / "broken.onnx").write_bytes(bytes(100))
    assert count_onnx(tmp_path / "broken.onnx") is None
    (tmp_path / "ir").mkdir()
    assert count_folder(tmp_path / "ir") is None


def test_torch_models_by_published_figures() -> None:
    def answer(pixels: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).detach().numpy()

    # timm's table of results: 5.48 M parameters, 0.22 GMACs at 224 px.
    model = timm.create_model("mobilenetv3_large_100", pretrained=False).eval()
    found = count_torch(answer, model, (224, 224))
    assert found.parameters == 5_483_032
    assert found.macs == pytest.approx(0.22e9, rel=0.02)
    # An attention layer by hand, which torch would otherwise compute in one operator that nothing is counted of:
    # 16 tokens of 8, projections in (3) and out (1), then queries by keys and weights by values.
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()

    def attend(pixels: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(np.resize(pixels, (1, 16, 8))).float()
        with torch.inference_mode():
            return layer(tokens, tokens, tokens, need_weights=False)[0].numpy()

    assert count_torch(attend, layer, (4, 4)).macs == 4 * 16 * 8 * 8 + 2 * 16 * 16 * 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precisions"),
    [
        ("edgenext_xx_small", ["fp32", "fp16"]),
        ("mobileone_s0", ["int8"]),
        ("mixnet_s", ["int8"]),
        ("mobilenetv4_conv_small", ["int8"]),
    ],
)
def test_zoo_models(name: str, precisions: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    zoo = importlib.import_module("zoo")
    cells = zoo.run_model(name, ["onnxruntime", "tensorrt"], precisions)
    assert {cell["status"] for cell in cells.values()} == {"ok"}, cells
    for cell in cells.values():
        assert cell.get("batch_error", 0) < 1e-2
    assert any(cell["fused"] for cell in cells.values()) == (name == "mobileone_s0")


def rows(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def test_numbers_against_hand_computed_values() -> None:
    parity = compare(rows([0, 1], [3, -1]), rows([0.5, 1], [3, 4]))
    first, second = 1 / math.hypot(0.5, 1), (9 - 4) / (math.hypot(3, 1) * 5)
    expected = {
        "n": 2, "max_abs_error": 5, "mean_abs_error": 5.5 / 4, "logit_range": 4, "max_error_relative": 1.25,
        "top1_agreement": 0.5, "cosine": (first + second) / 2,
    }  # fmt: skip
    assert {name: parity[name] for name in expected} == pytest.approx(expected)
    kl = compare(rows([math.log(3), 0]), rows([0, 0]))["kl"]  # (3/4, 1/4) against (1/2, 1/2)
    assert kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)
    # Probabilities 3/4 and 2/3 for its own classes, 1/3 for the candidate's second: (17/24 - 13/24) / (17/24 - 1/2).
    undecided = rows([math.log(3), 0], [0, math.log(2)])
    assert compare(undecided, rows([9, 0], [1, 0]))["expected_loss"] == pytest.approx(4 / 5)
    assert compare(undecided, rows([9, 0], [0, 9]))["expected_loss"] == 0
    assert compare(rows([1, 1]), rows([0, 1]))["expected_loss"] == 0
    shifted = compare(rows([1, 2, 3]), rows([101, 102, 103]))
    assert shifted["kl"] == pytest.approx(0, abs=1e-9)
    assert shifted["max_abs_error"] == 100
    nothing = np.zeros((0, 2), np.float32)
    for reference, candidate in (
        (rows([1, 2]), rows([1, 2], [3, 4])),
        (nothing, nothing),
        (rows([1, 2]), rows([1, math.nan])),
    ):
        with pytest.raises(EdgekdError):
            compare(reference, candidate)


@pytest.mark.parametrize(
    ("precision", "agreement", "error", "loss", "passed"),
    [
        ("fp32", 1.0, 1e-3, 0.0, True),
        ("fp32", 0.998, 0.0, 0.0, False),
        ("fp32", 1.0, 1.1e-3, 0.0, False),
        ("fp16", 0.995, 0.1, 0.0, True),
        ("fp16", 0.994, 0.0, 0.0, False),
        ("int8", 0.97, 0.3, 0.1, True),
        ("int8", 0.969, 0.0, 0.016, False),
        ("int8", 0.9, 0.0, 0.015, True),
    ],
)
def test_thresholds(
    precision: str, agreement: float, error: float, loss: float, passed: bool
) -> None:
    found = {"top1_agreement": agreement, "max_error_relative": error, "expected_loss": loss}
    result = check(found, precision)
    assert result["passed"] is passed
    assert ("reason" in result) is not passed
    if precision == "int8":  # a threshold of one's own is the only one
        assert check(found, precision, 0.95)["passed"] is (agreement >= 0.95)
