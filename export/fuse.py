"""The deployed form of a network: branches that exist for training are fused into one layer each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from edgekd.core.console import warn

M = TypeVar("M", bound=nn.Module)
MAX_ERROR = 1e-5
"""Of the deployed form against the trained one, as a share of the range of its outputs."""


@dataclass(frozen=True)
class Fused(Generic[M]):
    """A network and what fusing it did."""

    model: M
    """A copy in eval mode where something was fused, else the given network."""
    error: float | None
    """Largest difference of the outputs, as a share of their range; None where nothing was fused."""


def fuse(model: M, example: Tensor) -> Fused[M]:
    """Return the deployed form of `model`: its re-parameterizable blocks and BatchNorm layers fused, by timm.

    Families bring their own `fuse`, `reparameterize` or `switch_to_deploy` (RepVGG, MobileOne, FastViT, RepViT, LeViT,
    EfficientViT-M, GhostNetV3, …). A model without them, and one that is fused already, comes back as it is. So does,
    with a warning, one whose fused form computes something else.

    Args:
        example: what `model` takes, a batch of any values.
    """
    from timm.utils import reparameterize_model

    if getattr(model, "is_fused", False) or not _has_branches(model):
        return Fused(model, None)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            fused = reparameterize_model(model)
            if _layers(fused) == _layers(model):
                return Fused(model, None)
            wanted, found = model(example).double(), fused(example).double()
    except Exception as error:  # a family's own code; one such method may raise where it ran before
        warn(f"The student is not fused for inference, because that fails ({error}).")
        return Fused(model, None)
    finally:
        model.train(was_training)
    span = float(wanted.max() - wanted.min()) or 1.0
    difference = float((found - wanted).abs().max()) / span
    if not difference <= MAX_ERROR:
        warn(
            f"The student is not fused for inference, because its outputs would differ by {difference:.2g} of their "
            f"range, above {MAX_ERROR:g}."
        )
        return Fused(model, None)
    fused.is_fused = True  # some families' blocks cannot be fused twice
    return Fused(fused, difference)


def _has_branches(model: nn.Module) -> bool:
    methods = ("fuse", "reparameterize", "switch_to_deploy")
    return any(hasattr(module, name) for module in model.modules() for name in methods)


def _layers(model: nn.Module) -> list[tuple[str, type[nn.Module]]]:
    return [(name, type(module)) for name, module in model.named_modules()]
