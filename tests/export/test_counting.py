"""Parameters and multiply-accumulates against hand-counted graphs and against timm's and torch's own numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper

from edgekd.benchmark.measure.counting import Counted, count_folder, count_onnx
from edgekd.evaluation.flops import count_torch


def constant(name: str, *shape: int, dtype: type = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ones(shape, dtype=dtype), name)


def write(
    path: Path, nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], side: object = 8
) -> Path:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6, side, side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], constants,
    )  # fmt: skip
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path
    )
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


def test_a_graph_by_hand_whatever_its_batch(tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", NETWORK, WEIGHTS)
    assert count_folder(tmp_path) == BY_HAND


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


def test_what_cannot_be_counted_is_none(tmp_path: Path) -> None:
    # The side of the image is unknown, so is that of the convolution's output.
    found = count_onnx(write(tmp_path / "m.onnx", NETWORK[:1], WEIGHTS[:2], side="side"))
    assert found == Counted(parameters=60, macs=None)
    (tmp_path / "broken.onnx").write_bytes(bytes(100))
    assert count_onnx(tmp_path / "broken.onnx") is None
    (tmp_path / "ir").mkdir()
    assert count_folder(tmp_path / "ir") is None


def test_torch_models_by_published_figures() -> None:
    def answer(model: torch.nn.Module):  # type: ignore[no-untyped-def]
        return lambda pixels: (
            model(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).detach().numpy()
        )

    # timm's table of results: 5.48 M parameters, 0.22 GMACs at 224 px.
    model = timm.create_model("mobilenetv3_large_100", pretrained=False).eval()
    found = count_torch(answer(model), model, (224, 224))
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
@pytest.mark.parametrize("name", ["mobilenetv3_large_100", "vit_tiny_patch16_224"])
def test_an_exported_graph_has_the_work_of_the_torch_model(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    for one in model.parameters():  # equal constants would be stored once
        torch.nn.init.normal_(one)
    path = tmp_path / "model.onnx"
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(
        model, (torch.zeros(2, 3, 224, 224),), path, opset_version=20, dynamic_shapes=(batch,)
    )
    found, told = (
        count_onnx(path),
        count_torch(lambda x: model(torch.zeros(1, 3, 224, 224)), model, (224, 224)),
    )
    assert found is not None
    assert found.macs == told.macs
    # BatchNorm's factors are folded into the convolutions, so a file can have somewhat fewer.
    assert 0.99 * told.parameters < found.parameters <= told.parameters
