"""The loss library: every term is a function from a batch to one value per image.

`L = Σ_k w_k · Σ_i m_ki c_ki ℓ_ki / max(1, Σ_i m_ki)`: masks `m` and confidences `c` compose with any term because terms
return vectors, not scalars. Symbols follow Li et al. (ICCV 2023) and VL2V-ADiP (CVPR 2024): `s` student embedding, `t`
teacher image embedding, `T` text bank, `V` visual bank, `y` label. Hats are unit vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

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

UNSET: Any = None
"""Value of the batch fields that a recipe does not need."""


@dataclass(frozen=True)
class Batch:
    """One process's share of a global batch. A term uses only the fields that it declares."""

    labels: Tensor
    """int64 `[B]`, −1 for images without a label."""
    embedding: Tensor = UNSET
    """Student's embedding in the teacher's space, float `[B, D]`, not normalised."""
    logits: Tensor = UNSET
    """Trained class scores, float `[B, C]`."""
    teacher: Tensor = UNSET
    """Teacher's image embedding of the same view, the target of the student, float `[B, D]`."""
    bank: Tensor = UNSET
    """Unit text vectors of the classes or a vocabulary, float `[C, D]`."""
    visual_bank: Tensor = UNSET
    """Mean teacher embedding per row of `bank`, float `[C, D]`, not normalised."""
    domain_bank: Tensor = UNSET
    """Unit text vectors per source domain, float `[domains, C, D]`."""
    captions: Tensor = UNSET
    """Teacher's text embedding of each image's caption, float `[B, D]`, not normalised; zeros without a caption."""
    logit_scale: float = 100.0
    """The teacher's factor on cosines."""
    zero_shot: Tensor = UNSET
    """The teacher's logits, float `[B, C]`, if `teacher` and `bank` are mean-centred and do not determine them."""
    gather: Callable[[Tensor], Tensor] = lambda own: own
    """`[B, …]` of this process → the rows of all processes, with gradients."""
    first: int = 0
    """Index of this process's first row in the result of `gather`."""
    smoothing: float = 0.0
    """Label smoothing of cross-entropies with the label."""
    class_weights: Tensor = UNSET
    """Factor on cross-entropies with the label, by class, float `[C]`."""
    partner: Batch | None = None
    """For mixed images: the same output with the targets of the partner images."""
    own: Tensor = UNSET
    """Of mixed images: the part that is not the partner's, float `[B]` in 0–1."""

    def teacher_logits(self) -> Tensor:
        """Return the teacher's zero-shot logits `logit_scale · cos(t, T)`, float `[B, C]`."""
        if self.zero_shot is not None:
            return self.zero_shot
        return self.logit_scale * normalize(self.teacher, dim=-1) @ self.bank.T

    def own_columns(self) -> Tensor:
        """Return the column of each own image among the gathered ones, int64 `[B]`."""
        return self.first + torch.arange(len(self.labels), device=self.labels.device)


def unit(vectors: Tensor) -> Tensor:
    """Normalise rows to length 1, at least in float32, since cosines are divided by temperatures down to 0.01."""
    half = vectors.dtype in (torch.float16, torch.bfloat16)
    return normalize(vectors.float() if half else vectors, dim=-1)


# --- terms over one image and its own targets


def ce(batch: Batch) -> Tensor:
    """Compute the cross-entropy of the linear head with the label."""
    return _label_ce(batch, batch.logits)


def logit_kd(batch: Batch, temperature: float = 4.0) -> Tensor:
    """Compute Hinton's distillation, `T² · KL(softmax(z_T/T) ‖ softmax(z_S/T))`, on log-probabilities.

    The published VL2V code passes probabilities to a KL that expects their logarithm (METHODS §3.6).
    """
    teacher = log_softmax(batch.teacher_logits() / temperature, dim=-1)
    student = log_softmax(batch.logits / temperature, dim=-1)
    return temperature**2 * _kl(student, teacher)


def cos_img(batch: Batch) -> Tensor:
    """Compute `1 − cos(s, t)` (VL2V-ADiP's image half, up to the constant)."""
    return 1 - cosine_similarity(batch.embedding, batch.teacher, dim=-1)


