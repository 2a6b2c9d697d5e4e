"""The term library: every loss term is a function from a batch to one value per image.

`L = Σ_k w_k · Σ_i m_ki c_ki ℓ_ki / max(1, Σ_i m_ki)`: masks `m` and confidences `c` compose with any term because terms
return vectors, not scalars. Here are the terms that look at one image and its own targets; `contrastive.py` has those
over a batch, `banked.py` those over a bank of vectors, `batch.py` the symbols.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import (
    cosine_similarity,
    cross_entropy,
    kl_div,
    log_softmax,
    mse_loss,
    normalize,
    softmax,
)

from edgekd.distill.banked import domain_rel, text_soft_ce, visual_soft_ce, vlprox
from edgekd.distill.batch import Batch as Batch
from edgekd.distill.batch import unit
from edgekd.distill.contrastive import caption_nce, im_nce


def ce(batch: Batch) -> Tensor:
    """Cross-entropy of the linear head with the label."""
    assert batch.logits is not None
    return cross_entropy(batch.logits, batch.labels, reduction="none")


def logit_kd(batch: Batch, temperature: float = 4.0) -> Tensor:
    """Hinton's distillation, `T² · KL(softmax(z_T/T) ‖ softmax(z_S/T))`, on log-probabilities.

    The published VL2V code hands probabilities to a KL that expects their logarithm (METHODS §3.6); this does not.
    """
    assert batch.logits is not None
    teacher = log_softmax(batch.teacher_logits() / temperature, dim=-1)
    student = log_softmax(batch.logits / temperature, dim=-1)
    return temperature**2 * kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)


def cos_img(batch: Batch) -> Tensor:
    """`1 − cos(s, t)` (VL2V-ADiP's image half, up to the constant)."""
    assert batch.embedding is not None
    assert batch.teacher is not None
    return 1 - cosine_similarity(batch.embedding, batch.teacher, dim=-1)


def cos_text(batch: Batch) -> Tensor:
    """`1 − cos(s, T_y)` (VL2V-ADiP's text half, up to the constant)."""
    assert batch.embedding is not None
    assert batch.bank is not None
    return 1 - cosine_similarity(batch.embedding, batch.bank[batch.labels], dim=-1)


def text_ce(batch: Batch, tau: float = 0.07) -> Tensor:
    """Cross-entropy of `cos(ŝ, T)/τ` with the label (Li et al.'s L_cls)."""
    assert batch.embedding is not None
    assert batch.bank is not None
    return cross_entropy(unit(batch.embedding) @ batch.bank.T / tau, batch.labels, reduction="none")


def feat_mse(batch: Batch, normed: bool = False) -> Tensor:
    """Squared distance to the teacher's embedding.

    `normed=False`: mean over dimensions of the raw difference (NVIDIA's clip-distillation). `normed=True`: sum over
    dimensions between unit vectors, `‖ŝ − t̂‖² = 2 − 2cos` (Li et al.'s L_mse). Their third form, the logarithm of a
    batch's mean, has no value per image and is not offered.
    """
    assert batch.embedding is not None
    assert batch.teacher is not None
    if normed:
        return (
            (normalize(batch.embedding, dim=-1) - normalize(batch.teacher, dim=-1))
            .square()
            .sum(dim=-1)
        )
    return mse_loss(batch.embedding, batch.teacher, reduction="none").mean(dim=-1)


def pseudo_ce(batch: Batch, threshold: float = 0.95) -> Tensor:
    """Cross-entropy of the linear head with its own most probable class, where that has at least `threshold`.

    Self-training without a teacher (Lee 2013; the threshold is FixMatch's, Sohn et al. 2020). 0 for the other images.
    """
    assert batch.logits is not None
    probability, guess = softmax(batch.logits.detach(), dim=-1).max(dim=-1)
    losses = cross_entropy(batch.logits, guess, reduction="none")
    return torch.where(probability >= threshold, losses, 0.0)


@dataclass(frozen=True)
class TermInfo:
    """A term and the batch fields it cannot do without."""

    function: Callable[..., Tensor]
    needs: frozenset[str]


TERMS: dict[str, TermInfo] = {
    "ce": TermInfo(ce, frozenset({"logits", "labels"})),
    "logit_kd": TermInfo(logit_kd, frozenset({"logits", "teacher", "bank"})),
    "cos_img": TermInfo(cos_img, frozenset({"embedding", "teacher"})),
    "cos_text": TermInfo(cos_text, frozenset({"embedding", "bank", "labels"})),
    "text_ce": TermInfo(text_ce, frozenset({"embedding", "bank", "labels"})),
    "pseudo_ce": TermInfo(pseudo_ce, frozenset({"logits"})),
    "feat_mse": TermInfo(feat_mse, frozenset({"embedding", "teacher"})),
    "im_nce": TermInfo(im_nce, frozenset({"embedding", "teacher"})),
    "vlprox": TermInfo(vlprox, frozenset({"embedding", "teacher", "bank"})),
    "caption_nce": TermInfo(caption_nce, frozenset({"embedding", "captions", "labels"})),
    "text_soft_ce": TermInfo(text_soft_ce, frozenset({"embedding", "teacher", "bank"})),
    "visual_soft_ce": TermInfo(visual_soft_ce, frozenset({"embedding", "teacher", "visual_bank"})),
    "domain_rel": TermInfo(domain_rel, frozenset({"embedding", "bank", "domain_bank", "labels"})),
}


def teacher_correct(batch: Batch) -> Tensor:
    """Mask: images the teacher classifies as labelled (Li et al.'s filter). bool `[B]`."""
    return batch.teacher_logits().argmax(dim=-1) == batch.labels


def teacher_confidence(batch: Batch) -> Tensor:
    """Confidence: the teacher's probability of the label, float `[B]` in 0–1."""
    probabilities = softmax(batch.teacher_logits(), dim=-1)
    return probabilities.gather(1, batch.labels[:, None]).squeeze(1)


MASKS: dict[str, Callable[[Batch], Tensor]] = {"teacher_correct": teacher_correct}
CONFIDENCES: dict[str, Callable[[Batch], Tensor]] = {"teacher_confidence": teacher_confidence}


@dataclass(frozen=True)
class TermSpec:
    """One line of a recipe: a term, its weight, its numbers, and which images count how much."""

    weight: float
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mask: str | None = None
    confidence: str | None = None


def needs(terms: Mapping[str, TermSpec]) -> frozenset[str]:
    """Batch fields that these terms cannot do without."""
    fields: set[str] = set()
    for name, spec in terms.items():
        fields |= TERMS[name].needs
        if spec.mask or spec.confidence:
            fields |= {"teacher", "bank", "labels"}
    return frozenset(fields)


def uses_labels(name: str, spec: TermSpec) -> bool:
    """Whether a term counts labelled images alone."""
    return "labels" in needs({name: spec})


def weighted_mean(
    per_image: Tensor,
    *,
    mask: Tensor | None = None,
    confidence: Tensor | None = None,
    total: Callable[[Tensor], Tensor] = lambda count: count,
    processes: int = 1,
) -> Tensor:
    """`Σ_i m_i c_i ℓ_i / max(1, Σ_i m_i)` of a term's vector `[B]`; `total` and `processes` as for `objective`."""
    per_image = per_image.float()
    kept = torch.ones_like(per_image, dtype=torch.bool) if mask is None else mask
    if confidence is not None:
        per_image = per_image * confidence
    # where() and not a product: a NaN in an image that does not count must not reach the sum.
    per_image = torch.where(kept, per_image, 0.0)
    return processes * per_image.sum() / total(kept.sum()).clamp(min=1)


def objective(
    batch: Batch,
    terms: Mapping[str, TermSpec],
    total: Callable[[Tensor], Tensor] = lambda count: count,
    processes: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted loss and each term's own value.

    Terms that use labels are means over the labelled images, the others over all.

    Args:
        terms: term name → weight, numbers, mask and confidence.
        total: sums a scalar over all processes, so that a mask that keeps more images here than elsewhere still gives
            the mean over the *global* batch.
        processes: how many; gradients are averaged over them afterwards, so the local share is multiplied back.

    Returns:
        The scalar to call backward on, and the local value of each term (detached; a mean over processes is the
        global one). An empty mask gives 0, not NaN.
    """
    loss = batch.labels.new_zeros((), dtype=torch.float32)
    values = {}
    labelled = batch.labels >= 0
    # Rows without a label compute with class 0 where a term indexes by label, and do not count there.
    safe = dataclasses.replace(batch, labels=batch.labels.clamp(min=0))
    for name, spec in terms.items():
        per_image = TERMS[name].function(safe, **spec.params)  # [B]
        kept = MASKS[spec.mask](batch) if spec.mask else None
        counts = CONFIDENCES[spec.confidence](safe) if spec.confidence else None
        if uses_labels(name, spec):
            kept = labelled if kept is None else kept & labelled
        value = weighted_mean(
            per_image, mask=kept, confidence=counts, total=total, processes=processes
        )
        loss = loss + spec.weight * value
        values[name] = value.detach()
    return loss, values
