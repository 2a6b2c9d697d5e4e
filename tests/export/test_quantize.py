from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_fakes import SIZE, Block, logits, pictures
from onnx import numpy_helper
from torch import nn

from edgekd.core.errors import EdgekdError
from edgekd.core.preprocess import Preprocess
from edgekd.export.graph import Deployable
from edgekd.export.onnx import export_onnx
from edgekd.export.onnx_graph import to_fp16
from edgekd.export.quantize import calibration as ranges
from edgekd.export.quantize import qdq
from edgekd.export.quantize.onnxruntime import OnnxRuntimeInt8, safe_scales


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    folder = tmp_path_factory.mktemp("quantize")
    export_onnx(
        Deployable(Block(), nn.Linear(16, 4), Preprocess(size=SIZE)),
        folder / "fp32.onnx",
        size=SIZE,
        metadata={"k": "v"},
    )
    described = OnnxRuntimeInt8().quantize(folder / "fp32.onnx", folder / "int8.onnx", pictures(64))
    return folder / "fp32.onnx", folder / "int8.onnx", described


def test_int8_logits_stay_close(files: tuple[Path, Path, dict]) -> None:
    images = pictures(200, seed=1)
    reference, candidate = logits(files[0], images), logits(files[1], images)
    assert not np.array_equal(reference, candidate), "nothing was quantised"
    centred = reference - reference.mean(axis=0)
    error = candidate - reference
    assert np.square(error).mean() < 0.01 * np.square(centred).mean()


def test_every_layer_but_the_stem_is_int8(files: tuple[Path, Path, dict]) -> None:
    _, int8, described = files
    assert described["quantized_layers"] == 5  # depthwise, squeeze-and-excite, pointwise, head
    assert len(described["float_layers"]) == 1
    assert described["calibration_images"] == 64
    model = onnx.load(int8)
    assert {entry.key: entry.value for entry in model.metadata_props} == {"k": "v"}
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert sum(values.dtype == np.int8 and values.ndim > 1 for values in weights.values()) == 5
    writer = {name: node.op_type for node in model.graph.node for name in node.output}
    assert writer["logits"] == "Gemm", "logits must not be rounded to 256 steps"


def test_weight_pairs_cannot_overflow_sixteen_bits() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 33)).astype(np.float32)
    whole = np.round(rows / safe_scales(rows, pairs="neighbours")[:, None])
    assert (255 * np.abs(whole[:, 0:-1:2] + whole[:, 1::2])).max() < 2**15
    assert np.abs(whole).max() == 127, "a channel without a heavy pair keeps all eight bits"
    whole = np.sort(np.round(rows / safe_scales(rows, pairs="any")[:, None]))
    assert (255 * np.abs([whole[:, 0] + whole[:, 1], whole[:, -1] + whole[:, -2]])).max() < 2**15


def test_weight_scales_by_hand() -> None:
    rows = np.array([[2.0, -1.5, 1.0], [1.0, 1.5, -2.0], [0.0, 0.0, 0.0]], dtype=np.float32)
    np.testing.assert_allclose(
        safe_scales(rows, pairs="none"), np.array([2, 2, 127]) / 127, rtol=1e-6
    )
    np.testing.assert_allclose(
        safe_scales(rows, pairs="neighbours"), np.array([2, 2.5, 127]) / 127, rtol=1e-6
    )
    np.testing.assert_allclose(
        safe_scales(rows, pairs="any"), np.array([3, 2.5, 127]) / 127, rtol=1e-6
    )


def test_ranges_are_the_extremes_over_all_batches(files: tuple[Path, Path, dict]) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(files[0]))
    images = pictures(2 * ranges._BATCH + 3)
    found, _ = ranges.observe(model, images, ["logits"])
    expected = logits(files[0], images)
    np.testing.assert_allclose(found["logits"], [expected.min(), expected.max()], atol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.repeat(pictures(1), 8, axis=0), "alike"),
        (np.zeros((1, SIZE, SIZE, 3), np.uint8), "alike"),
        (np.zeros((0, SIZE, SIZE, 3), np.uint8), "no calibration images"),
        (np.zeros((4, 16, 16, 3), np.uint8), "takes uint8"),
        (np.zeros((4, SIZE, SIZE, 3), np.float32), "takes uint8"),
    ],
)
def test_useless_calibration_is_refused(
    files: tuple[Path, Path, dict], tmp_path: Path, images: np.ndarray, message: str
) -> None:
    with pytest.raises(EdgekdError, match=message):
        OnnxRuntimeInt8().quantize(files[0], tmp_path / "x.onnx", images)
    assert not (tmp_path / "x.onnx").exists()


def test_diverged_weights_are_refused(files: tuple[Path, Path, dict], tmp_path: Path) -> None:
    model = onnx.load(files[0])
    weight = next(tensor for tensor in model.graph.initializer if "pointwise.weight" in tensor.name)
    broken = numpy_helper.to_array(weight).copy()
    broken[0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(broken, weight.name))
    onnx.save(model, tmp_path / "nan.onnx")
    with pytest.raises(EdgekdError, match="not finite"):
        OnnxRuntimeInt8().quantize(tmp_path / "nan.onnx", tmp_path / "x.onnx", pictures(8))


def test_fp16_halves_the_weights_and_keeps_inputs_and_outputs(
    files: tuple[Path, Path, dict], tmp_path: Path
) -> None:
    to_fp16(files[0], tmp_path / "fp16.onnx")
    model = onnx.load(tmp_path / "fp16.onnx")
    types = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1}
    assert types == {onnx.TensorProto.FLOAT16}
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    images = pictures(50, seed=2)
    np.testing.assert_allclose(
        logits(tmp_path / "fp16.onnx", images), logits(files[0], images), atol=5e-3
    )


