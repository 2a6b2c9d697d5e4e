"""New classes from a few images without training: a cache of their embeddings beside the text head (Tip-Adapter)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize, one_hot

ALPHA = 1.0
BETA = 5.5
"""The published program's numbers (Li et al., ICCV 2023; Zhang et al., ECCV 2022 start from the same)."""


def retrieval_scores(
    queries: Tensor,
    keys: Tensor,
    labels: Tensor,
    classes: int,
    texts: Tensor | None,
    alpha: float = ALPHA,
    beta: float = BETA,
) -> Tensor:
    """`cos(ŝ, T_c) + α Σ_m exp(−β (1 − cos(ŝ, f_m))) [y_m = c]`, float `[N, classes]`.

    The sum over the cache is a product with one-hot labels. Without `texts` it stands alone.

    Args:
        queries: embeddings of the images asked about, float `[N, D]`.
        keys: embeddings of the cached images, float `[M, D]`. labels: their classes, int64 `[M]`.
        texts: class vectors, float `[classes, D]`; None where the student knows none.
    """
    queries, keys = normalize(queries, dim=-1), normalize(keys, dim=-1)
    near = (-beta * (1 - queries @ keys.T)).exp()  # [N, M]
    scores = alpha * near @ one_hot(labels, classes).to(near)
    return scores if texts is None else queries @ normalize(texts, dim=-1).T + scores
