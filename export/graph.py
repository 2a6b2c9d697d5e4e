"""The graph for devices: uint8 pixels → logits or a unit embedding, including normalisation and head.

It is the deployed form of the trained network, in which branches for training are fused into single layers.
"""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekd.core.console import warn
from edgekd.core.errors import EdgekdError
from edgekd.core.predictor import in_batches
from edgekd.core.preprocess import Preprocess

M = TypeVar("M", bound=nn.Module)
MAX_ERROR = 1e-5
"""Maximum error of the deployed form against the trained one, as a share of the range of its outputs."""
_BATCH = 32


class Deployable(nn.Module):
    """Normalisation, backbone and head in one module.

    Args:
        backbone: float32 `[B, 3, H, W]`, normalised → features `[B, d]` (timm with `num_classes=0`).
        head: features to logits, a linear layer `[C, d]`, or to an embedding, a `UnitHead`.
        preprocess: input size and statistics; resizing is not part of the graph.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, backbone: nn.Module, head: nn.Linear | UnitHead, preprocess: Preprocess
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.size = preprocess.size
        mean = torch.tensor(preprocess.mean, dtype=torch.float64)
        std = torch.tensor(preprocess.std, dtype=torch.float64)
        # One statistic per value of a pixel row instead of per channel: a product over 3 · W contiguous values is
        # vectorised, while a trailing axis of 3 costs 1.6 ms at 224 px in an INT8 graph, a tenth of the model.
        self.register_buffer(
            "scale", (1 / (255 * std)).float().repeat(self.size), persistent=False
        )  # [W * 3]
        self.register_buffer(
            "shift", (-mean / std).float().repeat(self.size), persistent=False
        )  # [W * 3]

    def forward(self, images: Tensor) -> Tensor:
        """RGB uint8 `[B, size, size, 3]` → float32 logits `[B, C]`, or unit vectors `[B, D]`."""
        rows = images.float().flatten(2) * self.scale + self.shift  # [B, H, W * 3]
        pixels = torch.unflatten(rows, 2, (self.size, 3)).permute(0, 3, 1, 2)  # [B, 3, H, W]
        return cast(Tensor, self.head(self.backbone(pixels)))


class UnitHead(nn.Module):
    """Map features to an embedding of length 1 in the student's space.

    A factor does not change the direction, so the projector is scaled to lengths near D^¼. The squares and their sum,
    about D^-½ and D^½, are then equally far from the limits of half precision.

    Args:
        projector: `z [d] → [D]`; None if the features are already in the teacher's space.
        dim: D.
        length: typical length of the embeddings without the factor.
    """

    factor: Tensor

    def __init__(self, projector: nn.Linear | None, dim: int, length: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(dim**0.25 / length), persistent=False)
        self.projector = copy.deepcopy(projector)
        if self.projector is not None:
            self.projector.requires_grad_(False)
            for value in self.projector.parameters():
                value.mul_(self.factor)

    def forward(self, features: Tensor) -> Tensor:
        """`[B, d]` → `[B, D]`, rows of length 1; not finite for a row of zeros."""
        raw = (
            self.projector(features) if self.projector is not None else features * self.factor
        )  # [B, D]
        return cast(Tensor, raw / torch.linalg.vector_norm(raw, dim=1, keepdim=True))


def fold_head(projector: nn.Linear | None, bank: Tensor, scale: float) -> nn.Linear:
    """Return one layer for `scale · bank · (W z + b)`, the text head without its division by the embedding's length.

    Division by a positive number does not change the argmax, so the folded layer has the predictions of the cosine
    head. Its softmax differs, so the logit scale must be fitted on the outputs of this layer.

    Args:
        projector: `z [d] → [D]`; None if the features are already in the teacher's space.
        bank: text vectors, float `[C, D]`.
        scale: logit scale, positive.
    """
    text = bank.detach().double()  # [C, D]
    if projector is None:
        weight, bias = text, torch.zeros(len(text), dtype=torch.float64, device=text.device)
    else:
        if projector.out_features != text.shape[1]:
            raise EdgekdError(
                f"The projector gives {projector.out_features} values but the text bank has {text.shape[1]}.",
                "Use the text bank of the teacher the student was trained with.",
            )
        weight = text @ projector.weight.detach().double()  # [C, d]
        offset = (
            projector.bias.detach().double()
            if projector.bias is not None
            else text.new_zeros(text.shape[1])
        )
        bias = text @ offset  # [C]
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": (scale * weight).float(), "bias": (scale * bias).float()})
    return head.requires_grad_(False)


def fuse(model: M, example: Tensor) -> tuple[M, float | None]:
    """Return the deployed form of `model`: its re-parameterizable blocks and BatchNorm layers fused, by timm.

    Families have their own `fuse`, `reparameterize` or `switch_to_deploy` (RepVGG, MobileOne, FastViT, RepViT, LeViT,
    EfficientViT-M, GhostNetV3, …). A model without them, or already fused, is returned unchanged. So is a model whose
    fused form has different outputs, with a warning.

    Args:
        example: what `model` takes, a batch of any values.

    Returns:
        A copy in eval mode, and the largest difference of the outputs as a share of their range; `model` itself and
        None where nothing was fused.
    """
    from timm.utils import reparameterize_model

    if getattr(model, "is_fused", False) or not _has_branches(model):
        return model, None
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            fused = reparameterize_model(model)
            if _layers(fused) == _layers(model):
                return model, None
            wanted, found = model(example).double(), fused(example).double()
    except Exception as error:  # a family's own code; one such method may raise where it ran before
        warn(f"The student is not fused for inference, because that fails ({error}).")
        return model, None
    finally:
        model.train(was_training)
    span = float(wanted.max() - wanted.min()) or 1.0
    difference = float((found - wanted).abs().max()) / span
    if not difference <= MAX_ERROR:
        warn(
            f"The student is not fused for inference, because its outputs would change by {difference:.2g} of their "
            f"range, above {MAX_ERROR:g}."
        )
        return model, None
    fused.is_fused = True  # some families' blocks cannot be fused twice
    return fused, difference


def _has_branches(model: nn.Module) -> bool:
    methods = ("fuse", "reparameterize", "switch_to_deploy")
    return any(hasattr(module, name) for module in model.modules() for name in methods)


def _layers(model: nn.Module) -> list[tuple[str, type[nn.Module]]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def torch_logits(model: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the output float32 `[M, C]` of `model` in eval mode for uint8 `[M, H, W, 3]`, in batches."""
    was_training = model.training
    model.eval()
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))

    def predict(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = (
            model(torch.from_numpy(np.array(batch)).to(device)).float().cpu().numpy()
        )
        return found

    try:
        with torch.inference_mode():
            return in_batches(predict, images, _BATCH)
    finally:
        model.train(was_training)