def cos_text(batch: Batch) -> Tensor:
    """Compute `1 − cos(s, T_y)` (VL2V-ADiP's text half, up to the constant)."""
    return 1 - cosine_similarity(batch.embedding, batch.bank[batch.labels], dim=-1)


def text_ce(batch: Batch, tau: float = 0.07) -> Tensor:
    """Compute the cross-entropy of `cos(ŝ, T)/τ` with the label (Li et al.'s L_cls)."""
    return _label_ce(batch, unit(batch.embedding) @ batch.bank.T / tau)


def _label_ce(batch: Batch, scores: Tensor) -> Tensor:
    return cross_entropy(
        scores,
        batch.labels,
        batch.class_weights,
        reduction="none",
        label_smoothing=batch.smoothing,
    )


def feat_mse(batch: Batch, normed: bool = False) -> Tensor:
    """Compute the squared distance to the teacher's embedding.

    `normed=False`: mean over dimensions of the raw difference (NVIDIA's clip-distillation). `normed=True`: sum over
    dimensions between unit vectors, `‖ŝ − t̂‖² = 2 − 2cos` (Li et al.'s L_mse).
    """
    if normed:
        difference = normalize(batch.embedding, dim=-1) - normalize(batch.teacher, dim=-1)
        return difference.square().sum(dim=-1)
    return mse_loss(batch.embedding, batch.teacher, reduction="none").mean(dim=-1)


def pseudo_ce(batch: Batch, threshold: float = 0.95) -> Tensor:
    """Compute the cross-entropy with the student's own top class if its probability is at least `threshold`, else 0.

    Self-training without a teacher (Lee 2013; the threshold is FixMatch's, Sohn et al. 2020).
    """
    probability, guess = softmax(batch.logits.detach(), dim=-1).max(dim=-1)
    losses = cross_entropy(batch.logits, guess, reduction="none")
    return torch.where(probability >= threshold, losses, 0.0)


# --- contrastive terms over the global batch (Li et al., ICCV 2023)


def im_nce(
    batch: Batch,
    tau: float = 0.07,
    both_ways: bool = True,
    metric: Literal["cosine", "distance"] = "cosine",
) -> Tensor:
    """Match each student embedding with the teacher embedding of the same image among those of the batch.

    `½ [CE(ŝt̂ᵀ/τ, I) + CE(t̂ŝᵀ/τ, I)]` as in the published code (L_im-cst). `both_ways=False` keeps the first half, and
    `metric="distance"` scores with `−‖ŝ − t̂‖²`, as in the paper. On unit vectors that is `2cos − 2`, so the same τ is
    twice as sharp.
    """
    student, teacher = unit(batch.embedding), unit(batch.teacher)  # [B, D]
    factor = {"cosine": 1.0, "distance": 2.0}[metric] / tau
    to_teachers = _match(student, batch.gather(teacher), batch.own_columns(), factor)
    if not both_ways:
        return to_teachers
    return (to_teachers + _match(teacher, batch.gather(student), batch.own_columns(), factor)) / 2


def caption_nce(batch: Batch, tau: float = 0.07, same_class_mask: bool = True) -> Tensor:
    """Match each image with its caption among those of the batch (L_cap): `CE(cos(ŝ_i, cap_j)/τ over j, i)`.

    With `same_class_mask`, other images of the same class are not negatives. The published code omits τ in this term
    (τ = 1); the paper does not.
    """
    own = batch.own_columns()
    captions = batch.gather(unit(batch.captions))  # [all, D]
    excluded = ~captions.any(dim=-1)[None, :].expand(len(own), -1)  # images without a caption
    if same_class_mask:
        excluded = excluded | (batch.labels[:, None] == batch.gather(batch.labels)[None, :])
    excluded = excluded & (own[:, None] != torch.arange(len(captions), device=own.device))
    return _match(unit(batch.embedding), captions, own, 1 / tau, excluded)


def _match(
    queries: Tensor, keys: Tensor, own: Tensor, factor: float, excluded: Tensor | None = None
) -> Tensor:
    """Compute the cross-entropy of each query `[B, D]` with its key among `keys` `[all, D]`, float `[B]`."""
    scores = factor * queries @ keys.T  # [B, all]
    if excluded is not None:
        scores = scores.masked_fill(excluded, -torch.inf)
    if not len(queries):
        return scores.sum(dim=1)  # cross_entropy refuses scores without columns
    return cross_entropy(scores, own, reduction="none")


