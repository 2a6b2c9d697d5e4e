"""What a loss term may look at.

Symbols follow Li et al. (ICCV 2023) and VL2V-ADiP (CVPR 2024): `s` student embedding, `t` teacher image embedding, `T`
text bank, `V` visual bank, `y` label; hats are unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


def _alone(own: Tensor) -> Tensor:
    return own


@dataclass(frozen=True)
class Batch:
    """One process's share of a global batch. Fields that a recipe does not need are None."""

    labels: Tensor
    """int64 `[B]`."""
    embedding: Tensor | None = None
    """Student in the teacher's space, float `[B, D]`, not normalised."""
    logits: Tensor | None = None
    """Trained class scores, float `[B, C]`."""
    teacher: Tensor | None = None
    """Teacher's image embedding of the same view as the student is to match it, float `[B, D]`."""
    bank: Tensor | None = None
    """Unit text vectors that the student is compared with, float `[C, D]`: of the classes, or of a vocabulary."""
    visual_bank: Tensor | None = None
    """Mean teacher embedding per row of `bank`, float `[C, D]`, not normalised."""
    domain_bank: Tensor | None = None
    """Unit text vectors per source domain, float `[domains, C, D]`."""
    captions: Tensor | None = None
    """Teacher's text embedding of each image's caption, float `[B, D]`, not normalised."""
    logit_scale: float = 100.0
    """The teacher's factor on cosines."""
    zero_shot: Tensor | None = None
    """The teacher's own logits, float `[B, C]`, where `teacher` and `bank` are centred and no longer give them."""
    gather: Callable[[Tensor], Tensor] = _alone
    """`[B, …]` of this process → the rows of all processes, through which gradients flow back."""
    first: int = 0
    """Where this process's rows begin in what `gather` gives."""

    def teacher_logits(self) -> Tensor:
        """The teacher's zero-shot logits `logit_scale · cos(t, T)`, float `[B, C]`."""
        if self.zero_shot is not None:
            return self.zero_shot
        assert self.teacher is not None
        assert self.bank is not None
        return self.logit_scale * normalize(self.teacher, dim=-1) @ self.bank.T

    def own_columns(self) -> Tensor:
        """Column of each own image among the gathered ones, int64 `[B]`."""
        return self.first + torch.arange(len(self.labels), device=self.labels.device)


def unit(vectors: Tensor) -> Tensor:
    """Rows of length 1, in single precision at least: cosines are divided by temperatures as small as 0.01."""
    return normalize(
        vectors.float() if vectors.dtype in (torch.float16, torch.bfloat16) else vectors, dim=-1
    )
