from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgekd.core.errors import EdgekdError
from edgekd.export.mil.evaluate import evaluate, logits_of
from edgekd.export.mil.program import MilProgram, Op, Ref
from edgekd.export.mil.ranges import layers_to_keep, measure_ranges

IMAGES = np.random.default_rng(0).integers(1, 256, (11, 4, 4, 3), dtype=np.uint8)


def op(kind: str, name: str, dtype: str = "fp32", **inputs: Any) -> Op:
    return Op(kind, name, inputs, (name,), (dtype,), ((1, 3),))


def chain(up: float, down: float, dtype: str = "fp32") -> MilProgram:
    """mean over the image, times `up`, relu, times `down`, softmax."""
    ops = (
        op("reduce_mean", "mean", dtype, x=Ref("image"), axes=np.array([2, 3]), keep_dims=False),
        op("mul", "up", dtype, x=Ref("mean"), y=np.float32(up).reshape(())),
        op("relu", "relu", dtype, x=Ref("up")),
        op("mul", "down", dtype, x=Ref("relu"), y=np.float32(down).reshape(())),
        Op("cast", "wide", {"x": Ref("down"), "dtype": "fp32"}, ("wide",), ("fp32",), ((1, 3),)),
        op("softmax", "odds", "fp32", x=Ref("wide"), axis=1),
        Op(
            "classify",
            "label",
            {"probabilities": Ref("odds")},
            ("label", "probs"),
            ("?", "?"),
            ((), ()),
        ),
    )
    return MilProgram("image", (1, 3, 4, 4), ops, ("label", "probs"))


def means() -> np.ndarray:
    return IMAGES.reshape(len(IMAGES), 16, 3).astype(np.float64).mean(1)


def test_every_image_is_computed_on_its_own() -> None:
    """Eleven images are more than one batch."""
    np.testing.assert_allclose(logits_of(chain(2, 0.25), IMAGES), means() / 2, rtol=1e-6)


def test_declared_half_precision_rounds_each_result() -> None:
    half = means().astype(np.float32).astype(np.float16)
    expected = (half * np.float16(2)).astype(np.float16) * np.float16(0.25)
    np.testing.assert_array_equal(
        logits_of(chain(2, 0.25, "fp16"), IMAGES), expected.astype(np.float32)
    )
    np.testing.assert_allclose(
        logits_of(chain(2, 0.25, "fp16"), IMAGES, "float32"), means() / 2, rtol=1e-6
    )


def test_half_precision_overflows_to_infinity() -> None:
    assert np.isinf(logits_of(chain(2000, 0.001, "fp16"), IMAGES)).all()
    assert np.isfinite(logits_of(chain(2000, 0.001), IMAGES)).all()


def test_overflow_is_named_and_kept_with_its_readers() -> None:
    program = chain(2000, 0.001)
    ranges = measure_ranges(program, IMAGES)
    assert [(h.layer, h.kind) for h in ranges.hazards] == [("up", "overflow"), ("relu", "overflow")]
    assert ranges.hazards[0].largest == pytest.approx(2000 * means().max(), rel=1e-5)
    assert ranges.hazards[0].sentence.startswith("up (mul) reaches")
    assert ranges.hazards[0].as_json()["rounding"] is None
    assert layers_to_keep(program, ranges.hazards) == {"up", "relu", "down"}
    np.testing.assert_allclose(ranges.logits, 2 * means(), rtol=1e-5)
    assert ranges.highs["image"] == 255
    assert ranges.lows["down"] == pytest.approx(2 * means().min(), rel=1e-5)


def test_underflow_is_measured_by_what_rounding_loses() -> None:
    ranges = measure_ranges(chain(1e-8, 1e8), IMAGES)
    assert [(h.layer, h.kind) for h in ranges.hazards] == [
        ("up", "underflow"),
        ("relu", "underflow"),
    ]
    assert ranges.hazards[0].rounding == pytest.approx(1)
    assert "loses 100 %" in ranges.hazards[0].sentence


def test_ordinary_numbers_are_no_hazard() -> None:
    assert measure_ranges(chain(2, 0.25), IMAGES).hazards == ()


def test_a_sum_inside_is_reported_but_changes_nothing() -> None:
    ops = (op("reduce_mean", "mean", x=Ref("scaled"), axes=np.array([2, 3]), keep_dims=False),)
    first = op("mul", "scaled", x=Ref("image"), y=np.float32(100).reshape(()))
    last = op("softmax", "odds", x=Ref("mean"), axis=1)
    program = MilProgram("image", (1, 3, 4, 4), (first, *ops, last), ("odds",))
    hazards = measure_ranges(program, IMAGES).hazards
    assert [(h.layer, h.kind) for h in hazards] == [("mean", "sum")]
    assert hazards[0].largest == pytest.approx(1600 * means().max(), rel=1e-5)
    assert "sums up to" in hazards[0].sentence
    assert layers_to_keep(program, hazards) == set()


def test_diverged_weights_are_named() -> None:
    with pytest.raises(EdgekdError, match="The layer up gives numbers that are not finite"):
        measure_ranges(chain(float("inf"), 1), IMAGES)


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (op("topk", "best", x=Ref("image")), r"the Core ML operation topk \(of best\)"),
        (op("relu", "best", x=Ref("image"), slope=1), r"slope of the Core ML operation relu"),
        (
            op("concat", "best", values=(Ref("image"), Ref("image")), axis=1, interleave=True),
            r"interleaved concat \(of best\)",
        ),
    ],
)
def test_what_the_evaluator_does_not_know_is_named(layer: Op, what: str) -> None:
    program = MilProgram("image", (1, 3, 4, 4), (layer,), ("best",))
    with pytest.raises(EdgekdError, match=f"does not know {what}"):
        evaluate(program, IMAGES, ["best"])


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(EdgekdError, match=r"takes uint8 \[B, 4, 4, 3\]"):
        logits_of(chain(1, 1), IMAGES[:, :3])


def test_classifier_without_softmax_has_no_logits() -> None:
    relu, named = (
        op("relu", "relu", x=Ref("image")),
        op("classify", "label", probabilities=Ref("relu")),
    )
    with pytest.raises(EdgekdError, match="has no softmax"):
        _ = MilProgram("image", (1, 3, 4, 4), (relu, named), ("label",)).logits
    assert MilProgram("image", (1, 3, 4, 4), (relu,), ("relu",)).logits == "relu"


def test_watched_values_come_per_image() -> None:
    def watch(
        layer: Op, given: dict[str, Any], outputs: tuple[torch.Tensor, ...]
    ) -> torch.Tensor | None:
        return outputs[0].amax() if layer.kind == "reduce_mean" else None

    _, seen = evaluate(chain(1, 1), IMAGES, ["down"], watch=watch)
    assert set(seen) == {"mean"}
    np.testing.assert_allclose(seen["mean"], means().max(1), rtol=1e-6)
