"""The deployed form: smaller, equal, never of the model that was given, and not a second time."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from edgekd.export.graph import fuse

FAMILIES = {
    "fastvit_t8": 64,
    "levit_128s": 224,
    "mobileone_s0": 64,
    "repvit_m0_9": 64,
}


def network(name: str) -> nn.Module:
    """A timm model with random weights and BatchNorm statistics unlike 0 and 1."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_families_fuse_to_equal_outputs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, size = network(name).train(), FAMILIES[name]
    kept = copy.deepcopy(model.state_dict())
    example = torch.randn(2, 3, size, size)
    fused = fuse(model, example)
    assert fused.error is not None
    assert fused.error <= 1e-5
    assert sum(p.numel() for p in fused.model.parameters()) < sum(
        p.numel() for p in model.parameters()
    )
    assert model.training
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    capsys.readouterr()
    again = fuse(fused.model, example)
    assert again.model is fused.model
    assert again.error is None
    assert capsys.readouterr().err == ""


def test_a_model_without_branches_is_given_back() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert fuse(model, torch.randn(1, 3, 8, 8)).model is model


class Wrong(nn.Module):
    """A block whose fused form forgets its bias, or raises."""

    def __init__(self, raises: bool) -> None:
        super().__init__()
        self.raises, self.layer = raises, nn.Linear(4, 4)

    def fuse(self) -> nn.Module:
        if self.raises:
            raise AttributeError("no such branch")
        plain = nn.Linear(4, 4, bias=False)
        plain.weight = self.layer.weight
        return plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("raises", [False, True])
def test_a_wrong_fusion_is_refused(raises: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(Wrong(raises))
    fused = fuse(model, torch.randn(2, 4))
    assert fused.model is model
    assert fused.error is None
    assert "not fused" in capsys.readouterr().err
