from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_fakes import SIZE, int8_files, logits, pictures
from onnx import numpy_helper
from onnxruntime.quantization.calibrate import HistogramCollector
from torch import nn

from edgekd.core.errors import EdgekdError
from edgekd.export.onnx.graphs import Graph, attribute, rewrite, to_half
from edgekd.export.quantize import calibration as calibrators
from edgekd.export.quantize import calibration as ranges
from edgekd.export.quantize import qdq
from edgekd.export.quantize.calibration import BINS, entropy, mse, percentile, rounding_error
from edgekd.export.quantize.integer_form import can_be_padded, integer_form
from edgekd.export.quantize.onnx_scheme import OnnxScheme, correct_biases
from edgekd.export.quantize.onnxruntime import OnnxRuntimeInt8, safe_scales
from edgekd.export.quantize.tensorrt import TensorRtInt8

pytestmark = pytest.mark.usefixtures("graphs_once")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    return int8_files(OnnxRuntimeInt8(), tmp_path_factory.mktemp("quantize"))


def test_int8_file(files: tuple[Path, Path, dict], tmp_path: Path) -> None:
    images = pictures(200, seed=1)
    reference, candidate = logits(files[0], images), logits(files[1], images)
    assert not np.array_equal(reference, candidate), "nothing was quantised"
    centred = reference - reference.mean(axis=0)
    assert np.square(candidate - reference).mean() < 0.01 * np.square(centred).mean()
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
    # Nothing between the layers runs in float.
    found = operators(int8, tmp_path)
    assert found["QLinearConv"] == 4
    assert found["QLinearMul"] == 2  # HardSwish, and the gate of squeeze-and-excite
    assert found["QLinearAdd"] == 1
    assert found["QLinearGlobalAveragePool"] == 2
    assert not {"HardSwish", "HardSigmoid", "Sigmoid", "DequantizeLinear"} & set(found)
    assert found["Mul"] == found["Add"] == 1  # the normalisation of the pixels


@pytest.mark.parametrize(
    ("pairs", "largest"), [("none", [2, 2]), ("neighbours", [2, 2.5]), ("any", [3, 2.5])]
)
def test_weight_scales_by_hand(pairs: str, largest: list[float]) -> None:
    """Sums of two products of bytes fit into 16 bits, whichever two the processor adds."""
    rows = np.array([[2.0, -1.5, 1.0], [1.0, 1.5, -2.0], [0.0, 0.0, 0.0]], dtype=np.float32)
    expected = np.array([*largest, 127]) / 127
    np.testing.assert_allclose(safe_scales(rows, pairs=pairs), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.repeat(pictures(1), 8, axis=0), "alike"),
        (np.zeros((0, SIZE, SIZE, 3), np.uint8), "no calibration images"),
        (pictures(8), "not finite"),
    ],
    ids=["alike", "none", "weights"],
)
def test_useless_calibration_and_diverged_weights_are_refused(
    files: tuple[Path, Path, dict], tmp_path: Path, images: np.ndarray, message: str
) -> None:
    model = onnx.load(files[0])
    if message == "not finite":
        weight = next(one for one in model.graph.initializer if "pointwise.weight" in one.name)
        broken = numpy_helper.to_array(weight) * np.float32(np.nan)
        weight.CopyFrom(numpy_helper.from_array(broken, weight.name))
    onnx.save(model, tmp_path / "fp32.onnx")
    with pytest.raises(EdgekdError, match=message):
        OnnxRuntimeInt8().quantize(tmp_path / "fp32.onnx", tmp_path / "x.onnx", images)
    assert not (tmp_path / "x.onnx").exists()


def test_fp16_halves_the_weights_and_keeps_inputs_and_outputs(fp32: Path, tmp_path: Path) -> None:
    rewrite(fp32, tmp_path / "fp16.onnx", to_half)
    model = onnx.load(tmp_path / "fp16.onnx")
    types = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1}
    assert types == {onnx.TensorProto.FLOAT16}
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    images = pictures(50, seed=2)
    found = logits(tmp_path / "fp16.onnx", images)
    np.testing.assert_allclose(found, logits(fp32, images), atol=5e-3)