# --- terms over a bank of vectors: texts, visual prototypes, domain texts


def vlprox(batch: Batch, k: int = 256, tau: float = 0.07) -> Tensor:
    """Match the teacher's distribution over its nearest texts (Li et al., ICCV 2023, L_vlprox).

    `KL(softmax_Y(cos(t̂,T)/τ) ‖ softmax_Y(cos(ŝ,T)/τ))` over `Y`, the teacher's `k` best classes (all, if there are
    fewer). The paper filters it by the mask `teacher_correct`. An empty mask gives 0 (published code: NaN).
    """
    scores = unit(batch.teacher) @ batch.bank.T
    teacher, chosen = scores.topk(min(k, len(batch.bank)), dim=-1)  # [B, k]
    student = (unit(batch.embedding) @ batch.bank.T).gather(1, chosen)
    return _kl(log_softmax(student / tau, dim=-1), log_softmax(teacher / tau, dim=-1))


def text_soft_ce(batch: Batch, tau_student: float = 0.2, tau_teacher: float = 0.01) -> Tensor:
    """Match the teacher's distribution over the texts (LGD, T-MM 2024, L_TEX): `−Σ_c p_c log q_c`, without labels.

    `p = softmax(t̂·Tᵀ/τ_T)`, `q = softmax(ŝ·Tᵀ/τ_S)`.
    """
    return _soft_ce(
        unit(batch.embedding) @ batch.bank.T / tau_student,
        unit(batch.teacher) @ batch.bank.T / tau_teacher,
    )


def visual_soft_ce(
    batch: Batch, tau_student: float = 0.2, tau_teacher: float = 0.01, self_slot: bool = True
) -> Tensor:
    """Match the teacher's distribution over the visual prototypes and its own embedding (LGD, L_VIS).

    Scores of the student `[cos(ŝ,t̂); ŝ·Vᵀ]` and of the teacher `[1; t̂·Vᵀ]`; `self_slot=False` leaves the first out.
    With τ_T = 0.01 the target is nearly one-hot on the self slot unless a prototype is within about 0.05 of `t̂`.
    """
    student, teacher = unit(batch.embedding), unit(batch.teacher)
    own, target = student @ batch.visual_bank.T, teacher @ batch.visual_bank.T  # [B, C]
    if self_slot:
        cosine = (student * teacher).sum(dim=-1, keepdim=True)
        own = torch.cat([cosine, own], dim=-1)
        target = torch.cat([torch.ones_like(cosine), target], dim=-1)
    return _soft_ce(own / tau_student, target / tau_teacher)


def domain_rel(batch: Batch, factor: float = 10.0) -> Tensor:
    """Match the class text's relation to the texts of the source domains (RISE, ICCV 2023, RD).

    `factor · mean_d (softmax_d cos(s, T⁽ᵈ⁾_y) − softmax_d cos(T_y, T⁽ᵈ⁾_y))²`, where `T⁽ᵈ⁾` holds "a {domain} of a
    {class}".
    """
    anchors = batch.domain_bank[:, batch.labels]  # [domains, B, D]
    own = softmax(cosine_similarity(batch.embedding[None], anchors, dim=-1), dim=0)
    target = softmax(cosine_similarity(batch.bank[batch.labels][None], anchors, dim=-1), dim=0)
    return factor * (own - target).square().mean(dim=0)


def _soft_ce(student: Tensor, teacher: Tensor) -> Tensor:
    return -(softmax(teacher, dim=-1) * log_softmax(student, dim=-1)).sum(dim=-1)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    return kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)


@dataclass(frozen=True)
class TermInfo:
    """A term and the batch fields it needs."""

    function: Callable[..., Tensor]
    needs: frozenset[str]


