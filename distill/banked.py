"""Terms that compare student and teacher by what they say about a bank of vectors: texts, prototypes, domain texts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, log_softmax, softmax

from edgekd.distill.batch import Batch, unit


def vlprox(batch: Batch, k: int = 256, tau: float = 0.07) -> Tensor:
    """Keep the teacher's nearest texts near, in the teacher's proportions (Li et al., ICCV 2023, L_vlprox).

    `KL(softmax_Y(cos(t̂,T)/τ) ‖ softmax_Y(cos(ŝ,T)/τ))` over `Y`, the teacher's `k` best classes (all, where there are
    fewer). The paper filters it by the mask `teacher_correct`; a batch without a kept image gives 0 (published: NaN).
    """
    assert batch.embedding is not None
    assert batch.teacher is not None
    assert batch.bank is not None
    teacher, chosen = (unit(batch.teacher) @ batch.bank.T).topk(
        min(k, len(batch.bank)), dim=-1
    )  # [B, k]
    student = (unit(batch.embedding) @ batch.bank.T).gather(1, chosen)
    divergence = kl_div(
        log_softmax(student / tau, dim=-1),
        log_softmax(teacher / tau, dim=-1),
        reduction="none",
        log_target=True,
    )
    return divergence.sum(dim=-1)


def text_soft_ce(batch: Batch, tau_student: float = 0.2, tau_teacher: float = 0.01) -> Tensor:
    """Say about the texts what the teacher says (LGD, T-MM 2024, L_TEX): `−Σ_c p_c log q_c`, without labels.

    `p = softmax(t̂·Tᵀ/τ_T)`, `q = softmax(ŝ·Tᵀ/τ_S)`.
    """
    assert batch.embedding is not None
    assert batch.teacher is not None
    assert batch.bank is not None
    return _soft_ce(
        unit(batch.embedding) @ batch.bank.T / tau_student,
        unit(batch.teacher) @ batch.bank.T / tau_teacher,
    )


def visual_soft_ce(
    batch: Batch, tau_student: float = 0.2, tau_teacher: float = 0.01, self_slot: bool = True
) -> Tensor:
    """Say about the visual prototypes what the teacher says (LGD, L_VIS), own teacher embedding among them.

    Scores of the student `[cos(ŝ,t̂); ŝ·Vᵀ]` and of the teacher `[1; t̂·Vᵀ]`; `self_slot=False` leaves the first out.
    With τ_T = 0.01 the target is nearly one-hot on the self slot unless a prototype is within about 0.05 of `t̂`.
    """
    assert batch.embedding is not None
    assert batch.teacher is not None
    assert batch.visual_bank is not None
    student, teacher = unit(batch.embedding), unit(batch.teacher)
    said, told = student @ batch.visual_bank.T, teacher @ batch.visual_bank.T  # [B, C]
    if self_slot:
        own = (student * teacher).sum(dim=-1, keepdim=True)
        said, told = torch.cat([own, said], dim=-1), torch.cat([torch.ones_like(own), told], dim=-1)
    return _soft_ce(said / tau_student, told / tau_teacher)


def domain_rel(batch: Batch, factor: float = 10.0) -> Tensor:
    """Stand to the domains' texts as the class's own text does (RISE, ICCV 2023, RD).

    `factor · mean_d (softmax_d cos(s, T⁽ᵈ⁾_y) − softmax_d cos(T_y, T⁽ᵈ⁾_y))²` over the source domains d, where `T⁽ᵈ⁾`
    holds "a {domain} of a {class}".
    """
    assert batch.embedding is not None
    assert batch.bank is not None
    assert batch.domain_bank is not None
    anchors = batch.domain_bank[:, batch.labels]  # [domains, B, D]
    said = softmax(cosine_similarity(batch.embedding[None], anchors, dim=-1), dim=0)
    told = softmax(cosine_similarity(batch.bank[batch.labels][None], anchors, dim=-1), dim=0)
    return factor * (said - told).square().mean(dim=0)


def _soft_ce(student: Tensor, teacher: Tensor) -> Tensor:
    return -(softmax(teacher, dim=-1) * log_softmax(student, dim=-1)).sum(dim=-1)
