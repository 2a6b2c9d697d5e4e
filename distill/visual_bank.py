"""LGD's visual semantics bank: what the teacher's image embeddings of each text look like on average."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from edgekd.distill.batch import unit


class VisualBank(nn.Module):
    """One prototype per text, moved by the language-guided knowledge aggregation (LGKA; Li et al., T-MM 2024).

    An image belongs to the text nearest to the teacher's embedding of it, `c_i = argmax_c t̂_i · T_c`; no label is used.
    Per text in the batch, `m_c = mean t̂_i`; the first time `V_c ← m_c`, later `V_c ← μ V_c + (1 − μ) m_c`. Texts not
    met yet hold a random unit vector. Prototypes are not normalised again.

    Args:
        texts: the text bank `T`, unit rows, float `[C, D]`.
        momentum: μ; the published script has 0.999.
    """

    texts: Tensor
    vectors: Tensor
    seen: Tensor

    def __init__(self, texts: Tensor, momentum: float = 0.999, seed: int = 0) -> None:
        super().__init__()
        self.momentum = momentum
        noise = torch.randn(texts.shape, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("texts", texts, persistent=False)
        self.register_buffer("vectors", normalize(noise, dim=-1))
        self.register_buffer("seen", torch.zeros(len(texts), dtype=torch.bool))

    @torch.no_grad()
    def update(self, teacher: Tensor) -> None:
        """Take in the teacher's image embeddings of a whole global batch, float `[B, D]`, in one step."""
        embeddings = unit(teacher)
        nearest = (embeddings @ self.texts.T).argmax(dim=-1)  # [B]
        counts = torch.bincount(nearest, minlength=len(self.texts))  # [C]
        sums = torch.zeros_like(self.vectors).index_add_(0, nearest, embeddings)
        means = sums / counts.clamp(min=1)[:, None]
        moved = torch.where(
            self.seen[:, None], torch.lerp(means, self.vectors, self.momentum), means
        )
        self.vectors.copy_(torch.where((counts > 0)[:, None], moved, self.vectors))
        self.seen |= counts > 0
