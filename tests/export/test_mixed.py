"""INT8 within a gate: the ranking, the search and what it leaves."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_fakes import SIZE, Block, logits, pictures
from onnx import numpy_helper
from torch import nn

from edgekd.core.errors import EdgekdError, GateFailed
from edgekd.core.preprocess import Preprocess
from edgekd.export.graph import Deployable
from edgekd.export.onnx import export_onnx
from edgekd.export.onnx_eval import onnx_evaluator
from edgekd.export.onnx_graph import to_half
from edgekd.export.quantize import search as mixed
from edgekd.export.quantize.onnxruntime import OnnxRuntimeInt8
from edgekd.export.quantize.search import AccuracyBudget, Drops, Search
from edgekd.export.quantize.tensorrt import TensorRtInt8
from edgekd.export.quantize.tensorrt_rules import findings

SCHEME, TENSORRT = OnnxRuntimeInt8(), TensorRtInt8()
quantize_within = partial(mixed.quantize_within, scheme=SCHEME)


def spoilt(path: Path) -> Path:
    """A model that per-tensor activations ruin: one channel of the stem is 3,000 times as large as the others, and the
    pointwise layer that reads it divides it away again."""
    export_onnx(
        Deployable(Block(), nn.Linear(16, 4), Preprocess(size=SIZE)), path, size=SIZE, metadata={}
    )
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if tensor.name.endswith("depthwise.weight") or tensor.name.endswith("depthwise.bias"):
            values[0] *= 3000
        elif tensor.name.endswith("pointwise.weight"):
            values[:, 0] /= 3000
            values *= 5
        else:
            continue
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)
    # The classes as likely as each other, so that errors change minds.
    middle = np.median(logits(path, pictures(64, seed=9)), axis=0)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("head.bias"))
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) - middle, bias.name))
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spoilt(tmp_path_factory.mktemp("mixed") / "fp32.onnx")


def budget(fp32: Path, **limits: float) -> AccuracyBudget:
    """Labels are what FP32 says, so a drop is the share of changed minds."""
    images = pictures(48, seed=3)
    return AccuracyBudget(images, logits(fp32, images).argmax(axis=1), images, **limits)


def test_units_hold_everything_that_int8_changes(fp32: Path, tmp_path: Path) -> None:
    calibrated = SCHEME.calibrate(fp32, pictures(32))
    units = SCHEME.groups(calibrated)
    names = ["depthwise", "reduce", "expand", "pointwise", "Add after pointwise", "head"]
    assert [unit.name for unit in units] == names  # the stem stays in float
    assert [unit.weighted for unit in units] == [True, True, True, True, False, True]
    kinds = {node.name: node.op_type for node in calibrated.model.graph.node}
    followers = [[kinds[name] for name in unit.nodes[1:]] for unit in units[:3]]
    assert followers == [["HardSwish", "GlobalAveragePool", "Mul"], ["Relu"], ["HardSigmoid"]]
    SCHEME.write(
        calibrated, tmp_path / "none.onnx", in_float=[name for unit in units for name in unit.nodes]
    )
    kinds = {node.op_type for node in onnx.load(tmp_path / "none.onnx").graph.node}
    assert not kinds & {"QuantizeLinear", "DequantizeLinear"}
    close = {"rtol": 0, "atol": 1e-5}
    np.testing.assert_allclose(
        logits(tmp_path / "none.onnx", pictures(8)), logits(fp32, pictures(8)), **close
    )


class Pooled(nn.Module):
    """A pool that reads what a convolution reads, and tokens behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.mix = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.hardswish(self.stem(x))
        x = torch.cat([self.conv(x).relu(), nn.functional.max_pool2d(x, 2)], 2)  # [B, 16, 32, 16]
        tokens = x.flatten(2).transpose(1, 2)  # [B, 512, 16]
        return (tokens + self.mix(tokens)).mean(1)


