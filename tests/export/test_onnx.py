from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl
from torch import nn

from edgekd.core.errors import EdgekdError
from edgekd.core.preprocess import Preprocess
from edgekd.export.graph import Deployable
from edgekd.export.onnx import export_onnx


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


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_file_computes_the_eval_mode_model_for_any_batch(
    exported: tuple[Deployable, Path], batch: int
) -> None:
    model, path = exported
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
        ("image", "tensor(uint8)", ["batch", 32, 32, 3])
    ]
    assert [(o.name, o.type, o.shape) for o in session.get_outputs()] == [
        ("logits", "tensor(float)", ["batch", 5])
    ]
    x = images(batch)
    assert model.training, "export must leave the model's mode alone"
    model.eval()
    with torch.inference_mode():
        expected = model(torch.from_numpy(x)).numpy()
    model.train()
    np.testing.assert_allclose(session.run(None, {"image": x})[0], expected, atol=1e-5)


def test_file_holds_our_metadata_and_no_local_path(exported: tuple[Deployable, Path]) -> None:
    _, path = exported
    proto = onnx.load(path)
    assert {entry.key: json.loads(entry.value) for entry in proto.metadata_props} == {
        "classes": ["ä", "b"]
    }
    raw = path.read_bytes()
    for trace in (b".py", b"site-packages", b"stack_trace", str(Path.home()).encode() + b"/"):
        assert trace not in raw
    assert not list(path.parent.glob("*.data")), "weights belong into the one file"


def test_graph_has_no_shape_arithmetic(exported: tuple[Deployable, Path]) -> None:
    operators = {node.op_type for node in onnx.load(exported[1]).graph.node}
    assert not operators & {"Shape", "Gather", "Range", "BatchNormalization", "Dropout"}


def test_exporter_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(
        Deployable(Small(), nn.Linear(8, 5), Preprocess(size=32)),
        tmp_path / "m.onnx",
        size=32,
        metadata={},
    )
    assert capfd.readouterr() == ("", "")


def test_unsupported_operator_is_one_sentence(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x[:, 0]).real

    with pytest.raises(EdgekdError, match="cannot be written as ONNX") as caught:
        export_onnx(
            Deployable(Odd(), nn.Linear(32, 2), Preprocess(size=32)),
            tmp_path / "m.onnx",
            size=32,
            metadata={},
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.onnx").exists()


def test_more_than_two_gigabytes_is_refused_before_any_work(tmp_path: Path) -> None:
    with torch.device("meta"):
        huge = nn.Linear(30_000, 30_000)
    with pytest.raises(EdgekdError, match=r"3\.6 GB"):
        export_onnx(huge, tmp_path / "m.onnx", size=32, metadata={})


def test_the_image_feeds_nothing_but_its_cast_where_a_graph_asks_for_the_batch(
    tmp_path: Path,
) -> None:
    import timm

    vit = timm.create_model("test_vit", num_classes=0).eval()
    size = vit.pretrained_cfg["input_size"][-1]
    model = Deployable(vit, nn.Linear(vit.num_features, 3), Preprocess(size=size)).eval()
    export_onnx(model, tmp_path / "vit.onnx", size=size, metadata={})
    proto = onnx.load(tmp_path / "vit.onnx")
    assert any(node.op_type == "Shape" for node in proto.graph.node), "the case this test is about"
    assert [node.op_type for node in proto.graph.node if "image" in node.input] == ["Cast"]
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(
        tmp_path / "vit.onnx", providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {"image": images})[0]
    np.testing.assert_allclose(found, model(torch.from_numpy(images)).detach().numpy(), atol=1e-4)


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


def test_attention_within_windows_takes_any_batch(tmp_path: Path) -> None:
    model = Deployable(Windows(), nn.Linear(8, 5), Preprocess(size=32)).eval()
    export_onnx(model, tmp_path / "x.onnx", size=32, metadata={})
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        x = images(batch)
        with torch.inference_mode():
            wanted = model(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(session.run(None, {"image": x})[0], wanted, atol=1e-5)
    assert model.backbone.attention.attn.fused_attn, "the given model stays as it is"