class Positions(Block):
    """With a running sum, which stays in float: edgenext's positions are such a sum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.stem(x))
        return (x + torch.cumsum(torch.ones_like(x), 2)).mean((2, 3))


def test_fp16_beside_a_node_that_stays_in_float(tmp_path: Path) -> None:
    model = Deployable(Positions(), nn.Linear(16, 4), Preprocess(size=SIZE))
    export_onnx(model, tmp_path / "fp32.onnx", size=SIZE, metadata={})
    to_fp16(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx")
    found, wanted = (logits(tmp_path / f"{name}.onnx", pictures(8)) for name in ("fp16", "fp32"))
    np.testing.assert_allclose(found, wanted, atol=2e-2)


def operators(path: Path, folder: Path) -> Counter[str]:
    """Count the operators that ONNX Runtime runs, after its fusions."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def test_nothing_between_the_layers_runs_in_float(
    files: tuple[Path, Path, dict], tmp_path: Path
) -> None:
    found = operators(files[1], tmp_path)
    assert found["QLinearConv"] == 4
    assert found["QLinearMul"] == 2  # HardSwish, and the gate of squeeze-and-excite
    assert found["QLinearAdd"] == 1
    assert found["QLinearGlobalAveragePool"] == 2
    assert not {"HardSwish", "HardSigmoid", "Sigmoid", "DequantizeLinear"} & set(found)
    assert found["Mul"] == found["Add"] == 1  # the normalisation of the pixels


@pytest.mark.parametrize(("low", "high"), [(-9.0, 12.0), (-1.0, 2.0), (-2.0, 40.0)])
@pytest.mark.parametrize("kind", ["HardSwish", "HardSigmoid", "Silu"])
def test_activation_functions_of_bytes(kind: str, low: float, high: float, tmp_path: Path) -> None:
    """Against numpy: no further off than the rounding of the input and of the output explain."""
    values = np.linspace(low, high, 4096, dtype=np.float32).reshape(1, 16, 16, 16)
    model = activation_graph(kind)
    gate = np.clip(values / 6 + 0.5, 0, 1)
    wanted = {
        "HardSwish": values * gate,
        "HardSigmoid": gate,
        "Silu": values / (1 + np.exp(-values.astype(np.float64))),
    }[kind]
    spread = {"x": (low, high), "y": (wanted.min(), wanted.max()), "s": (0.0, 1.0)}
    spread |= {"before": spread["x"], "after": spread["y"]}
    ranges = {name: (np.float32(a), np.float32(b)) for name, (a, b) in spread.items()}
    qdq.quantize(model, ranges, qdq.plan(model, ()), OnnxRuntimeInt8().weight_scales)
    onnx.checker.check_model(model)
    onnx.save(model, tmp_path / "x.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"before": values})[0]
    step = (max(high, 3.0) + 3 if kind == "HardSwish" else high - low) / 255
    steepest = {"HardSwish": 1.5, "HardSigmoid": 1 / 6, "Silu": 1.1}[kind]
    bound = 2.1 * steepest * step + (wanted.max() - min(wanted.min(), 0)) / 200
    bound += max(abs(low), high) / 255 if kind == "Silu" else 0  # its sigmoid is rounded too
    assert np.abs(found - wanted).max() < bound
    if kind == "HardSwish" and low < -3:
        assert np.abs(found[values <= -3.1]).max() < 1e-6
    if kind == "HardSigmoid" and high > 3:
        assert found.max() == 1


def activation_graph(kind: str) -> onnx.ModelProto:
    """A convolution that copies its input, the activation function, and a layer that copies its output."""
    make = onnx.helper.make_node
    nodes = [make("Conv", ["before", "one"], ["x"], "before", group=16)]
    if kind == "Silu":
        nodes += [make("Sigmoid", ["x"], ["s"], "s"), make("Mul", ["x", "s"], ["y"], "y")]
    else:
        facts = {"alpha": 1 / 6, "beta": 0.5} if kind == "HardSigmoid" else {}
        nodes.append(make(kind, ["x"], ["y"], "y", **facts))
    nodes.append(make("Conv", ["y", "one"], ["after"], "after", group=16))
    shape = [1, 16, 16, 16]
    tensors = {
        name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name in ("before", "x", "s", "y", "after")
    }
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [tensors["before"]],
        [tensors["after"]],
        [numpy_helper.from_array(np.ones((16, 1, 1, 1), np.float32), "one")],
        value_info=[tensors["x"], tensors["s"], tensors["y"]],
    )
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )


def test_a_bias_beside_tiny_weights_is_kept(tmp_path: Path) -> None:
    """Its int32 has the product of both scales as its step: 1e-12 here, in which 1 does not fit."""
    weight = np.array([1e-10, 1.0, 0.0], np.float32).reshape(3, 1, 1, 1)
    bias = np.array([1.0, 0.5, -0.25], np.float32)
    node = onnx.helper.make_node("Conv", ["x", "w", "b"], ["y"], "c", group=3)
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 4, 4])
        for name in "xy"
    ]
    constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", ends[:1], ends[1:], constants),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=10,
    )
    span = (np.float32(-1), np.float32(2))
    qdq.quantize(
        model, {"x": span, "y": span}, qdq.plan(model, ()), OnnxRuntimeInt8().weight_scales
    )
    onnx.save(model, tmp_path / "x.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": np.zeros((1, 3, 4, 4), np.float32)})[0]
    np.testing.assert_allclose(found[0, :, 0, 0], bias, atol=3 / 255)