def test_pools_follow_and_token_sums_stay_float(tmp_path: Path) -> None:
    path = tmp_path / "fp32.onnx"
    export_onnx(
        Deployable(Pooled(), nn.Linear(16, 4), Preprocess(size=SIZE)), path, size=SIZE, metadata={}
    )
    calibrated = SCHEME.calibrate(path, pictures(16))
    units = SCHEME.groups(calibrated)
    assert [unit.name for unit in units] == ["conv", "node_cat", "mix", "head"]
    kinds = {node.name: node.op_type for node in calibrated.model.graph.node}
    assert [kinds[name] for name in units[0].nodes] == ["Conv", "Relu", "MaxPool"]
    SCHEME.write(calibrated, tmp_path / "all.onnx")
    graph = onnx.load(tmp_path / "all.onnx").graph
    rounded = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    sums = [node for node in graph.node if node.op_type == "Add"]
    assert len(sums) == 3  # of the normalisation, of the bias, of the tokens
    assert not any(name in rounded for node in sums[1:] for name in node.input if "bias" in name)
    assert sums[-1].input[1] == sums[-2].output[0], (
        "the bias is added in float, and its sum goes on in float"
    )
    SCHEME.write(
        calibrated, tmp_path / "none.onnx", in_float=[name for unit in units for name in unit.nodes]
    )
    np.testing.assert_allclose(
        logits(tmp_path / "none.onnx", pictures(8)), logits(path, pictures(8)), rtol=0, atol=1e-5
    )


def test_the_spoilt_layer_ranks_first(fp32: Path, tmp_path: Path) -> None:
    calibrated = SCHEME.calibrate(fp32, pictures(32))
    search, units = (
        Search(fp32, budget(fp32), SCHEME, calibrated, tmp_path),
        SCHEME.groups(calibrated),
    )
    order, ranked = search.rank(units)
    assert ranked == 6
    assert set(order) == set(units)
    assert order[0].name in ("depthwise", "pointwise")


