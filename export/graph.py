"""The graph a device runs: uint8 pixels in, logits or a unit embedding out, with normalisation and head inside."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from edgekd.core.errors import EdgekdError
from edgekd.core.preprocess import Preprocess


class Deployable(nn.Module):
    """Backbone and head behind plain pixels.

    Args:
        backbone: float32 `[B, 3, H, W]`, normalised → features `[B, d]` (timm with `num_classes=0`).
        head: features to logits, a linear layer `[C, d]`, or to an embedding, a `UnitHead`.
        preprocess: gives the input size and the statistics; resizing stays outside the graph.
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
        # One statistic per value of a pixel row, not per channel: a product with 3 · W contiguous values runs at full
        # vector width, one with a trailing axis of 3 costs 1.6 ms at 224 px in an INT8 graph, a tenth of the model.
        self.register_buffer(
            "scale", (1 / (255 * std)).float().repeat(self.size), persistent=False
        )  # [W * 3]
        self.register_buffer(
            "shift", (-mean / std).float().repeat(self.size), persistent=False
        )  # [W * 3]

    def forward(self, images: Tensor) -> Tensor:
        """RGB uint8 `[B, size, size, 3]` → float32 logits `[B, C]`, or unit vectors `[B, D]`.

        Raises:
            EdgekdError: another dtype, another size, or not square.
        """
        if images.dtype != torch.uint8 or images.shape[1:] != (self.size, self.size, 3):
            raise EdgekdError(
                f"The model takes uint8 [B, {self.size}, {self.size}, 3], not "
                f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}.",
                "Prepare the images with the artifact's own preprocess.",
            )
        rows = images.float().flatten(2) * self.scale + self.shift  # [B, H, W * 3]
        pixels = torch.unflatten(rows, 2, (self.size, 3)).permute(0, 3, 1, 2)  # [B, 3, H, W]
        return cast(Tensor, self.head(self.backbone(pixels)))


class UnitHead(nn.Module):
    """Features to an embedding of length 1 in the student's space.

    Its direction does not feel a factor, so the projector takes one that brings lengths near D^¼: then the squares and
    their sum, about D^-½ and D^½, are equally far from the ends of half precision.

    Args:
        projector: `z [d] → [D]`; None where the backbone's features already live in the teacher's space.
        dim: D.
        length: what the embeddings' length is about, before any factor.
    """

    factor: Tensor

    def __init__(self, projector: nn.Linear | None, dim: int, length: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(dim**0.25 / length), persistent=False)
        self.projector = None if projector is None else self.scaled(projector)

    def scaled(self, projector: nn.Linear) -> nn.Linear:
        """A copy of a projector with this head's factor, without gradients."""
        copied = copy.deepcopy(projector).requires_grad_(False)
        copied.load_state_dict(
            {name: float(self.factor) * value for name, value in projector.state_dict().items()}
        )
        return copied

    def forward(self, features: Tensor) -> Tensor:
        """`[B, d]` → `[B, D]`, rows of length 1; not finite for a row of zeros, which has no direction."""
        raw = (
            self.projector(features) if self.projector is not None else features * self.factor
        )  # [B, D]
        return cast(Tensor, raw / torch.linalg.vector_norm(raw, dim=1, keepdim=True))


def fold_head(projector: nn.Linear | None, bank: Tensor, scale: float) -> nn.Linear:
    """One layer for `scale · bank · (W z + b)`: the text head without its division by the embedding's length.

    Dividing by a positive number moves no argmax, so the folded layer predicts what the cosine head predicts; its
    softmax differs, which is why the logit scale has to be fitted on what this layer gives.

    Args:
        projector: `z [d] → [D]`; None where the backbone's features already live in the teacher's space.
        bank: text vectors, float `[C, D]`.
        scale: logit scale, positive.

    Returns:
        float32 linear layer `[C, d]` with a bias, no gradients.

    Raises:
        EdgekdError: the projector's output does not have the bank's width.
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
