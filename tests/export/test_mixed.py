from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from export_fakes import Block, logits, pictures, write_onnx
from onnx import numpy_helper

from edgekd.core.errors import GateFailed
from edgekd.export.onnx.evaluate import onnx_evaluator
from edgekd.export.onnx.graphs import to_half
from edgekd.export.quantize import search as mixed
from edgekd.export.quantize.onnx_scheme import OnnxScheme
from edgekd.export.quantize.onnxruntime import OnnxRuntimeInt8
from edgekd.export.quantize.search import AccuracyBudget, Drops, Search
from edgekd.export.quantize.tensorrt import TensorRtInt8
from edgekd.export.quantize.tensorrt_rules import findings

pytestmark = pytest.mark.usefixtures("graphs_once")

SCHEME, TENSORRT = OnnxRuntimeInt8(), TensorRtInt8()


def spoilt(path: Path) -> Path:
    """A model that per-tensor activations ruin: one channel of the depthwise layer is 3,000 times as large as the
    others, and the pointwise layer that reads it divides it away again."""
    model = onnx.load(write_onnx(Block(), 16, path))
    constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def change(ending: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
        [name] = [name for name in constants if name.endswith(ending)]
        values = edit(numpy_helper.to_array(constants[name]))
        constants[name].CopyFrom(numpy_helper.from_array(values, name))

    first = np.where(np.arange(16) == 0, np.float32(3000), np.float32(1))
    change("depthwise.weight", lambda values: values * first.reshape(16, 1, 1, 1))
    change("depthwise.bias", lambda values: values * first)
    change("pointwise.weight", lambda values: 5 * values / first.reshape(1, 16, 1, 1))
    onnx.save(model, path)
    # The classes as likely as each other, so that errors change predictions.
    middle = np.median(logits(path, pictures(64, seed=9)), axis=0)
    change("head.bias", lambda bias: bias - middle)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spoilt(tmp_path_factory.mktemp("mixed") / "fp32.onnx")


def budget(fp32: Path, **limits: float) -> AccuracyBudget:
    """Labels are what FP32 says, so a drop is the share of changed minds."""
    images = pictures(48, seed=3)
    return AccuracyBudget(images, logits(fp32, images).argmax(axis=1), images, **limits)


def test_units_hold_what_int8_changes(fp32: Path, tmp_path: Path) -> None:
    calibrated = SCHEME.calibrate(fp32, pictures(32))
    units = SCHEME.groups(calibrated)
    names = ["depthwise", "reduce", "expand", "pointwise", "Add after pointwise", "head"]
    assert [unit.name for unit in units] == names  # the stem stays in float
    assert [unit.weighted for unit in units] == [True, True, True, True, False, True]
    kinds = {node.name: node.op_type for node in calibrated.model.graph.node}
    followers = [[kinds[name] for name in unit.nodes[1:]] for unit in units[:3]]
    assert followers == [["HardSwish", "GlobalAveragePool", "Mul"], ["Relu"], ["HardSigmoid"]]
    path, everything = tmp_path / "none.onnx", [name for unit in units for name in unit.nodes]
    SCHEME.write(calibrated, path, in_float=everything)
    written = {node.op_type for node in onnx.load(path).graph.node}
    assert not written & {"QuantizeLinear", "DequantizeLinear"}
    found, expected = (logits(file, pictures(8)) for file in (path, fp32))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", [SCHEME, TENSORRT], ids=["ort", "trt"])
def test_search_keeps_what_the_gate_needs(fp32: Path, tmp_path: Path, scheme: OnnxScheme) -> None:
    def within(name: str, **limits: float) -> dict[str, Any]:
        path, gate = tmp_path / name, budget(fp32, **limits)
        return mixed.quantize_within(fp32, path, pictures(32), gate, scheme=scheme)

    loose = within("loose.onnx", max_drop_id=100)
    assert loose["mixed"]["kept_in_float"] == []
    assert loose["mixed"]["drop_id_points"] > 5, "the model must be one that INT8 hurts"
    tight = within("tight.onnx", max_drop_id=5)
    kept = tight["mixed"]["kept_in_float"]
    assert 1 <= len(kept) <= 4
    weighted = sum("Add" not in name for name in kept)
    assert tight["quantized_layers"] == loose["quantized_layers"] - weighted
    images = budget(fp32)
    found = scheme.open(tmp_path / "tight.onnx")(images.pixels).argmax(axis=1)
    changed = 100 * (found != images.labels).mean()
    assert tight["mixed"]["drop_id_points"] == pytest.approx(changed, abs=1e-3)
    assert tight["mixed"]["drop_id_points"] <= 5
    sizes = [(tmp_path / name).stat().st_size / 1e6 for name in ("loose.onnx", "tight.onnx")]
    assert tight["mixed"]["cost_mb"] == pytest.approx(sizes[1] - sizes[0], abs=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loose.onnx", "tight.onnx"]
    agreeing = within("agreeing.onnx", min_agreement=0.95)["mixed"]
    assert agreeing["agreement"] >= 0.95
    assert agreeing["kept_in_float"]


def quantize_within(*arguments: Any) -> dict[str, Any]:
    return mixed.quantize_within(*arguments, scheme=SCHEME)


def test_the_last_resort_is_float_and_is_called_so(
    fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(8, seed=7)

    def same_digits(self: object, path: Path) -> Drops:  # a gate that nothing rounded passes
        same = np.allclose(logits(path, images), logits(fp32, images), atol=1e-4)
        return Drops(0, 0, agreement=float(same))

    monkeypatch.setattr(Search, "drops", same_digits)
    gate = budget(fp32, min_agreement=1.0, search_seconds=0)
    found = quantize_within(fp32, tmp_path / "x.onnx", pictures(32), gate)
    assert len(found["mixed"]["kept_in_float"]) == 6
    assert found["quantized_layers"] == 0
    assert "0 of 5 layers are in INT8" in " ".join(capsys.readouterr().err.split())


def test_a_search_out_of_time_takes_the_others_as_they_come(fp32: Path, tmp_path: Path) -> None:
    calibrated = SCHEME.calibrate(fp32, pictures(32))
    search = Search(fp32, budget(fp32), SCHEME, calibrated, tmp_path)
    units = SCHEME.groups(calibrated)
    order, ranked = search.rank(units)
    assert (ranked, set(order)) == (6, set(units))
    assert order[0].name in ("depthwise", "pointwise")
    hurried, ranked = search.rank(units, deadline=0)
    assert ranked == 1
    assert hurried == units
    quick = budget(fp32, max_drop_id=5, search_seconds=0)
    found = quantize_within(fp32, tmp_path / "a.onnx", pictures(32), quick)["mixed"]
    assert found["drop_id_points"] <= 5
    assert found["search"]["ranked_units"] == 1


@pytest.mark.parametrize(
    ("wanted", "surely"),
    # 256 images here, 256 in the check: the difference of two shares has the error sqrt(2 · 0.96 · 0.04 / 256).
    [(0.96, 0.96 + 1.64 * 0.017321), (0.999, 1), (None, 0), (1.0, 1)],
)
def test_a_search_demands_more_agreement(wanted: float | None, surely: float) -> None:
    images, limit = pictures(128), {} if wanted is None else {"min_agreement": wanted}
    budget = AccuracyBudget(images, np.zeros(128, np.int64), images, **limit)
    assert budget.surely().min_agreement == pytest.approx(surely, abs=1e-5)


def test_a_gate_nobody_passes_is_a_failed_gate(fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(GateFailed, match="even with everything in float"):
        quantize_within(fp32, tmp_path / "x.onnx", pictures(32), budget(fp32, max_drop_id=-1))


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
    assert {len(unit.nodes) for unit in units} == {1}, "nothing follows a layer into INT8"
    for keep in (keep for count in range(6) for keep in combinations(nodes, count)):
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
