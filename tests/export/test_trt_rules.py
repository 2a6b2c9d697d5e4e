from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgekd.export.onnx_graph import output_axis
from edgekd.export.quantize.tensorrt_rules import ABSENT, findings


def legal() -> ModelProto:
    """uint8 image → normalisation → quantized Conv → residual Add of two quantized maps → quantized Gemm."""
    rng = np.random.default_rng(0)

    def pair(name: str) -> list[NodeProto]:
        return [
            helper.make_node("QuantizeLinear", [name, "s", "z"], [f"{name}_q"], name=f"{name}_Q"),
            helper.make_node(
                "DequantizeLinear", [f"{name}_q", "s", "z"], [f"{name}_d"], name=f"{name}_DQ"
            ),
        ]

    def weight(name: str, axis: int) -> NodeProto:
        inputs = [name, f"{name}_s", f"{name}_z"]
        return helper.make_node(
            "DequantizeLinear", inputs, [f"{name}_d"], name=f"{name}_DQ", axis=axis
        )

    nodes = [
        weight("w", 0),
        weight("v", 0),
        helper.make_node("Cast", ["image"], ["x"], name="cast", to=TensorProto.FLOAT),
        *pair("x"),
        helper.make_node("Conv", ["x_d", "w_d", "b"], ["y"], name="conv"),
        *pair("y"),
        helper.make_node("Add", ["x_d", "y_d"], ["r"], name="add"),
        helper.make_node("ReduceMean", ["r", "axes"], ["f"], name="mean", keepdims=0),
        *pair("f"),
        helper.make_node("Gemm", ["f_d", "v_d", "c"], ["logits"], name="head", transB=1),
    ]
    constants = {
        "s": np.float32(0.02),
        "z": np.int8(0),
        "w": rng.integers(-127, 128, (4, 4, 1, 1), dtype=np.int8),
        "w_s": np.full(4, 0.01, np.float32),
        "w_z": np.zeros(4, np.int8),
        "v": rng.integers(-127, 128, (3, 4), dtype=np.int8),
        "v_s": np.full(3, 0.01, np.float32),
        "v_z": np.zeros(3, np.int8),
        "b": np.zeros(4, np.float32),
        "c": np.zeros(3, np.float32),
        "axes": np.array([2, 3]),
    }
    graph = helper.make_graph(
        nodes,
        "legal",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 4, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def node(model: ModelProto, name: str) -> NodeProto:
    return next(item for item in model.graph.node if item.name == name)


def put(model: ModelProto, name: str, value: np.ndarray | np.generic) -> None:
    """Set or add a constant."""
    tensor = numpy_helper.from_array(np.asarray(value), name)
    for known in model.graph.initializer:
        if known.name == name:
            known.CopyFrom(tensor)
            return
    model.graph.initializer.append(tensor)


def rewire(model: ModelProto, reader: str, index: int, name: str) -> None:
    node(model, reader).input[index] = name


def insert(model: ModelProto, before: str, *nodes: NodeProto) -> None:
    """Put nodes where their inputs exist already."""
    position = [item.name for item in model.graph.node].index(before)
    for offset, new in enumerate(nodes):
        model.graph.node.insert(position + offset, new)


def newer_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 26


def integer_conv(model: ModelProto) -> None:
    insert(model, "conv", helper.make_node("ConvInteger", ["x_q", "w"], ["unused"], name="integer"))


def foreign_domain(model: ModelProto) -> None:
    insert(
        model,
        "conv",
        helper.make_node("QGemm", ["f"], ["unused"], name="foreign", domain="com.microsoft"),
    )


def double_cast(model: ModelProto) -> None:
    insert(
        model,
        "conv",
        helper.make_node("Cast", ["x"], ["unused"], name="wide", to=TensorProto.DOUBLE),
    )


def reshaped_image(model: ModelProto) -> None:
    put(model, "shape", np.array([-1, 4, 8, 8]))
    insert(model, "cast", helper.make_node("Reshape", ["image", "shape"], ["flat"], name="reshape"))
    rewire(model, "cast", 0, "flat")


def image_as_integers(model: ModelProto) -> None:
    """The uint8 image taken for already quantized values."""
    put(model, "zu", np.uint8(0))
    node(model, "x_DQ").input[:] = ["image", "s", "zu"]


def bare_quantize(model: ModelProto) -> None:
    insert(
        model,
        "conv",
        helper.make_node("MaxPool", ["x_q"], ["pooled"], name="pool", kernel_shape=[1, 1]),
    )


def dangling_dequantize(model: ModelProto) -> None:
    insert(
        model,
        "x_DQ",
        helper.make_node("MaxPool", ["x_q"], ["pooled"], name="pool", kernel_shape=[1, 1]),
    )
    rewire(model, "x_DQ", 0, "pooled")


def uint8_activation(model: ModelProto) -> None:
    put(model, "zu", np.uint8(0))
    for name in ("x_Q", "x_DQ"):
        rewire(model, name, 2, "zu")


def default_type(model: ModelProto) -> None:
    """Without a zero point ONNX means uint8."""
    del node(model, "x_Q").input[2]
    del node(model, "x_DQ").input[2]


def shifted(model: ModelProto) -> None:
    put(model, "z1", np.int8(-5))
    for name in ("y_Q", "y_DQ"):
        rewire(model, name, 2, "z1")


def shifted_weight(model: ModelProto) -> None:
    put(model, "w_z", np.array([0, 0, 3, 0], np.int8))


def zero_points_missing(model: ModelProto) -> None:
    put(model, "w_z", np.int8(0))


def computed_scale(model: ModelProto) -> None:
    insert(
        model, "y_Q", helper.make_node("ReduceMax", ["y"], ["dynamic"], name="range", keepdims=0)
    )
    for name in ("y_Q", "y_DQ"):
        rewire(model, name, 1, "dynamic")


def zero_scale(model: ModelProto) -> None:
    put(model, "w_s", np.array([0.01, 0, 0.01, 0.01], np.float32))


def negative_scale(model: ModelProto) -> None:
    put(model, "w_s", np.array([0.01, -0.01, 0.01, 0.01], np.float32))


def infinite_scale(model: ModelProto) -> None:
    put(model, "w_s", np.array([0.01, np.inf, 0.01, 0.01], np.float32))


def blocks(model: ModelProto) -> None:
    put(model, "w_s", np.full((4, 2, 1, 1), 0.01, np.float32))
    put(model, "w_z", np.zeros((4, 2, 1, 1), np.int8))


def wrong_count(model: ModelProto) -> None:
    put(model, "w_s", np.full(3, 0.01, np.float32))
    put(model, "w_z", np.zeros(3, np.int8))


def input_channels(model: ModelProto) -> None:
    node(model, "w_DQ").attribute[0].i = 1


def channels_of_activation(model: ModelProto) -> None:
    put(model, "s4", np.full(4, 0.02, np.float32))
    put(model, "z4", np.zeros(4, np.int8))
    for name in ("x_Q", "x_DQ"):
        rewire(model, name, 1, "s4")
        rewire(model, name, 2, "z4")
        node(model, name).attribute.append(helper.make_attribute("axis", 1))


def float_input(model: ModelProto) -> None:
    rewire(model, "conv", 0, "x")


def integer_bias(model: ModelProto) -> None:
    put(model, "bi", np.zeros(4, np.int32))
    put(model, "bs", np.full(4, 1e-4, np.float32))
    put(model, "bz", np.zeros(4, np.int32))
    insert(
        model,
        "conv",
        helper.make_node("DequantizeLinear", ["bi", "bs", "bz"], ["b_d"], name="b_DQ", axis=0),
    )
    rewire(model, "conv", 2, "b_d")


def quantized_bias(model: ModelProto) -> None:
    put(model, "b8", np.zeros(4, np.int8))
    insert(
        model, "conv", helper.make_node("DequantizeLinear", ["b8", "s", "z"], ["b_d"], name="b_DQ")
    )
    rewire(model, "conv", 2, "b_d")


def added_bias(model: ModelProto) -> None:
    put(model, "b8", np.zeros((1, 4, 1, 1), np.int8))
    insert(
        model, "add", helper.make_node("DequantizeLinear", ["b8", "s", "z"], ["b_d"], name="b_DQ")
    )
    rewire(model, "add", 0, "b_d")


def half_residual(model: ModelProto) -> None:
    rewire(model, "add", 1, "y")


ILLEGAL: dict[str, tuple[Callable[[ModelProto], None], str, str]] = {
    "newer opset": (newer_opset, "opset", "opset"),
    "ConvInteger": (integer_conv, "operator", "integer"),
    "foreign domain": (foreign_domain, "operator", "foreign"),
    "float64": (double_cast, "double", "wide"),
    "image reshaped before the cast": (reshaped_image, "uint8-input", "reshape"),
    "image read as int8": (image_as_integers, "uint8-input", "x_DQ"),
    "image read as int8, its type": (image_as_integers, "type", "x_DQ"),
    "Q without DQ": (bare_quantize, "quantize-without-dequantize", "x_Q"),
    "DQ without Q": (dangling_dequantize, "dequantize-without-quantize", "x_DQ"),
    "uint8 activation": (uint8_activation, "type", "x_Q"),
    "no zero point": (default_type, "type", "x_Q"),
    "asymmetric activation": (shifted, "zero-point", "y_Q"),
    "asymmetric weight": (shifted_weight, "zero-point", "w_DQ"),
    "one zero point for four scales": (zero_points_missing, "zero-point", "w_DQ"),
    "computed scale": (computed_scale, "scale", "y_Q"),
    "scale 0": (zero_scale, "scale", "w_DQ"),
    "negative scale": (negative_scale, "scale", "w_DQ"),
    "infinite scale": (infinite_scale, "scale", "w_DQ"),
    "blocks": (blocks, "scale", "w_DQ"),
    "three scales for four channels": (wrong_count, "axis", "w_DQ"),
    "input channels": (input_channels, "axis", "w_DQ"),
    "per-channel activation": (channels_of_activation, "per-channel-activation", "x_Q"),
    "float input": (float_input, "half-quantized", "conv"),
    "int32 bias": (integer_bias, "bias", "conv"),
    "int8 bias": (quantized_bias, "bias", "conv"),
    "int8 bias by Add": (added_bias, "bias", "add"),
    "half a residual": (half_residual, "residual", "add"),
}


def test_legal_graph_has_no_findings() -> None:
    onnx.checker.check_model(legal(), full_check=True)
    assert findings(legal()) == []


@pytest.mark.parametrize("case", ILLEGAL)
def test_each_rule_finds_its_graph(case: str) -> None:
    change, rule, place = ILLEGAL[case]
    model = legal()
    change(model)
    found = [
        finding for finding in findings(model) if (finding.rule, finding.node) == (rule, place)
    ]
    assert found, findings(model)
    assert found[0].reason[0].isupper()
    assert found[0].reason.endswith(".")
    assert "\n" not in found[0].reason


def test_weights_may_be_quantized_inside_the_graph() -> None:
    """Float weights with Q and DQ behind them are as good as int8 weights with DQ."""
    model = legal()
    put(model, "w", np.random.default_rng(1).normal(size=(4, 4, 1, 1)).astype(np.float32))
    insert(
        model,
        "w_DQ",
        helper.make_node("QuantizeLinear", ["w", "w_s", "w_z"], ["w_q"], name="w_Q", axis=0),
    )
    rewire(model, "w_DQ", 0, "w_q")
    assert findings(model) == []
    node(model, "w_Q").attribute[0].i = 1
    node(model, "w_DQ").attribute[0].i = 1
    assert [finding.rule for finding in findings(model)] == ["axis"]


@pytest.mark.parametrize(
    ("op", "attributes", "axis"),
    [
        ("Conv", {}, 0),
        ("ConvTranspose", {}, 1),
        ("Gemm", {}, 1),
        ("Gemm", {"transB": 1}, 0),
        ("MatMul", {}, 1),
    ],
)
def test_axis_of_output_channels(op: str, attributes: dict[str, int], axis: int) -> None:
    assert output_axis(helper.make_node(op, ["x", "w"], ["y"], **attributes), 2) == axis


NVIDIA_REFUSES = (
    "ConvInteger",
    "foreign domain",
    "image reshaped before the cast",
    "image read as int8",
    "uint8 activation",
    "asymmetric activation",
    "asymmetric weight",
    "one zero point for four scales",
    "scale 0",
    "negative scale",
    "blocks",
    "three scales for four channels",
    "int32 bias",
)


def test_nvidias_parser_takes_the_legal_graph() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from edgekd.targets.trt_build import parse

    assert parse(trt, legal().SerializeToString())[2] == []


@pytest.mark.parametrize("case", NVIDIA_REFUSES)
def test_nvidias_parser_refuses_what_the_rules_refuse(case: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from edgekd.targets.trt_build import parse

    model = legal()
    ILLEGAL[case][0](model)
    assert parse(trt, model.SerializeToString())[2]


def test_absent_operators_are_those_that_nvidias_parser_lacks() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from edgekd.targets.trt_build import _logger

    builder = trt.Builder(_logger(trt))
    parser = trt.OnnxParser(builder.create_network(0), _logger(trt))
    names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert {name for name in names if not parser.supports_operator(name)} == set(ABSENT) & names
