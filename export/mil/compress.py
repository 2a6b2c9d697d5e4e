"""Compress Core ML packages with coremltools: 8-bit weights, 8-bit weights and activations, and palettes."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekd.export.mil.program import MilProgram, import_coremltools
from edgekd.export.mil.ranges import FP16_MIN_NORMAL, Ranges
from edgekd.export.onnx.write import quiet

MIN_WEIGHTS = 512
"""Minimum number of values of a compressed tensor; smaller ones save nothing."""
IOS_17 = 8
"""First specification version with quantized activations."""
PALETTE_BITS = {"pal4": 4, "pal6": 6}


def quantize_weights(model: Any) -> tuple[Any, dict[str, Any]]:
    """Return the model with 8-bit weights, one scale per output channel, and a description."""
    optimize = import_coremltools().optimize.coreml
    config = optimize.OpLinearQuantizerConfig(
        mode="linear_symmetric",
        dtype="int8",
        granularity="per_channel",
        weight_threshold=MIN_WEIGHTS,
    )
    with quiet():
        small = optimize.linear_quantize_weights(
            model, optimize.OptimizationConfig(global_config=config)
        )
    return small, _described("weights int8 per channel, symmetric; activations float16")


def palettize(model: Any, bits: int) -> tuple[Any, dict[str, Any]]:
    """Return the model with weights as indices into a palette of `2 ** bits` values per tensor, and a description."""
    optimize = import_coremltools().optimize.coreml
    config = optimize.OpPalettizerConfig(mode="kmeans", nbits=bits, weight_threshold=MIN_WEIGHTS)
    with quiet():
        small = optimize.palettize_weights(model, optimize.OptimizationConfig(global_config=config))
    method = (
        f"weights as {bits}-bit indices into one k-means palette per tensor; activations float16"
    )
    return small, _described(method)


def quantize_activations(
    model: Any, program: MilProgram, ranges: Ranges
) -> tuple[Any, dict[str, Any]]:
    """Return the model with 8-bit weights, and 8-bit activations around layers, pools and additions.

    coremltools measures ranges by running the model, which only macOS can. Here the reference evaluator has measured
    those of `program`, the model as read back from disk, and coremltools' own passes insert the rounding where a device
    with integer units looks for it.
    """
    optimize = import_coremltools().optimize.coreml
    from coremltools.converters.mil.frontend.milproto import load as milproto
    from coremltools.converters.mil.mil.passes.graph_pass import PassOption
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
    from coremltools.models.utils import _apply_graph_pass

    floats = _float_layers(program, ranges)
    # With a zero point, since the output of a ReLU would leave half of a symmetric range empty.
    quantizer = optimize.OpLinearQuantizerConfig(mode="linear", dtype="int8")
    config = optimize.OptimizationConfig(
        global_config=quantizer, op_name_configs=dict.fromkeys(floats)
    )
    statistics = {
        name: {"rmin": np.float32(low), "rmax": np.float32(ranges.highs[name])}
        for name, low in ranges.lows.items()
    }
    # Only inputs of layers are rounded. coremltools would also round their outputs before the following clip or
    # hard-swish, and spend most of the 256 steps on values that are clipped.
    insert = PASS_REGISTRY["compression::insert_prefix_quantize_dequantize_pair"]
    insert.set_options([PassOption("config", config), PassOption("activation_stats", statistics)])
    passes = [insert, PASS_REGISTRY["common::dequantize_quantize_pair_elimination"]]
    with quiet():
        rounded = _apply_graph_pass(
            model, passes, spec_version=IOS_17, pymil_load_func=milproto.load, skip_model_load=True
        )
    small, _ = quantize_weights(rounded)
    method = "activations int8 per tensor with zero point (min-max, edgekd's evaluator); weights int8 per channel"
    return small, _described(method) | {"float_layers": sorted(floats)}


def _described(method: str) -> dict[str, Any]:
    return {"method": method, "tool": f"coremltools {import_coremltools().__version__}"}


def _float_layers(program: MilProgram, ranges: Ranges) -> set[str]:
    """Return the layers to keep in float: those on 1 × 1 maps (squeeze-and-excite), which are cheap and lose most, and
    those with inputs so small that half precision cannot represent their scale."""
    kinds = ("conv", "add")
    small = {
        name
        for name, low in ranges.lows.items()
        if max(ranges.highs[name], 0) - min(low, 0) < 255 * FP16_MIN_NORMAL
    }
    return {
        op.name
        for op in program.ops
        if (op.kind in kinds and op.shapes[0][2:] == (1, 1)) or small & op.reads
    }
