"""Token-selective, confidence-weighted distillation in the style of CLIP-TD (Wang et al. 2022, arXiv 2201.05729).

    ℓ_i = mean_{j ∈ S} d(W_t h_j, e_j) + mean_{q ∈ Q} d(W_v u_q, v_q) + ½ [d(W_e h_cls, e) + d(W_i h_cls, v)]
    L   = mean_i ℓ_task,i + λ · Σ_i c_i ℓ_i / B

The formulas of the paper were not available. This is the specification of METHODS §5.3 with our own numbers
(docs/clip-td.md has the list). `h` are the student's text states, `u` its patch states, and `e`, `v` the teacher's unit
vectors, without gradients. The maps `W` are only used in training. Importing this module adds `token_td` to the loss
terms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, softmax

from edgekd.configs.vl import Confidence, Distance, Select
from edgekd.distill.losses import TERMS, UNSET, Batch, TermInfo
from edgekd.distill.vl.student import Joint


@dataclass(frozen=True)
class TeacherTokens:
    """The teacher's unit vectors of a batch, without gradients."""

    text: Tensor
    """float `[B, L, D]`."""
    content: Tensor
    """bool `[B, L]`, tokens that may be matched."""
    relevance: Tensor
    """float `[B, L]`, `cos(E("a photo of " + w_j), v)`."""
    patches: Tensor
    """float `[B, P, D]`; P is 0 if no patches are matched."""
    pooled_text: Tensor
    """float `[B, D]`."""
    pooled_image: Tensor
    """float `[B, D]`."""
    logits: Tensor
    """float `[B, M]`, over statements of which one is true."""
    truth: Tensor
    """int64 `[B]`, the true statement."""


class TokenMaps(nn.Module):
    """The four linear maps `W` from the student's width to the teacher's; not saved with the student."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.text, self.patches = nn.Linear(width, dim), nn.Linear(width, dim)
        self.pooled_text, self.pooled_image = nn.Linear(width, dim), nn.Linear(width, dim)


def token_distance(a: Tensor, b: Tensor, kind: Distance) -> Tensor:
    """Return the distance of `a` (any length) and unit `b`, float `[…, D]` → `[…]`: `‖â − b‖₁ / D`, or `1 − cos`."""
    unit = normalize(a, dim=-1)
    return (unit - b).abs().mean(dim=-1) if kind == "l1" else 1 - (unit * b).sum(dim=-1)


def most_relevant(scores: Tensor, allowed: Tensor, ratio: float) -> Tensor:
    """Return the `max(1, ⌈ratio · n⌉)` best of the n allowed places of each row, bool `[B, N]`."""
    order = scores.masked_fill(~allowed, -math.inf).argsort(dim=1, descending=True, stable=True)
    count = allowed.sum(dim=1, keepdim=True)  # [B, 1]
    wanted = torch.ceil(ratio * count - 1e-6).clamp(min=1)
    return (order.argsort(dim=1) < wanted) & allowed


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the masked `values [B, N]` per row, 0 for a row with an empty mask, `[B]`."""
    return torch.where(mask, values, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


@dataclass(frozen=True)
class VlBatch(Batch):
    """Examples of a vision-language task; `labels` and `logits` are those of the task."""

    joint: Joint = UNSET
    """The student's states, one row per example."""
    tokens: TeacherTokens = UNSET
    maps: TokenMaps = UNSET
    generator: torch.Generator | None = None
    """Generator for the random choice of tokens."""


def token_td(
    batch: VlBatch,
    select: Select = "relevance",
    ratio: float = 0.3,
    pooled: bool = True,
    distance: Distance = "l1",
    confidence: Confidence = "none",
) -> Tensor:
    """Compute the distillation term, `c_i ℓ_i` of each example, float `[B]`.

    Args:
        select: tokens and patches to match: the `ratio` most relevant ones of each example, the same number at random,
            all, or none (then only `pooled` is used).
        pooled: also match the first token's state with the teacher's pooled vectors.
        confidence: the kind of `confidences`.
    """
    joint, teacher, maps = batch.joint, batch.tokens, batch.maps
    total = joint.cls.new_zeros(len(joint.cls), dtype=torch.float32)

    def chosen(scores: Tensor, allowed: Tensor) -> Tensor:
        if select == "all":
            return allowed
        if select == "random":
            scores = torch.rand(scores.shape, generator=batch.generator)
        return most_relevant(scores, allowed, ratio)

    if select != "none":
        words = token_distance(maps.text(joint.text), teacher.text, distance)
        total = total + masked_mean(words, chosen(teacher.relevance, teacher.content))
        if teacher.patches.shape[1] and joint.patches.shape[1]:
            fit = (teacher.patches * teacher.pooled_text[:, None]).sum(dim=-1)  # cos(v_q, e) [B, P]
            cells = token_distance(maps.patches(joint.patches), teacher.patches, distance)
            every = torch.ones_like(fit, dtype=torch.bool)
            total = total + masked_mean(cells, chosen(fit, every))
    if pooled:
        text = token_distance(maps.pooled_text(joint.cls), teacher.pooled_text, distance)
        image = token_distance(maps.pooled_image(joint.cls), teacher.pooled_image, distance)
        total = total + (text + image) / 2
    if confidence == "none":
        return total
    own = (-cross_entropy(batch.logits, batch.labels, reduction="none")).exp().detach()
    return total * confidences(confidence, teacher.logits, teacher.truth, own)


def confidences(
    kind: Confidence, teacher: Tensor, truth: Tensor, student: Tensor, floor: float = 0.05
) -> Tensor:
    """Return the weight of each example, float `[B]`, with mean 1 over the batch so that λ keeps its meaning.

    Args:
        kind: `label` is `p_T(y)`, `max` the teacher's largest probability, `relative` `p_T(y) / (p_T(y) + p_S(y))`.
        teacher: the teacher's logits over statements, `[B, M]`. truth: int64 `[B]`, index of the true one.
        student: the student's probability of the correct answer, `[B]`, without gradient.
        floor: minimum before the division by the mean.
    """
    probabilities = softmax(teacher.float(), dim=-1)  # [B, M]
    own = probabilities.gather(1, truth[:, None]).squeeze(1)
    found = {
        "label": own,
        "max": probabilities.amax(dim=-1),
        "relative": own / (own + student).clamp(min=1e-12),
    }[kind]
    found = found.detach().clamp(floor, 1)
    return found / found.mean()


TERMS["token_td"] = TermInfo(token_td, frozenset({"joint", "tokens"}))
