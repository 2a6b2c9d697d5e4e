"""BatchNorm folded into convolutions, and small maps as matrices: the same numbers and gradients, another way."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from edgekd.distill.models.batchnorm import find_folds, folded
from edgekd.distill.models.depthwise import depthwise_conv2d


def frozen(model: nn.Module) -> nn.Module:
    """In training mode, with BatchNorm statistics that are neither 0 nor 1, and frozen."""
    torch.manual_seed(0)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def loss_and_gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(x).square().sum()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_resnet"])
def test_the_same_output_and_gradients(name: str) -> None:
    model = frozen(timm.create_model(name, num_classes=3)).double()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    folds = find_folds(model, x)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm for _, norm in folds if norm is not None} == set(norms)
    model.eval()  # after `find_folds` gave the training mode back; dropout would differ between passes, too
    plain_loss, plain = loss_and_gradients(model, x)
    with folded(folds):
        loss, gradients = loss_and_gradients(model, x)
    torch.testing.assert_close(loss, plain_loss)
    assert gradients.keys() == plain.keys()
    for parameter, gradient in gradients.items():
        tolerance = 1e-9 + 1e-6 * float(gradient.abs().max())
        torch.testing.assert_close(gradient, plain[parameter], rtol=1e-6, atol=tolerance)


def test_the_model_is_as_before_after_the_block_also_after_an_error() -> None:
    model = frozen(timm.create_model("mobilenetv3_small_100", num_classes=3))
    x = torch.rand(2, 3, 32, 32)
    before, names = copy.deepcopy(model.state_dict()), set(model.state_dict())
    folds = find_folds(model, x)
    with pytest.raises(RuntimeError, match="stop"), folded(folds):
        raise RuntimeError("stop")
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert set(model.state_dict()) == names
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])


class TwiceUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.norm(self.conv(x))))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 4, 1),
        nn.Conv2d(8, 4, 1, bias=False),
        nn.Conv2d(8, 4, 1, stride=2),
        nn.Conv2d(8, 4, 1, padding=1),
        nn.Conv2d(8, 4, 1, groups=2),
        nn.Conv2d(8, 4, 3, padding=1),
    ],
    ids=lambda conv: conv.extra_repr(),
)
def test_convolutions_of_pooled_maps(conv: nn.Conv2d) -> None:
    """Only some are matrix products; all give the same."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), conv)
    frozen(model).double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    plain_loss, plain = loss_and_gradients(model, x)
    folds = find_folds(model, x)
    assert sum(norm is not None for _, norm in folds) == 1  # behind a convolution with a bias
    with folded(folds):
        loss, gradients = loss_and_gradients(model, x)
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close(gradients, plain)


def test_nothing_is_folded_where_it_would_change_the_output() -> None:
    assert find_folds(frozen(TwiceUsed()), torch.rand(2, 3, 8, 8)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 10), (3, 4)])
@pytest.mark.parametrize(("side", "padding", "stride"), [(3, 1, 1), (5, 2, 2), (7, 3, 1)])
def test_gradients_of_depthwise_kernels_are_those_of_torch(
    side: int, padding: int, shape: tuple[int, int], stride: int, dtype: torch.dtype
) -> None:
    conv = nn.Conv2d(6, 6, side, groups=6)
    leaves = [torch.rand(2, 6, *shape), conv.weight, conv.bias]

    def gradients(own: bool, dtype: torch.dtype) -> list[Tensor]:
        x, weight, bias = (leaf.detach().to(dtype).requires_grad_() for leaf in leaves)
        if own:
            out = depthwise_conv2d(x, weight, bias, (stride, stride), (padding, padding))
        else:
            out = conv2d(x, weight, bias, stride, padding, groups=6)
        return list(torch.autograd.grad(out.double().square().sum(), (x, weight, bias)))

    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    exact = gradients(False, torch.float64)
    for found, expected in zip(gradients(True, dtype), exact, strict=True):
        atol = tolerance * float(expected.abs().max())
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=atol)
