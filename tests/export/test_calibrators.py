"""Ranges from histograms, against raw values, brute force and ONNX Runtime's own collection."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from export_fakes import SIZE, Block, logits, pictures
from onnxruntime.quantization.calibrate import HistogramCollector
from torch import nn

from edgekd.core.preprocess import Preprocess
from edgekd.export.graph import Deployable
from edgekd.export.onnx import export_onnx
from edgekd.export.onnx_graph import Graph
from edgekd.export.quantize import calibration as calibrators
from edgekd.export.quantize import calibration as ranges
from edgekd.export.quantize.calibration import (
    BINS,
    entropy,
    mse,
    percentile,
    rounding_error,
)
from edgekd.export.quantize.onnx_scheme import OnnxScheme
from edgekd.export.quantize.onnxruntime import OnnxRuntimeInt8
from edgekd.export.quantize.tensorrt import TensorRtInt8


def heavy(kind: str, n: int = 200_000) -> np.ndarray:
    """Values with outliers: to both sides, or to the right only as after a ReLU."""
    values = np.random.default_rng(0).standard_t(2.5, size=n).astype(np.float32)
    return np.maximum(values, 0) if kind == "rectified" else values + np.float32(0.3)


def counted(values: np.ndarray) -> tuple[np.ndarray, float]:
    limit = float(np.abs(values).max())
    return np.histogram(values, 2 * BINS, range=(-limit, limit))[0], limit


@pytest.mark.parametrize("kind", ["both", "rectified"])
def test_percentile_is_numpys(kind: str) -> None:
    values = heavy(kind)
    counts, limit = counted(values)
    low, high = percentile(counts, limit, False)
    expected = np.percentile(values, [0.005, 99.995])
    np.testing.assert_allclose([low, high], expected, atol=1.5 * limit / BINS)
    low, high = percentile(counts, limit, True)
    assert (
        high == -low == pytest.approx(np.percentile(np.abs(values), 99.99), abs=1.5 * limit / BINS)
    )
    assert high < 0.9 * limit, "the outliers must have been cut"


def test_percentile_by_hand() -> None:
    counts = np.zeros(2 * BINS, np.int64)
    counts[BINS + 10] = 9_999
    counts[-1] = 1
    low, high = percentile(counts, 1.0, True)
    assert high == -low == pytest.approx(11 / BINS), (
        "exactly 99.99 % lie below the end of the eleventh bin"
    )


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
    values, weights = np.array([0.4, 1.0, 300.0]), np.array([2.0, 1.0, 1.0])
    assert rounding_error(values, weights, 0.0, 255.0, symmetric=False) == pytest.approx(
        2 * 0.16 + 45**2
    )
    assert rounding_error(-values, weights, -127.0, 127.0, symmetric=True) == pytest.approx(
        2 * 0.16 + 172**2
    )
    assert rounding_error(
        np.array([-10.4, 3.0]), np.ones(2), -10.0, 245.0, symmetric=False
    ) == pytest.approx(0.16)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrators") / "fp32.onnx"
    export_onnx(
        Deployable(Block(), nn.Linear(16, 4), Preprocess(size=SIZE)), path, size=SIZE, metadata={}
    )
    return path


def test_histograms_count_every_value_of_every_image(fp32: Path) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(fp32))
    images = pictures(2 * ranges._WHOLE + 1)
    extremes, _ = ranges.observe(model, images, ranges.float_activations(Graph(model)))
    counts = ranges.histograms(model, images, extremes)
    said = logits(fp32, images)
    limit = np.abs(said).max()
    np.testing.assert_array_equal(
        counts["logits"], np.histogram(said, 2 * BINS, range=(-limit, limit))[0]
    )
    assert all(found.sum() % len(images) == 0 for found in counts.values())


def test_entropy_finds_what_onnxruntime_finds_on_raw_values() -> None:
    values = heavy("rectified")
    theirs = HistogramCollector("entropy", False, calibrators._ENTROPY_BINS, 128, None, None)
    theirs.collect_value({"x": values})
    expected = theirs.compute_entropy()["x"][:2]
    found = entropy(*counted(values), False)
    assert max(found[0], 0.0) == expected[0] == 0
    assert found[1] == pytest.approx(float(expected[1]), rel=1e-3)
    assert found[1] < 0.9 * values.max()


@pytest.mark.parametrize(
    ("calibrator", "scheme"),
    [
        ("percentile", OnnxRuntimeInt8()),
        ("entropy", OnnxRuntimeInt8()),
        ("percentile", TensorRtInt8()),
        ("mse", TensorRtInt8()),
    ],
)
def test_both_schemes_cover_what_the_calibrator_says(
    fp32: Path, tmp_path: Path, calibrator: str, scheme: OnnxScheme
) -> None:
    images = pictures(32)
    facts = scheme.quantize(fp32, tmp_path / "a.onnx", images, calibrator=calibrator)
    plain = scheme.quantize(fp32, tmp_path / "b.onnx", images)
    assert (facts["calibrator"], plain["calibrator"]) == (calibrator, "minmax")
    assert facts.get("percentile") == (99.99 if calibrator == "percentile" else None)
    scales = [
        {
            tensor.name: float(onnx.numpy_helper.to_array(tensor))
            for tensor in onnx.load(tmp_path / name).graph.initializer
            if tensor.name.endswith(("_scale", "/scale")) and not tensor.dims
        }
        for name in ("a.onnx", "b.onnx")
    ]
    assert scales[0].keys() == scales[1].keys()
    assert all(
        narrow <= 1.001 * wide
        for narrow, wide in zip(scales[0].values(), scales[1].values(), strict=True)
    )
    assert any(
        narrow < 0.99 * wide
        for narrow, wide in zip(scales[0].values(), scales[1].values(), strict=True)
    )


def test_a_tensor_of_zeros_keeps_its_range(fp32: Path) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(fp32))
    zero = np.array(0, np.float32)
    for calibrator in ("percentile", "mse"):
        found = ranges.clipped_ranges(
            model, pictures(2), {"logits": (zero, zero)}, calibrator, symmetric=False
        )
        assert found == {"logits": (zero, zero)}
