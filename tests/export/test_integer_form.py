"""The form of the graph for int8 kernels: what is padded, and that the results stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edgekd.export.onnx_graph import Graph, attribute
from edgekd.export.quantize.integer_form import integer_form


class Inverted(nn.Module):
    """Expansion, depthwise, squeeze-and-excite, projection, with a residual around it."""

    def __init__(self, inside: int, *, split: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.split = split
        self.expand = nn.Conv2d(8, inside, 1)
        self.depthwise = nn.Conv2d(inside, inside, 3, padding=1, groups=inside, bias=False)
        self.reduce, self.gate = nn.Conv2d(inside, 4, 1), nn.Conv2d(4, inside, 1)
        self.project = nn.Conv2d(inside, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.hardswish(self.depthwise(nn.functional.silu(self.expand(x))))
        if self.split:
            y = torch.cat(y.chunk(2, dim=1)[::-1], dim=1)
        gate = self.gate(self.reduce(y.mean((2, 3), keepdim=True)).relu())
        return x + self.project(y * nn.functional.hardsigmoid(gate))


def exported(model: nn.Module, path: Path) -> onnx.ModelProto:
    torch.onnx.export(
        model.eval(), (torch.zeros(2, 8, 6, 6),), path, dynamo=True, opset_version=20,
        input_names=["x"], output_names=["y"], dynamic_shapes=({0: "batch"},),
        external_data=False, verbose=False,
    )  # fmt: skip
    return onnx.load(path)


def answers(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def groups(model: onnx.ModelProto) -> list[int]:
    found = [attribute(node, "group", 1) for node in model.graph.node if node.op_type == "Conv"]
    return [group for group in found if group > 1]


@pytest.mark.parametrize(("inside", "padded"), [(24, 32), (32, 32)])
def test_depthwise_channels_are_padded_and_results_stay(
    inside: int, padded: int, tmp_path: Path
) -> None:
    model = exported(Inverted(inside), tmp_path / "x.onnx")
    form = integer_form(model)
    onnx.checker.check_model(form, full_check=True)
    assert groups(form) == [padded]
    shapes = sorted(list(t.dims) for t in form.graph.initializer if len(t.dims) == 4)
    assert [8, padded, 1, 1] in shapes, "the projection reads the zeros"
    assert [8, 8, 1, 1] not in shapes
    x = np.random.default_rng(0).normal(size=(3, 8, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(answers(form, x), answers(model, x), rtol=0, atol=2e-6)
    assert groups(model) == [inside], "the given model stays"


def test_channels_that_are_told_apart_stay(tmp_path: Path) -> None:
    form = integer_form(exported(Inverted(24, split=True), tmp_path / "x.onnx"))
    assert groups(form) == [24]


def test_means_over_the_map_are_pools(tmp_path: Path) -> None:
    form = integer_form(exported(Inverted(16), tmp_path / "x.onnx"))
    kinds = [node.op_type for node in form.graph.node]
    assert "ReduceMean" not in kinds
    assert kinds.count("GlobalAveragePool") == 1


def test_a_mean_that_drops_its_axes_is_flattened(tmp_path: Path) -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3))

    model = exported(Mean(), tmp_path / "x.onnx")
    form = integer_form(model)
    assert [node.op_type for node in form.graph.node] == ["GlobalAveragePool", "Flatten"]
    x = np.random.default_rng(0).normal(size=(3, 8, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(answers(form, x), answers(model, x), atol=1e-6)


def test_graph_lookups(tmp_path: Path) -> None:
    model = integer_form(exported(Inverted(16), tmp_path / "x.onnx"))
    graph = Graph(model)
    [add] = [node for node in model.graph.node if node.op_type == "Add"]
    assert graph.writer[add.output[0]] is add or graph.writer[add.output[0]].name == add.name
    assert set(graph.activations(add)) == set(add.input)
    assert len(graph.readers["x"]) == 2
    assert graph.only_reader("x") is None
    assert graph.only_reader("y") is None, "the caller reads it"
    assert graph.shape("x")[1:] == [8, 6, 6]
    assert graph.is_float("x")
