from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame

from edgekd.export.mil.ops import OPS


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (
            "sigmoid_hard",
            {"x": torch.tensor([-9.0, 0, 1.5, 9]), "alpha": 1 / 6, "beta": 0.5},
            [0, 0.5, 0.75, 1],
        ),
        ("thresholded_relu", {"x": torch.tensor([-4.0, -3, -1, 2]), "alpha": -3.0}, [0, -3, -1, 2]),
        ("clip", {"x": torch.tensor([-1.0, 3, 7]), "alpha": 0.0, "beta": 6.0}, [0, 3, 6]),
        ("silu", {"x": torch.tensor([0.0, 1.0])}, [0, 0.7310586]),
        ("gelu", {"x": torch.tensor([1.0])}, [0.8413447]),
        ("gelu", {"x": torch.tensor([1.0]), "mode": "TANH_APPROXIMATION"}, [0.841192]),
        ("gelu", {"x": torch.tensor([1.0]), "mode": "SIGMOID_APPROXIMATION"}, [0.8457958]),
        ("softmax", {"x": torch.tensor([0.0, np.log(3.0)]), "axis": 0}, [0.25, 0.75]),
        ("real_div", {"x": torch.tensor([6.0]), "y": 4.0}, [1.5]),
        ("cast", {"x": torch.tensor([1.7, -1.7]), "dtype": "int32"}, [1, -1]),
        # round half to even, then clamp to what int8 holds
        (
            "quantize",
            {
                "input": torch.tensor([0.5, 1.5, 99, -99]),
                "scale": 0.5,
                "zero_point": 3,
                "output_dtype": "int8",
            },
            [4, 6, 127, -128],
        ),
        (
            "quantize",
            {
                "input": torch.tensor([0.25, -1.0]),
                "scale": 0.5,
                "zero_point": 0,
                "output_dtype": "uint8",
            },
            [0, 0],
        ),
        (
            "dequantize",
            {"input": torch.tensor([4.0, 127]), "scale": 0.5, "zero_point": 3},
            [0.5, 62],
        ),
    ],
)
def test_values_by_hand(kind: str, given: dict[str, object], expected: list[float]) -> None:
    result = OPS[kind](**given)
    assert isinstance(result, torch.Tensor)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation"), [(8, 3, 2, 1), (7, 5, 2, 1), (9, 3, 1, 2)]
)
def test_same_padding_is_timms(size: int, kernel: int, stride: int, dilation: int) -> None:
    layer = Conv2dSame(4, 6, kernel, stride=stride, dilation=dilation, groups=2)
    x = rand(1, 4, size, size)
    given = {
        "x": x,
        "weight": layer.weight,
        "bias": layer.bias,
        "strides": np.array([stride, stride]),
        "dilations": np.array([dilation, dilation]),
        "groups": 2,
        "pad_type": "same",
    }
    torch.testing.assert_close(OPS["conv"](**given), layer(x))


def test_uneven_padding_comes_in_mils_order() -> None:
    x, weight = rand(1, 2, 5, 6), rand(3, 2, 3, 3, seed=1)
    given = {
        "x": x,
        "weight": weight,
        "pad_type": "custom",
        "pad": np.array([0, 1, 2, 3]),
    }  # top bottom left right
    torch.testing.assert_close(OPS["conv"](**given), F.conv2d(F.pad(x, (2, 3, 0, 1)), weight))
    given = {
        "x": x,
        "pad": np.array([0, 0, 0, 0, 0, 1, 2, 3]),
        "mode": "constant",
        "constant_val": 7.0,
    }
    torch.testing.assert_close(OPS["pad"](**given), F.pad(x, (2, 3, 0, 1), value=7.0))


def test_pools() -> None:
    x = -rand(1, 2, 6, 6).abs()
    given = {
        "x": x,
        "kernel_sizes": np.array([3, 3]),
        "strides": np.array([2, 2]),
        "pad_type": "custom",
        "pad": np.array([1, 1, 1, 1]),
    }
    torch.testing.assert_close(OPS["max_pool"](**given), F.max_pool2d(x, 3, 2, 1))
    torch.testing.assert_close(OPS["avg_pool"](**given), F.avg_pool2d(x, 3, 2, 1))
    outside = given | {"exclude_padding_from_average": True}
    torch.testing.assert_close(
        OPS["avg_pool"](**outside), F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
    )


def test_norms() -> None:
    x, gamma, beta = rand(2, 3, 8), rand(8, seed=1), rand(8, seed=2)
    given = {"x": x, "axes": np.array([-1]), "gamma": gamma, "beta": beta, "epsilon": 1e-3}
    torch.testing.assert_close(OPS["layer_norm"](**given), F.layer_norm(x, (8,), gamma, beta, 1e-3))
    image, mean, variance = rand(2, 3, 4, 4), rand(3, seed=3), rand(3, seed=4).abs()
    given = {
        "x": image,
        "mean": mean,
        "variance": variance,
        "gamma": gamma[:3],
        "beta": beta[:3],
        "epsilon": 1e-3,
    }
    torch.testing.assert_close(
        OPS["batch_norm"](**given),
        F.batch_norm(image, mean, variance, gamma[:3], beta[:3], eps=1e-3),
    )


def test_attention_and_products() -> None:
    q, k, v = (rand(1, 2, 5, 4, seed=seed) for seed in range(3))
    torch.testing.assert_close(
        OPS["scaled_dot_product_attention"](**{"query": q, "key": k, "value": v}),
        F.scaled_dot_product_attention(q, k, v),
    )
    torch.testing.assert_close(OPS["matmul"](**{"x": q, "y": k, "transpose_y": True}), q @ k.mT)
    torch.testing.assert_close(OPS["matmul"](**{"x": q, "y": k, "transpose_x": True}), q.mT @ k)


def test_shapes() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert OPS["reshape"](**{"x": x, "shape": np.array([0, -1])}).shape == (2, 12)  # type: ignore[union-attr]
    assert OPS["expand_dims"](**{"x": x, "axes": np.array([0, -1])}).shape == (1, 2, 3, 4, 1)  # type: ignore[union-attr]
    assert OPS["squeeze"](**{"x": x[None], "axes": np.array([0])}).shape == (2, 3, 4)  # type: ignore[union-attr]
    assert [
        len(part)
        for part in OPS["split"](**{"x": x[0], "split_sizes": np.array([1, 2]), "axis": 0})
    ] == [1, 2]
    assert len(OPS["split"](**{"x": x, "num_splits": 2, "axis": 2})) == 2
    given = {
        "x": x,
        "begin": np.array([1, 0, 1]),
        "end": np.array([0, 2, 0]),
        "end_mask": np.array([False, False, True]),
        "squeeze_mask": np.array([True, False, False]),
    }
    torch.testing.assert_close(OPS["slice_by_index"](**given), x[1, :2, 1:])


def test_interleaved_concat_is_not_taken_for_a_plain_one() -> None:
    with pytest.raises(NotImplementedError):
        OPS["concat"](**{"values": (rand(1, 2), rand(1, 2)), "axis": 1, "interleave": True})