def operators(path: Path, folder: Path) -> Counter[str]:
    """Count the operators that ONNX Runtime runs, after its fusions."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize(("low", "high"), [(-9.0, 12.0), (-1.0, 2.0)])
@pytest.mark.parametrize("kind", ["HardSwish", "HardSigmoid", "Silu"])
def test_activation_functions_of_bytes(kind: str, low: float, high: float) -> None:
    """Against numpy: no further off than the rounding of the input and of the output explain."""
    values = np.linspace(low, high, 4096, dtype=np.float32).reshape(1, 16, 16, 16)
    model, gate = activation_graph(kind), np.clip(values / 6 + 0.5, 0, 1)
    silu = values / (1 + np.exp(-values.astype(np.float64)))
    wanted = {"HardSwish": values * gate, "HardSigmoid": gate, "Silu": silu}[kind]
    before, after = (low, high), (wanted.min(), wanted.max())
    spread = {"x": before, "before": before, "y": after, "after": after, "s": (0.0, 1.0)}
    ranges = {name: (np.float32(a), np.float32(b)) for name, (a, b) in spread.items()}
    qdq.quantize(model, ranges, qdq.plan(model, ()), OnnxRuntimeInt8().weight_scales)
    onnx.checker.check_model(model)
    found = computed(model, before=values)
    step = (max(high, 3.0) + 3 if kind == "HardSwish" else high - low) / 255
    steepest = {"HardSwish": 1.5, "HardSigmoid": 1 / 6, "Silu": 1.1}[kind]
    bound = 2.1 * steepest * step + (wanted.max() - min(wanted.min(), 0)) / 200
    bound += max(abs(low), high) / 255 if kind == "Silu" else 0  # its sigmoid is rounded too
    assert np.abs(found - wanted).max() < bound
    if kind == "HardSwish" and low < -3:
        assert np.abs(found[values <= -3.1]).max() < 1e-6
    if kind == "HardSigmoid" and high > 3:
        assert found.max() == 1


def on_graph(
    nodes: list[Any], constants: dict[str, np.ndarray], shape: list[int], *names: str
) -> onnx.ModelProto:
    """A graph from the first name to the last, all float tensors of `shape`."""
    make, single = onnx.helper, onnx.TensorProto.FLOAT
    first, *inner, last = (make.make_tensor_value_info(name, single, shape) for name in names)
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = make.make_graph(nodes, "g", [first], [last], stored, value_info=inner)
    return make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10)


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
    one = {"one": np.ones((16, 1, 1, 1), np.float32)}
    return on_graph(nodes, one, [1, 16, 16, 16], "before", "x", "s", "y", "after")


def computed(model: onnx.ModelProto, **inputs: np.ndarray) -> np.ndarray:
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=providers)
    return session.run(None, inputs)[0]


def test_a_bias_beside_tiny_weights_is_kept() -> None:
    """Its int32 has the product of both scales as its step: 1e-12 here, in which 1 does not fit."""
    weight = np.array([1e-10, 1.0, 0.0], np.float32).reshape(3, 1, 1, 1)
    bias = np.array([1.0, 0.5, -0.25], np.float32)
    node = onnx.helper.make_node("Conv", ["x", "w", "b"], ["y"], "c", group=3)
    model = on_graph([node], {"w": weight, "b": bias}, [1, 3, 4, 4], "x", "y")
    span = (np.float32(-1), np.float32(2))
    scheme = OnnxRuntimeInt8()
    qdq.quantize(model, {"x": span, "y": span}, qdq.plan(model, ()), scheme.weight_scales)
    found = computed(model, x=np.zeros((1, 3, 4, 4), np.float32))
    np.testing.assert_allclose(found[0, :, 0, 0], bias, atol=3 / 255)


def one_layer(group: int, bias: np.ndarray, *, shared: bool = False) -> onnx.ModelProto:
    """`x` [B, 4, H, W] through one convolution with two outputs, without a file or a test image."""
    weight = np.arange(2 * (4 // group), dtype=np.float32).reshape(2, 4 // group, 1, 1) + 0.4
    nodes = [onnx.helper.make_node("Conv", ["x", "w", "b"], ["y"], "conv", group=group)]
    nodes += [onnx.helper.make_node("Add", ["y", "b"], ["z"], "add")] if shared else []
    constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], constants))


@pytest.mark.parametrize(
    ("group", "expected"),
    [(1, [10 + 0.4 * 10, 20 + 0.4 * 10]), (2, [10 + 0.4 * (1 + 2), 20 + 0.4 * (3 + 4)])],
)
def test_biases_are_corrected_by_hand(group: int, expected: list[float]) -> None:
    """Weights k + 0.4 are rounded to k, so the mean of each input is missing 0.4 times."""
    bias, scales = np.array([10, 20], np.float32), {"w": (0, np.ones(2, np.float32))}
    model, means = one_layer(group, bias), {"x": np.array([1.0, 2.0, 3.0, 4.0])}
    assert correct_biases(Graph(model), means, scales) == 1
    corrected = numpy_helper.to_array(model.graph.initializer[1])
    np.testing.assert_allclose(corrected, expected, rtol=1e-6)
    for unknown, given in ((one_layer(1, bias, shared=True), means), (one_layer(1, bias), {})):
        assert correct_biases(Graph(unknown), given, scales) == 0
        assert np.array_equal(numpy_helper.to_array(unknown.graph.initializer[1]), bias)


def heavy(kind: str, n: int = 200_000) -> np.ndarray:
    """Values with outliers: to both sides, or to the right only as after a ReLU."""
    values = np.random.default_rng(0).standard_t(2.5, size=n).astype(np.float32)
    return np.maximum(values, 0) if kind == "rectified" else values + np.float32(0.3)


def counted(values: np.ndarray) -> tuple[np.ndarray, float]:
    limit = float(np.abs(values).max())
    return np.histogram(values, 2 * BINS, range=(-limit, limit))[0], limit


@pytest.mark.parametrize("kind", ["both", "rectified"])
def test_percentile_is_numpys_and_entropy_onnxruntimes(kind: str) -> None:
    values = heavy(kind)
    counts, limit = counted(values)
    step = 1.5 * limit / BINS
    expected = np.percentile(values, [0.005, 99.995])
    np.testing.assert_allclose(percentile(counts, limit, False), expected, atol=step)
    low, high = percentile(counts, limit, True)
    assert high == -low == pytest.approx(np.percentile(np.abs(values), 99.99), abs=step)
    assert high < 0.9 * limit, "the outliers must have been cut"
    if kind == "rectified":
        theirs = HistogramCollector("entropy", False, calibrators._ENTROPY_BINS, 128, None, None)
        theirs.collect_value({"x": values})
        expected = theirs.compute_entropy()["x"][:2]
        found = entropy(counts, limit, False)
        assert max(found[0], 0.0) == expected[0] == 0
        assert found[1] == pytest.approx(float(expected[1]), rel=1e-3)
        assert found[1] < 0.9 * values.max()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["both", "rectified"])
def test_mse_is_as_good_as_brute_force_on_the_raw_values(kind: str, symmetric: bool) -> None:
    """A million values within 4, and one of 30 that is not worth steps three times as wide."""
    values = np.append(np.random.default_rng(0).normal(size=10_000).clip(-4, 4), 30.0)
    values = np.maximum(values, 0) if kind == "rectified" else values
    weights = np.append(np.full(10_000, 100), 1)
    counts = np.histogram(values, 2 * BINS, range=(-30, 30), weights=weights)[0].astype(np.int64)

    def error(low: float, high: float) -> float:
        return rounding_error(values, weights.astype(float), low, high, symmetric=symmetric)

    low, high = mse(counts, 30.0, symmetric)
    highs, lows = np.linspace(2, 30, 57), [0.0] if kind == "rectified" else np.linspace(-4, -2, 9)
    pairs = [(-end, end) for end in highs] if symmetric else [(a, b) for a in lows for b in highs]
    assert error(low, high) <= 1.03 * min(error(float(a), float(b)) for a, b in pairs)
    assert high < 25, "the outlier must have been cut"


def test_rounding_error_by_hand() -> None:
    def error(values: list[float], weights: list[float], low: float, high: float) -> float:
        return rounding_error(
            np.array(values), np.array(weights), low, high, symmetric=low == -high
        )

    assert error([0.4, 1.0, 300.0], [2, 1, 1], 0.0, 255.0) == pytest.approx(2 * 0.16 + 45**2)
    assert error([-0.4, -1.0, -300.0], [2, 1, 1], -127, 127) == pytest.approx(2 * 0.16 + 172**2)
    assert error([-10.4, 3.0], [1, 1], -10.0, 245.0) == pytest.approx(0.16)


@pytest.fixture(scope="module")
def fp32(files: tuple[Path, Path, dict]) -> Path:
    return files[0]


def test_histograms_count_every_value_of_every_image(fp32: Path) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(fp32))
    images = pictures(2 * ranges._WHOLE + 1)
    extremes, _ = ranges.observe(model, images, ranges.float_activations(Graph(model)))
    counts, values = ranges.histograms(model, images, extremes), logits(fp32, images)
    np.testing.assert_allclose(extremes["logits"], [values.min(), values.max()], atol=1e-5)
    limit = np.abs(values).max()
    expected = np.histogram(values, 2 * BINS, range=(-limit, limit))[0]
    np.testing.assert_array_equal(counts["logits"], expected)
    assert all(found.sum() % len(images) == 0 for found in counts.values())


@pytest.mark.parametrize(
    ("calibrator", "scheme"),
    [("percentile", OnnxRuntimeInt8()), ("entropy", OnnxRuntimeInt8()), ("mse", TensorRtInt8())],
)
def test_both_schemes_cover_what_the_calibrator_chooses(
    fp32: Path, tmp_path: Path, calibrator: str, scheme: OnnxScheme
) -> None:
    def scales(calibrator: str | None) -> np.ndarray:
        chosen = {"calibrator": calibrator} if calibrator else {}
        facts = scheme.quantize(fp32, tmp_path / "a.onnx", pictures(32), **chosen)
        assert facts["calibrator"] == (calibrator or "minmax")
        assert facts.get("percentile") == (99.99 if calibrator == "percentile" else None)
        constants = onnx.load(tmp_path / "a.onnx").graph.initializer
        single = [one for one in constants if one.name.endswith("scale") and not one.dims]
        return np.array(
            [numpy_helper.to_array(one) for one in sorted(single, key=lambda o: o.name)]
        )

    narrow, wide = scales(calibrator), scales(None)
    assert (narrow <= 1.001 * wide).all()
    assert (narrow < 0.99 * wide).any()


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


X = np.random.default_rng(0).normal(size=(3, 8, 6, 6)).astype(np.float32)


def groups(model: onnx.ModelProto) -> list[int]:
    found = [attribute(node, "group", 1) for node in model.graph.node if node.op_type == "Conv"]
    return [group for group in found if group > 1]


@pytest.mark.parametrize(("inside", "padded"), [(24, 32), (32, 32)])
def test_depthwise_channels_are_padded(inside: int, padded: int, tmp_path: Path) -> None:
    model = exported(Inverted(inside), tmp_path / "x.onnx")
    form = integer_form(model)
    onnx.checker.check_model(form, full_check=True)
    assert groups(form) == [padded]
    shapes = sorted(list(t.dims) for t in form.graph.initializer if len(t.dims) == 4)
    assert [8, padded, 1, 1] in shapes, "the projection reads the zeros"
    assert [8, 8, 1, 1] not in shapes
    np.testing.assert_allclose(computed(form, x=X), computed(model, x=X), rtol=0, atol=2e-6)
    assert groups(model) == [inside], "the given model stays"
    assert groups(integer_form(model, padded=False)) == [inside]
    assert can_be_padded(model) == (inside != padded)


def test_channels_that_are_told_apart_stay_and_means_become_pools(tmp_path: Path) -> None:
    form = integer_form(exported(Inverted(24, split=True), tmp_path / "x.onnx"))
    assert groups(form) == [24]
    kinds = [node.op_type for node in form.graph.node]
    assert "ReduceMean" not in kinds
    assert kinds.count("GlobalAveragePool") == 1


def test_what_works_on_integers_stays_as_it_is() -> None:
    """An index that is a constant has no range, although all of its activations (none) are bytes."""
    make, constants = onnx.helper.make_node, {
        "index": np.array([1, 0], np.int64), "axes": np.array([0], np.int64),
        "weight": np.ones((2, 2), np.float32),
    }  # fmt: skip
    nodes = [
        make("MatMul", ["x", "weight"], ["y"], "layer"),
        make("Unsqueeze", ["index", "axes"], ["rows"], "rows"),
        make("GatherND", ["y", "rows"], ["z"], "gather"),
    ]
    model = on_graph(nodes, constants, [2, 2], "x", "z")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    chosen = qdq.plan(onnx.shape_inference.infer_shapes(model), ())
    assert set(chosen.taken) == {"layer"}
    assert "rows" not in chosen.rounded
