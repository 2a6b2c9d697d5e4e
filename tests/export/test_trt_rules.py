from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


Edit = Callable[[ModelProto], None]


def node(model: ModelProto, name: str) -> NodeProto:
    return next(item for item in model.graph.node if item.name == name)


def put(**values: Any) -> Edit:
    """Set or add constants."""

    def edit(model: ModelProto) -> None:
        for name, value in values.items():
            for known in [one for one in model.graph.initializer if one.name == name]:
                model.graph.initializer.remove(known)
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))

    return edit


def wire(*names: str, place: int, to: str) -> Edit:
    """Let the nodes `names` read the tensor `to`."""

    def edit(model: ModelProto) -> None:
        for name in names:
            node(model, name).input[place] = to

    return edit


def insert(
    before: str, op: str, inputs: list[str], output: str, name: str, **attributes: Any
) -> Edit:
    """Put a node where its inputs exist already."""

    def edit(model: ModelProto) -> None:
        position = [item.name for item in model.graph.node].index(before)
        made = helper.make_node(op, inputs, [output], name=name, **attributes)
        model.graph.node.insert(position, made)

    return edit


def set_axis(*names: str, axis: int) -> Edit:
    def edit(model: ModelProto) -> None:
        for name in names:
            del node(model, name).attribute[:]
            node(model, name).attribute.append(helper.make_attribute("axis", axis))

    return edit


def newer_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 26


def without_zero_point(model: ModelProto) -> None:
    """Then ONNX means uint8."""
    for name in ("x_Q", "x_DQ"):
        del node(model, name).input[2]


def image_as_integers(model: ModelProto) -> None:
    """The uint8 image taken for already quantized values."""
    put(zu=np.uint8(0))(model)
    node(model, "x_DQ").input[:] = ["image", "s", "zu"]


def weight_scale(*values: float) -> Edit:
    return put(w_s=np.array(values, np.float32))


