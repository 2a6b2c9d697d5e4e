"""The writer for OpenVINO: its IR, `model.xml` with `model.bin`, in fp32, fp16 or int8."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgekd.errors import EdgekdError
from edgekd.export.build import Build, Written, agent_beside, fp32_onnx
from edgekd.export.float_input import take_floats
from edgekd.export.onnx import unprinted
from edgekd.export.ranges import check_calibration
from edgekd.targets.feed import Feed, as_pixels
from edgekd.targets.openvino_runtime import load_openvino

MODEL_FILES = ("model.xml", "model.bin")


def write(build: Build) -> Written:
    """Write the IR of the fp32 ONNX file; int8 goes through NNCF's post-training quantization.

    Raises:
        NotHere: OpenVINO is not installed.
        EdgekdError: a version of it outside edgekd's bounds, useless calibration images, or a graph that OpenVINO or
            NNCF does not take.
    """
    openvino = load_openvino()
    base, quantization = build.folder / "fp32.onnx", None
    fp32_onnx(build, base)
    if build.calibration is not None:
        check_calibration(build.calibration, onnx.load(base))
    if build.input == "float":
        take_floats(base)
    try:
        model = openvino.Core().read_model(base)
    except RuntimeError as error:
        raise EdgekdError(
            f"OpenVINO {version(openvino)} cannot read the student's ONNX graph: {_reason(error)}.",
            "Choose another student, or --target onnxruntime.",
        ) from error
    if build.precision == "int8":
        assert build.calibration is not None
        in_float = _behind_last_layer(model) if build.bank is not None else []
        model, quantization = quantize(model, build.calibration, in_float, build.feed)
    base.unlink()
    for key, value in build.metadata.items():
        model.set_rt_info(value, ["edgekd", key])
    try:
        openvino.save_model(model, build.folder / MODEL_FILES[0], compress_to_fp16=build.precision != "fp32")
    except RuntimeError as error:  # an OSError in all but name and number
        raise EdgekdError(
            f"OpenVINO {version(openvino)} could not write its files in {build.folder.parent} ({_reason(error)}).",
            "Is the disk full? Free some space and run again; nothing half-written was kept.",
        ) from error
    return Written(
        format="openvino",
        files=(*MODEL_FILES, *agent_beside(build)),
        inputs=(build.image,),
        outputs=(build.output,),
        quantization=quantization,
        details={"openvino": version(openvino)},
    )


def quantize(
    model: Any, calibration: NDArray[np.uint8], in_float: Sequence[str] = (), feed: Feed = as_pixels
) -> tuple[Any, dict[str, Any]]:
    """NNCF's post-training quantization of an OpenVINO model, with fast bias correction.

    Image by image, so memory does not grow with their number beyond a few scalars per activation.

    Args:
        calibration: RGB uint8 `[N, H, W, 3]`, prepared with the model's own preprocess.
        in_float: names of operations to leave alone.
        feed: uint8 `[B, H, W, 3]` → the model's input.

    Returns:
        The quantized model, and for `artifact.json` what was done.

    Raises:
        EdgekdError: NNCF refuses the model, or it computes values that are not finite.
    """
    nncf = _nncf()
    range_estimator = nncf.quantization.range_estimator
    _refuse_not_finite(model)
    layers = {node.get_friendly_name() for node in _weighted(model)}
    try:
        with unprinted():
            quantized = nncf.quantize(
                model,
                nncf.Dataset([calibration[i : i + 1] for i in range(len(calibration))], feed),
                preset=nncf.QuantizationPreset.MIXED,  # asymmetric activations: HardSwish goes below 0, by little
                target_device=nncf.TargetDevice.CPU,
                subset_size=len(calibration),
                # NNCF's own choice averages the extremes of the images and cuts off what gates rarely reach:
                # on the toy mobilenetv3 the logits' error was 25 times as large (docs/results.md).
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    activations_range_estimator_params=range_estimator.RangeEstimatorParametersSet.MINMAX
                ),
                ignored_scope=nncf.IgnoredScope(names=list(in_float), validate=False) if in_float else None,
            )
    except (RuntimeError, nncf.InternalError, nncf.ValidationError, nncf.UnsupportedModelError) as error:
        raise EdgekdError(f"NNCF {nncf.__version__} cannot quantize the student: {_reason(error)}.") from error
    left = sorted(
        node.get_friendly_name()
        for node in _weighted(quantized)
        if node.input_value(0).get_node().get_type_name() != "FakeQuantize"
    )
    return quantized, {
        "method": "NNCF post-training quantization for OpenVINO: activations uint8 per tensor over their whole "
        "range, weights int8 per channel, fast bias correction; weights of layers left in float are stored in 16 bits",
        "tool": f"nncf {nncf.__version__}",
        "calibration_images": len(calibration),
        "quantized_layers": len(layers) - len(left),
        "float_layers": left,
    }


def version(openvino: Any) -> str:
    """`2026.4.1` out of `2026.4.1-22982-e213a147257-releases/2026/4`."""
    return str(openvino.__version__).partition("-")[0]


def _weighted(model: Any) -> list[Any]:
    return [n for n in model.get_ordered_ops() if n.get_type_name() in ("Convolution", "GroupConvolution", "MatMul")]


def _behind_last_layer(model: Any) -> list[str]:
    """What makes an embedding's length 1, which NNCF would round to 8 bits as well."""
    nodes = list(model.get_ordered_ops())
    layers = {node.get_friendly_name() for node in _weighted(model)}
    last = max((place for place, node in enumerate(nodes) if node.get_friendly_name() in layers), default=-1)
    kinds = ("Constant", "Result", "Parameter")
    return [node.get_friendly_name() for node in nodes[last + 1 :] if node.get_type_name() not in kinds]


def _refuse_not_finite(model: Any) -> None:
    """Diverged weights would give ranges of NaN, and NNCF goes on without a word."""
    constants = [n for n in model.get_ordered_ops() if n.get_type_name() == "Constant"]
    if not all(np.isfinite(n.data).all() for n in constants if n.data.dtype == np.float32):
        raise EdgekdError(
            "The student's weights are not finite, so nothing can be measured on the calibration images.",
            "Check the training run: its weights have probably diverged.",
        )


def _nncf() -> Any:
    # NNCF reports its use to a server of its makers unless it is told that nobody is there to ask.
    os.environ.setdefault("NNCF_CI", "1")
    with unprinted():
        import nncf

        nncf.set_log_level(40)
    return nncf


def _reason(error: Exception) -> str:
    """The last line with words: OpenVINO puts the source file's name first."""
    lines = [line.strip() for line in str(error).splitlines() if any(c.isalpha() for c in line)]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")[:200]
