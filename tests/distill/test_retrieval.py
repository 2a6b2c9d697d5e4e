from __future__ import annotations

import math

import torch

from edgekd.distill.classification.predict import retrieval_scores


def test_scores_by_hand() -> None:
    """Two classes, three cached images; lengths do not count.

    The query (3, 4)/5 has the cosines 0.6 and 0.8 with the texts, and 0.6, 0.8, 1 with the cached images.
    """
    query = torch.tensor([[6.0, 8.0]])
    texts = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    keys = torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.3, 0.4]])
    labels = torch.tensor([0, 1, 0])
    found = retrieval_scores(query, keys, labels, 2, texts, alpha=0.5, beta=2.0)
    by_hand = [0.6 + 0.5 * (math.exp(-0.8) + 1), 0.8 + 0.5 * math.exp(-0.4)]
    assert torch.allclose(found, torch.tensor([by_hand]), atol=1e-6)


def test_without_texts_the_cache_stands_alone_with_the_published_numbers() -> None:
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = retrieval_scores(torch.tensor([[0.6, 0.8]]), keys, torch.tensor([1, 2]), 3, None)
    assert torch.allclose(
        found, torch.tensor([[0.0, math.exp(-5.5 * 0.4), math.exp(-5.5 * 0.2)]]), atol=1e-6
    )


def test_no_weight_on_the_cache_is_zero_shot() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, texts = (torch.randn(n, 6, generator=generator) for n in (5, 4, 3))
    found = retrieval_scores(queries, keys, torch.tensor([0, 1, 2, 2]), 3, texts, alpha=0.0)
    assert torch.allclose(
        found, torch.cosine_similarity(queries[:, None], texts[None], dim=-1), atol=1e-6
    )
