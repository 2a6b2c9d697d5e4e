"""Token-selective, confidence-weighted distillation in the style of CLIP-TD (Wang et al. 2022, arXiv 2201.05729).

    ℓ_i = α · mean_{j ∈ S} d(W_t h_j, e_j) + β · mean_{q ∈ Q} d(W_v u_q, v_q)
          + γ · ½ [d(W_e h_cls, e) + d(W_i h_cls, v)]
    L   = mean_i ℓ_task,i + λ · Σ_i c_i ℓ_i / B

The paper's own formulas could not be read: this is the specification of METHODS §5.3, and every number in it is ours
(docs/clip-td.md has the list). `h` are the student's text states, `u` its patch states; `e`, `v` the teacher's unit
vectors, without gradients. The maps `W` exist in training only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softmax

from edgekd.configs.vl import Confidence, Distance, Select
from edgekd.distill.vl.student import Joint


@dataclass(frozen=True)
class TeacherTokens:
    """The teacher's side of a batch: unit vectors, no gradients."""

    text: Tensor
    """float `[B, L, D]`."""
    content: Tensor
    """bool `[B, L]`, tokens that may be chosen."""
    relevance: Tensor
    """float `[B, L]`, `cos(E("a photo of " + w_j), v)`."""
    patches: Tensor
    """float `[B, P, D]`; P is 0 where no patches are taught."""
    pooled_text: Tensor
    """float `[B, D]`."""
    pooled_image: Tensor
    """float `[B, D]`."""


class TokenMaps(nn.Module):
    """The four linear maps `W` from the student's width to the teacher's; thrown away after training."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.text, self.patches = nn.Linear(width, dim), nn.Linear(width, dim)
        self.pooled_text, self.pooled_image = nn.Linear(width, dim), nn.Linear(width, dim)


def distance(a: Tensor, b: Tensor, kind: Distance) -> Tensor:
    """Between `a` (any length) and unit `b`, float `[…, D]` → `[…]`: `‖â − b‖₁ / D`, or `1 − cos`."""
    unit = normalize(a, dim=-1)
    return (unit - b).abs().mean(dim=-1) if kind == "l1" else 1 - (unit * b).sum(dim=-1)


def chosen(scores: Tensor, allowed: Tensor, ratio: float) -> Tensor:
    """The `max(1, ⌈ratio · n⌉)` best of a row's n allowed places, bool `[B, N]`; none where none is allowed."""
    ranked = (
        scores.masked_fill(~allowed, -math.inf)
        .argsort(dim=1, descending=True, stable=True)
        .argsort(dim=1)
    )
    count = allowed.sum(dim=1, keepdim=True)  # [B, 1]
    wanted = torch.ceil(ratio * count - 1e-6).clamp(min=1)
    return (ranked < wanted) & allowed


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values [B, N]` where `mask`, 0 for a row without any; `[B]`."""
    return torch.where(mask, values, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def token_td(
    joint: Joint,
    teacher: TeacherTokens,
    maps: TokenMaps,
    *,
    select: Select = "relevance",
    ratio: float = 0.3,
    pooled: bool = True,
    kind: Distance = "l1",
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """The distillation term, one value per example, float `[B]`.

    Args:
        select: which tokens and patches are matched: the `ratio` most relevant of each example, as many at random, all,
            or none (then only `pooled` is left).
        pooled: also match the first token's state with the teacher's pooled vectors.
        weights: α, β, γ.
        generator: of the random choice.
    """
    alpha, beta, gamma = weights
    total = joint.cls.new_zeros(len(joint.cls), dtype=torch.float32)
    if select != "none":
        total = total + alpha * masked_mean(
            distance(maps.text(joint.text), teacher.text, kind),
            _places(select, teacher.relevance, teacher.content, ratio, generator),
        )
        if teacher.patches.shape[1] and joint.patches.shape[1]:
            fit = (teacher.patches * teacher.pooled_text[:, None]).sum(
                dim=-1
            )  # cos(v_q, e), [B, P]
            every = torch.ones_like(fit, dtype=torch.bool)
            total = total + beta * masked_mean(
                distance(maps.patches(joint.patches), teacher.patches, kind),
                _places(select, fit, every, ratio, generator),
            )
    if pooled:
        of_text = distance(maps.pooled_text(joint.cls), teacher.pooled_text, kind)
        of_image = distance(maps.pooled_image(joint.cls), teacher.pooled_image, kind)
        total = total + gamma * (of_text + of_image) / 2
    return total


def _places(
    select: Select, scores: Tensor, allowed: Tensor, ratio: float, generator: torch.Generator | None
) -> Tensor:
    if select == "all":
        return allowed
    if select == "random":
        scores = torch.rand(scores.shape, generator=generator)
    return chosen(scores, allowed, ratio)


def confidence(
    kind: Confidence, teacher: Tensor, truth: Tensor, student: Tensor, floor: float = 0.05
) -> Tensor:
    """How much each example's term counts, float `[B]`, mean 1 over the batch so that λ keeps its meaning.

    Args:
        kind: `label` takes `p_T(y)`; `max` the teacher's largest probability; `relative` `p_T(y) / (p_T(y) + p_S(y))`.
        teacher: the teacher's logits over statements of which one is true, `[B, M]`. truth: int64 `[B]`.
        student: the student's probability of the right answer, `[B]`; no gradient goes through it.
        floor: smallest value before the division by the mean.
    """
    if kind == "none":
        return torch.ones_like(student).detach()
    probabilities = softmax(teacher.float(), dim=-1)  # [B, M]
    own = probabilities.gather(1, truth[:, None]).squeeze(1)
    found = {
        "label": own,
        "max": probabilities.amax(dim=-1),
        "relative": own / (own + student).clamp(min=1e-12),
    }[kind]
    found = found.detach().clamp(floor, 1)
    return found / found.mean()