def test_search_keeps_what_the_gate_needs_and_says_so(
    fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loose = quantize_within(
        fp32, tmp_path / "loose.onnx", pictures(32), budget(fp32, max_drop_id=100)
    )
    assert loose["mixed"]["kept_in_float"] == []
    assert loose["mixed"]["drop_id_points"] > 5, "the model must be one that INT8 hurts"
    tight = quantize_within(
        fp32, tmp_path / "tight.onnx", pictures(32), budget(fp32, max_drop_id=5)
    )
    kept = tight["mixed"]["kept_in_float"]
    assert 1 <= len(kept) <= 3
    assert tight["quantized_layers"] == loose["quantized_layers"] - sum(
        "Add" not in name for name in kept
    )
    assert tight["mixed"]["drop_id_points"] <= 5
    sizes = [(tmp_path / name).stat().st_size / 1e6 for name in ("loose.onnx", "tight.onnx")]
    assert tight["mixed"]["cost_mb"] == pytest.approx(sizes[1] - sizes[0], abs=1e-3)
    images = budget(fp32)
    changed = (
        logits(tmp_path / "tight.onnx", images.pixels).argmax(axis=1) != images.labels
    ).mean()
    assert 100 * changed == pytest.approx(tight["mixed"]["drop_id_points"], abs=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loose.onnx", "tight.onnx"]
    said = " ".join(capsys.readouterr().err.split())
    assert f"{len(kept)} of 6 layers and additions stay in float, {kept[0]}" in said
    assert "hardly INT8" not in said
    assert tight["mixed"]["fp32_ms"] > 0


def test_the_last_resort_is_float_and_is_called_so(
    fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(8, seed=7)

    def same_digits(self: object, path: Path) -> Drops:  # a gate that nothing rounded passes
        return Drops(
            0,
            0,
            agreement=float(np.allclose(logits(path, images), logits(fp32, images), atol=1e-4)),
        )

    monkeypatch.setattr(Search, "drops", same_digits)
    asked = budget(fp32, min_agreement=1.0, search_seconds=0)
    found = quantize_within(fp32, tmp_path / "x.onnx", pictures(32), asked)
    assert len(found["mixed"]["kept_in_float"]) == 6
    assert found["quantized_layers"] == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "hardly INT8 any more: none of 5 layers" in said


def test_a_search_out_of_time_says_what_it_reached(
    fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrated = SCHEME.calibrate(fp32, pictures(32))
    search, units = (
        Search(fp32, budget(fp32), SCHEME, calibrated, tmp_path),
        SCHEME.groups(calibrated),
    )
    hurried, ranked = search.rank(units, deadline=0)
    assert ranked == 1
    errors = SCHEME.weight_errors(calibrated)
    assert hurried == sorted(units, key=lambda unit: -errors.get(unit.nodes[0], 0))
    assert hurried[-1].name == "Add after pointwise"
    quick = budget(fp32, max_drop_id=5, search_seconds=0)
    found = quantize_within(fp32, tmp_path / "a.onnx", pictures(32), quick)["mixed"]
    assert found["drop_id_points"] <= 5
    assert found["search"]["ranked_units"] == 1
    said = capsys.readouterr().err
    assert "time for 1 of 6 within 0 s (--search-seconds)" in said


def test_agreement_is_part_of_the_gate(fp32: Path, tmp_path: Path) -> None:
    found = quantize_within(
        fp32, tmp_path / "a.onnx", pictures(32), budget(fp32, min_agreement=0.95)
    )["mixed"]
    assert found["agreement"] >= 0.95
    assert found["kept_in_float"]


def test_a_search_asks_for_the_agreement_that_other_images_need() -> None:
    images = pictures(128)
    asked = AccuracyBudget(images, np.zeros(128, np.int64), images, min_agreement=0.96)
    # 256 images here, 256 in the check: the difference of two shares has the error sqrt(2 · 0.96 · 0.04 / 256).
    assert asked.surely().min_agreement == pytest.approx(0.96 + 1.64 * 0.017321, abs=1e-5)
    assert (
        AccuracyBudget(images, asked.labels, images, min_agreement=0.999).surely().min_agreement
        == 1
    )
    assert AccuracyBudget(images, asked.labels, images).surely().min_agreement == 0
    assert (
        AccuracyBudget(images, asked.labels, images, min_agreement=1.0).surely().min_agreement == 1
    )


def test_weight_error_is_that_of_rounding(fp32: Path) -> None:
    calibrated = SCHEME.calibrate(fp32, pictures(8))
    model = calibrated.model
    node = next(node for node in model.graph.node if "depthwise" in "".join(node.input))
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    weight = numpy_helper.to_array(tensor).reshape(16, 9).astype(np.float64)
    steps = np.abs(weight).max(axis=1, keepdims=True) / 127
    lost = weight - steps * np.round(weight / steps)
    assert SCHEME.weight_errors(calibrated)[node.name] == pytest.approx(
        (lost**2).sum() / (weight**2).sum(), rel=1e-3
    )


def test_a_gate_nobody_passes_is_a_failed_gate(fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(GateFailed, match="even with everything in float"):
        quantize_within(fp32, tmp_path / "x.onnx", pictures(32), budget(fp32, max_drop_id=-1))


def test_no_validation_images_is_a_sentence(fp32: Path, tmp_path: Path) -> None:
    none = pictures(1)[:0]
    with pytest.raises(EdgekdError, match="no validation images"):
        quantize_within(
            fp32,
            tmp_path / "x.onnx",
            pictures(32),
            AccuracyBudget(none, np.zeros(0, np.int64), none),
        )


def rounded_inputs(model: onnx.ModelProto) -> dict[str, int]:
    """Node → how many of its inputs come from a `DequantizeLinear`."""
    rounded = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return {node.name: sum(name in rounded for name in node.input) for node in model.graph.node}


def test_whatever_stays_in_float_tensorrt_takes_the_graph(fp32: Path, tmp_path: Path) -> None:
    calibrated = TENSORRT.calibrate(fp32, pictures(32))
    units = TENSORRT.groups(calibrated)
    names = ["stem", "depthwise", "pointwise", "Add after pointwise", "head"]
    assert [unit.name for unit in units] == names
    assert [unit.weighted for unit in units] == [True, True, True, False, True]
    nodes = [unit.nodes[0] for unit in units]
    assert [len(unit.nodes) for unit in units] == [1] * 5, (
        "in this scheme nothing follows a layer into INT8"
    )
    for count in range(6):
        for keep in combinations(nodes, count):
            described = TENSORRT.write(calibrated, tmp_path / "a.onnx", in_float=keep)
            model = onnx.load(tmp_path / "a.onnx")
            assert findings(model) == []
            found = rounded_inputs(model)
            # A layer's input and weights, both sides of an addition; beside INT8 too, float reads what was not rounded.
            assert [found[name] for name in nodes] == [0 if name in keep else 2 for name in nodes]
            assert set(keep) - {nodes[3]} <= set(described["float_layers"])
    assert not {node.op_type for node in model.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    onnx.save(to_half(onnx.load(fp32)), tmp_path / "half.onnx")
    images = pictures(8)
    in_half = onnx_evaluator(tmp_path / "half.onnx")(images)
    assert np.array_equal(onnx_evaluator(tmp_path / "a.onnx")(images), in_half)


class Woven(nn.Module):
    """An addition that is no residual one; both sides go into convolutions too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.c, self.d = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = nn.functional.hardswish(self.a(x)), nn.functional.hardswish(self.b(x))
        return torch.cat([self.c(a).relu(), self.d(b).relu(), a + b], 1).mean((2, 3))


def test_a_neighbour_in_float_leaves_no_addition_half_rounded(tmp_path: Path) -> None:
    path = tmp_path / "fp32.onnx"
    export_onnx(
        Deployable(Woven(), nn.Linear(24, 4), Preprocess(size=SIZE)), path, size=SIZE, metadata={}
    )
    calibrated = TENSORRT.calibrate(path, pictures(16))
    units = TENSORRT.groups(calibrated)
    assert [unit.name for unit in units] == ["a", "b", "c", "d", "head"]
    add = [node.name for node in calibrated.model.graph.node if node.op_type == "Add"][-1]
    for keep, sides in (([], 2), (["c"], 0), (["c", "d"], 0), (["a"], 2)):
        TENSORRT.write(
            calibrated,
            tmp_path / "a.onnx",
            in_float=[unit.nodes[0] for unit in units if unit.name in keep],
        )
        model = onnx.load(tmp_path / "a.onnx")
        assert findings(model) == []
        assert rounded_inputs(model)[add] == sides


def test_the_search_writes_and_judges_files_for_tensorrt(
    fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    within = partial(mixed.quantize_within, scheme=TENSORRT)
    loose = within(fp32, tmp_path / "loose.onnx", pictures(32), budget(fp32, max_drop_id=100))
    assert loose["mixed"]["kept_in_float"] == []
    assert loose["mixed"]["drop_id_points"] > 5, "the model must be one that INT8 hurts"
    tight = within(
        fp32, tmp_path / "tight.onnx", pictures(32), budget(fp32, max_drop_id=5, max_drop_ood=5)
    )
    kept = tight["mixed"]["kept_in_float"]
    assert 1 <= len(kept) < 5
    assert tight["quantized_layers"] == loose["quantized_layers"] - sum(
        "Add" not in name for name in kept
    )
    assert findings(onnx.load(tmp_path / "tight.onnx")) == []
    images = budget(fp32)
    changed = (
        onnx_evaluator(tmp_path / "tight.onnx")(images.pixels).argmax(axis=1) != images.labels
    ).mean()
    assert tight["mixed"]["drop_id_points"] == pytest.approx(100 * changed, abs=1e-3)
    assert tight["mixed"]["drop_id_points"] <= 5
    sizes = [(tmp_path / name).stat().st_size / 1e6 for name in ("loose.onnx", "tight.onnx")]
    assert tight["mixed"]["cost_mb"] == pytest.approx(sizes[1] - sizes[0], abs=1e-3)
    assert not {"cost_ms", "fp32_ms"} & set(tight["mixed"]), "no engine was run"
    assert "in ms, only the device can tell" in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loose.onnx", "tight.onnx"]
