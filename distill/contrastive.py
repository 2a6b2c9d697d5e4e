"""Terms that tell an image from the other images of its batch (Li et al., ICCV 2023).

The other images are those of all processes: what a term gives does not depend on how many share the batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from edgekd.distill.batch import Batch, unit


def im_nce(
    batch: Batch,
    tau: float = 0.07,
    both_ways: bool = True,
    metric: Literal["cosine", "distance"] = "cosine",
) -> Tensor:
    """Find the own teacher embedding among the batch's, and the own student embedding among the students'.

    `½ [CE(ŝt̂ᵀ/τ, I) + CE(t̂ŝᵀ/τ, I)]` as published code has it (L_im-cst). `both_ways=False` keeps the first half, and
    `metric="distance"` scores with `−‖ŝ − t̂‖²`, which are the paper's; on unit vectors that is `2cos − 2`, so the same
    τ is twice as sharp.
    """
    assert batch.embedding is not None
    assert batch.teacher is not None
    student, teacher = unit(batch.embedding), unit(batch.teacher)  # [B, D]
    factor = {"cosine": 1.0, "distance": 2.0}[metric] / tau
    to_teachers = _find(student, batch.gather(teacher), batch.own_columns(), factor)
    if not both_ways:
        return to_teachers
    return (to_teachers + _find(teacher, batch.gather(student), batch.own_columns(), factor)) / 2


def caption_nce(batch: Batch, tau: float = 0.07, same_class_mask: bool = True) -> Tensor:
    """Find the own caption among the batch's (L_cap): `CE(cos(ŝ_i, cap_j)/τ over j, i)`.

    With `same_class_mask` other images of the own class are no wrong answers. The published code leaves τ out of this
    term alone (τ = 1); the paper does not.
    """
    assert batch.embedding is not None
    assert batch.captions is not None
    own = batch.own_columns()
    captions = batch.gather(unit(batch.captions))  # [all, D]
    left_out = ~captions.any(dim=-1)[None, :].expand(len(own), -1)  # images without a caption
    if same_class_mask:
        left_out = left_out | (batch.labels[:, None] == batch.gather(batch.labels)[None, :])
    left_out = left_out & (own[:, None] != torch.arange(len(captions), device=own.device))
    return _find(unit(batch.embedding), captions, own, 1 / tau, left_out)


def _find(
    queries: Tensor, keys: Tensor, own: Tensor, factor: float, left_out: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each query `[B, D]` with its own key among `keys` `[all, D]`; float `[B]`."""
    scores = factor * queries @ keys.T  # [B, all]
    if left_out is not None:
        scores = scores.masked_fill(left_out, -torch.inf)
    if not len(queries):
        return scores.sum(dim=1)  # cross_entropy refuses scores without columns
    return cross_entropy(scores, own, reduction="none")
