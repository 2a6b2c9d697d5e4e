"""What NNCF rounds in a transformer, operation by operation; skipped where the extra is not installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from export_fakes import SIZE, pictures
from torch import nn

from edgekd.core.preprocess import Preprocess
from edgekd.export.graph import Deployable
from edgekd.export.onnx import export_onnx
from edgekd.export.quantize import openvino as ov_int8
from edgekd.export.quantize.openvino import Rounded, layers_in_float, revert_to_float

openvino = pytest.importorskip("openvino", reason='needs pip install "edgekd[openvino]"')

SCHEME = ov_int8.OpenVinoInt8({"classes": "[]"})
LAYERS = ("patch_embed.proj", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "head")


def textured(n: int, seed: int = 0) -> np.ndarray:
    """Smooth pictures with grain: of smooth ones alone, a deep random network sees little but its own rounding."""
    grain = np.random.default_rng(seed).integers(0, 128, (n, SIZE // 2, SIZE // 2, 3))
    return (pictures(n, seed) // 2 + grain.repeat(2, axis=1).repeat(2, axis=2)).astype(np.uint8)


@pytest.fixture(scope="module")
def body() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = timm.create_model("test_vit", num_classes=0, depth=2, img_size=SIZE, patch_size=8)
        for parameter in made.parameters():
            if (
                parameter.ndim == 1
            ):  # as initialised they are 0 and 1, and many of them one constant in the file
                parameter.data += 0.1 * torch.randn_like(parameter)
    return made


@pytest.fixture(scope="module")
def fp32(body: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit") / "fp32.onnx"
    model = Deployable(body, nn.Linear(body.num_features, 4), Preprocess(size=SIZE))
    export_onnx(model, path, size=SIZE, metadata={})
    return path


@pytest.fixture(scope="module")
def rounded(fp32: Path) -> Rounded:
    return SCHEME.calibrate(fp32, textured(24), "minmax")


def kinds_ahead(model: object, layer: str) -> set[str]:
    """Kinds of the operations that what `layer` reads comes through, back to the last that computes."""
    node, kinds = next(n for n in model.get_ordered_ops() if n.get_friendly_name() == layer), set()
    while True:
        node = node.input_value(0).get_node()
        kinds.add(node.get_type_name())
        if node.get_type_name() not in ("Reshape", "Transpose", "Gather", "FakeQuantize"):
            return kinds


def test_a_transformer_rounds_its_layers_and_nothing_else(rounded: Rounded) -> None:
    found = SCHEME.groups(rounded)
    assert all(unit.weighted for unit in found), "neither layer norms nor sums of tokens"
    named = [unit.name for unit in found if " after " not in unit.name]
    assert named == [
        "patch_embed.proj",
        *(f"blocks.{block}.{layer}" for block in (0, 1) for layer in LAYERS[1:-1]),
        "head",
    ]
    products = [unit.name for unit in found if " after " in unit.name]
    assert products == [f"MatMul after blocks.{block}.attn.qkv" for block in (0, 1)]


def test_what_reaches_a_layer_through_a_transpose_counts(
    rounded: Rounded, fp32: Path, tmp_path: Path
) -> None:
    found = {unit.name: unit for unit in SCHEME.groups(rounded)}
    # Of attention's two products NNCF leaves the one behind the softmax alone.
    assert len(layers_in_float(rounded.model)) == 2
    assert not {unit.nodes[0] for unit in found.values()} & set(layers_in_float(rounded.model))
    for name in ("patch_embed.proj", "blocks.0.attn.proj", "head"):
        lead = found[name].nodes[0]
        assert "FakeQuantize" in kinds_ahead(rounded.model, lead)
        model = rounded.model.clone()
        revert_to_float(model, rounded.full, found[name].nodes)
        assert "FakeQuantize" not in kinds_ahead(model, lead)
        assert lead in layers_in_float(model)
    everything = [node for unit in found.values() for node in unit.nodes]
    SCHEME.write(rounded, tmp_path / "none.xml", in_float=everything)
    kinds = {
        node.get_type_name()
        for node in openvino.Core().read_model(tmp_path / "none.xml").get_ordered_ops()
    }
    assert "FakeQuantize" not in kinds
    full, none = (SCHEME.open(path)(textured(8)) for path in (fp32, tmp_path / "none.xml"))
    assert np.abs(none - full).max() < 2e-3 * np.abs(full).max()  # stored in 16 bits


def test_weights_of_a_product_have_a_scale_per_output(rounded: Rounded, body: nn.Module) -> None:
    layer = next(unit for unit in SCHEME.groups(rounded) if unit.name == "blocks.0.mlp.fc2")
    weight = (
        body.blocks[0].mlp.fc2.weight.detach().double()
    )  # [outputs, inputs]; the file has it the other way round
    scale = weight.abs().amax(1, keepdim=True) / 127
    lost = (weight - (weight / scale).round() * scale).square().sum() / weight.square().sum()
    assert SCHEME.weight_errors(rounded)[layer.nodes[0]] == pytest.approx(float(lost), rel=1e-4)