TERMS: dict[str, TermInfo] = {
    function.__name__: TermInfo(function, frozenset(fields))
    for function, fields in {
        ce: ("logits", "labels"),
        logit_kd: ("logits", "teacher", "bank"),
        cos_img: ("embedding", "teacher"),
        cos_text: ("embedding", "bank", "labels"),
        text_ce: ("embedding", "bank", "labels"),
        pseudo_ce: ("logits",),
        feat_mse: ("embedding", "teacher"),
        im_nce: ("embedding", "teacher"),
        vlprox: ("embedding", "teacher", "bank"),
        caption_nce: ("embedding", "captions", "labels"),
        text_soft_ce: ("embedding", "teacher", "bank"),
        visual_soft_ce: ("embedding", "teacher", "visual_bank"),
        domain_rel: ("embedding", "bank", "domain_bank", "labels"),
    }.items()
}


def teacher_correct(batch: Batch) -> Tensor:
    """Return the mask of images that the teacher classifies correctly (Li et al.'s filter), bool `[B]`."""
    return batch.teacher_logits().argmax(dim=-1) == batch.labels


def teacher_confidence(batch: Batch) -> Tensor:
    """Return the teacher's probability of the label, float `[B]` in 0–1."""
    probabilities = softmax(batch.teacher_logits(), dim=-1)
    return probabilities.gather(1, batch.labels[:, None]).squeeze(1)


MASKS: dict[str, Callable[[Batch], Tensor]] = {"teacher_correct": teacher_correct}
CONFIDENCES: dict[str, Callable[[Batch], Tensor]] = {"teacher_confidence": teacher_confidence}


@dataclass(frozen=True)
class TermSpec:
    """A term of a recipe: its weight and parameters, and the weighting of images."""

    weight: float
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mask: str | None = None
    confidence: str | None = None


def needs(terms: Mapping[str, TermSpec]) -> frozenset[str]:
    """Return the batch fields that these terms need."""
    fields: set[str] = set()
    for name, spec in terms.items():
        fields |= TERMS[name].needs
        if spec.mask or spec.confidence:
            fields |= {"teacher", "bank", "labels"}
    return frozenset(fields)


def uses_labels(name: str, spec: TermSpec) -> bool:
    """Return whether a term counts only labelled images."""
    return "labels" in needs({name: spec})


def objective(
    batch: Batch,
    terms: Mapping[str, TermSpec],
    total: Callable[[Tensor], Tensor] = lambda count: count,
    processes: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the weighted loss and each term's own value.

    Terms that use labels are means over the labelled images, and other terms over all images. For every term, the loss
    of a mixed image is `λ · loss with its own targets + (1 − λ) · loss with its partner's targets`.

    Args:
        terms: term name → weight, parameters, mask and confidence.
        total: sums a scalar over all processes, so that masks that keep different numbers of images per process still
            give the mean over the *global* batch.
        processes: number of processes; their gradients are averaged later, so the local loss is multiplied by it.

    Returns:
        The scalar loss, and the local value of each term (detached; its mean over processes is the global value). An
        empty mask gives 0, not NaN.
    """
    loss = batch.labels.new_zeros((), dtype=torch.float32)
    values = {}
    for name, spec in terms.items():
        value = processes * _mean(batch, batch.own, name, spec, total)
        if batch.partner is not None:
            value = value + processes * _mean(batch.partner, 1 - batch.own, name, spec, total)
        loss = loss + spec.weight * value
        values[name] = value.detach()
    return loss, values


def _mean(
    batch: Batch, part: Tensor | None, name: str, spec: TermSpec, total: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return this process's share of a term's mean over the global batch; `part` `[B]` weights the images."""
    labelled = batch.labels >= 0
    # In terms that index by label, rows without a label use class 0 and are masked out.
    safe = dataclasses.replace(batch, labels=batch.labels.clamp(min=0))
    per_image = TERMS[name].function(safe, **spec.params).float()  # [B]
    mask = MASKS[spec.mask](batch) if spec.mask else torch.ones_like(labelled)
    if uses_labels(name, spec):
        mask = mask & labelled
    if spec.confidence:
        per_image = per_image * CONFIDENCES[spec.confidence](safe)
    if part is not None:
        per_image = per_image * part
    # where() instead of a product: a NaN of a masked image must not reach the sum.
    return torch.where(mask, per_image, 0.0).sum() / total(mask.sum()).clamp(min=1)