INT8_BIAS = insert("conv", "DequantizeLinear", ["b8", "s", "z"], "b_d", "b_DQ")
POOL = {"kernel_shape": [1, 1]}
ILLEGAL: dict[str, tuple[str, str, list[Edit]]] = {
    "newer opset": ("opset", "opset", [newer_opset]),
    "ConvInteger": (
        "operator",
        "integer",
        [insert("conv", "ConvInteger", ["x_q", "w"], "u", "integer")],
    ),
    "foreign domain": (
        "operator",
        "foreign",
        [insert("conv", "QGemm", ["f"], "u", "foreign", domain="com.microsoft")],
    ),
    "float64": (
        "double",
        "wide",
        [insert("conv", "Cast", ["x"], "u", "wide", to=TensorProto.DOUBLE)],
    ),
    "image reshaped before the cast": (
        "uint8-input",
        "reshape",
        [
            put(shape=np.array([-1, 4, 8, 8])),
            insert("cast", "Reshape", ["image", "shape"], "flat", "reshape"),
            wire("cast", place=0, to="flat"),
        ],
    ),
    "image read as int8": ("uint8-input", "x_DQ", [image_as_integers]),
    "image read as int8, its type": ("type", "x_DQ", [image_as_integers]),
    "Q without DQ": (
        "quantize-without-dequantize",
        "x_Q",
        [insert("conv", "MaxPool", ["x_q"], "p", "pool", **POOL)],
    ),
    "DQ without Q": (
        "dequantize-without-quantize",
        "x_DQ",
        [insert("x_DQ", "MaxPool", ["x_q"], "p", "pool", **POOL), wire("x_DQ", place=0, to="p")],
    ),
    "uint8 activation": (
        "type",
        "x_Q",
        [put(zu=np.uint8(0)), wire("x_Q", "x_DQ", place=2, to="zu")],
    ),
    "no zero point": ("type", "x_Q", [without_zero_point]),
    "asymmetric activation": (
        "zero-point",
        "y_Q",
        [put(z1=np.int8(-5)), wire("y_Q", "y_DQ", place=2, to="z1")],
    ),
    "asymmetric weight": ("zero-point", "w_DQ", [put(w_z=np.array([0, 0, 3, 0], np.int8))]),
    "one zero point for four scales": ("zero-point", "w_DQ", [put(w_z=np.int8(0))]),
    "computed scale": (
        "scale",
        "y_Q",
        [
            insert("y_Q", "ReduceMax", ["y"], "dynamic", "range", keepdims=0),
            wire("y_Q", "y_DQ", place=1, to="dynamic"),
        ],
    ),
    "scale 0": ("scale", "w_DQ", [weight_scale(0.01, 0, 0.01, 0.01)]),
    "negative scale": ("scale", "w_DQ", [weight_scale(0.01, -0.01, 0.01, 0.01)]),
    "infinite scale": ("scale", "w_DQ", [weight_scale(0.01, np.inf, 0.01, 0.01)]),
    "blocks": (
        "scale",
        "w_DQ",
        [put(w_s=np.full((4, 2, 1, 1), 0.01, np.float32), w_z=np.zeros((4, 2, 1, 1), np.int8))],
    ),
    "three scales for four channels": (
        "axis",
        "w_DQ",
        [weight_scale(0.01, 0.01, 0.01), put(w_z=np.zeros(3, np.int8))],
    ),
    "input channels": ("axis", "w_DQ", [set_axis("w_DQ", axis=1)]),
    "per-channel activation": (
        "per-channel-activation",
        "x_Q",
        [
            put(s4=np.full(4, 0.02, np.float32), z4=np.zeros(4, np.int8)),
            wire("x_Q", "x_DQ", place=1, to="s4"),
            wire("x_Q", "x_DQ", place=2, to="z4"),
            set_axis("x_Q", "x_DQ", axis=1),
        ],
    ),
    "float input": ("half-quantized", "conv", [wire("conv", place=0, to="x")]),
    "int32 bias": (
        "bias",
        "conv",
        [
            put(
                bi=np.zeros(4, np.int32), bs=np.full(4, 1e-4, np.float32), bz=np.zeros(4, np.int32)
            ),
            insert("conv", "DequantizeLinear", ["bi", "bs", "bz"], "b_d", "b_DQ", axis=0),
            wire("conv", place=2, to="b_d"),
        ],
    ),
    "int8 bias": (
        "bias",
        "conv",
        [put(b8=np.zeros(4, np.int8)), INT8_BIAS, wire("conv", place=2, to="b_d")],
    ),
    "int8 bias by Add": (
        "bias",
        "add",
        [put(b8=np.zeros((1, 4, 1, 1), np.int8)), INT8_BIAS, wire("add", place=0, to="b_d")],
    ),
    "half a residual": ("residual", "add", [wire("add", place=1, to="y")]),
}


def illegal(case: str) -> ModelProto:
    model = legal()
    for edit in ILLEGAL[case][2]:
        edit(model)
    return model


def test_legal_graph_has_no_findings() -> None:
    onnx.checker.check_model(legal(), full_check=True)
    assert findings(legal()) == []


@pytest.mark.parametrize("case", ILLEGAL)
def test_each_rule_finds_its_graph(case: str) -> None:
    assert ILLEGAL[case][:2] in {(one.rule, one.node) for one in findings(illegal(case))}


def test_weights_may_be_quantized_inside_the_graph() -> None:
    """Float weights with Q and DQ behind them are as good as int8 weights with DQ."""
    model = legal()
    put(w=np.random.default_rng(1).normal(size=(4, 4, 1, 1)).astype(np.float32))(model)
    insert("w_DQ", "QuantizeLinear", ["w", "w_s", "w_z"], "w_q", "w_Q", axis=0)(model)
    wire("w_DQ", place=0, to="w_q")(model)
    assert findings(model) == []
    set_axis("w_Q", "w_DQ", axis=1)(model)
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

    assert parse(trt, illegal(case).SerializeToString())[2]


def test_absent_operators_are_those_that_nvidias_parser_lacks() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from edgekd.targets.trt_build import _logger

    builder = trt.Builder(_logger(trt))
    parser = trt.OnnxParser(builder.create_network(0), _logger(trt))
    names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert {name for name in names if not parser.supports_operator(name)} == set(ABSENT) & names
