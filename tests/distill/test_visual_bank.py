from __future__ import annotations

import torch

from edgekd.distill.losses import VisualBank


def test_prototypes_move_as_the_formula_says() -> None:
    texts = torch.eye(3)
    bank = VisualBank(texts, momentum=0.9, seed=1)
    start = bank.vectors.clone()
    assert torch.allclose(start.norm(dim=-1), torch.ones(3))
    # Two images nearest to text 0, one to text 1; lengths do not count.
    bank.update(torch.tensor([[4.0, 0, 3], [10.0, 0, 0], [0, 2.0, 0]]))
    assert bank.seen.tolist() == [True, True, False]
    assert torch.allclose(bank.vectors[:2], torch.tensor([[0.9, 0, 0.3], [0.0, 1, 0]]))
    assert torch.equal(bank.vectors[2], start[2])
    bank.update(torch.tensor([[0.8, 0, 0.6]]))
    # 0.9 · old + 0.1 · new, and not normalised again.
    assert torch.allclose(
        bank.vectors[0], torch.tensor([0.9 * 0.9 + 0.1 * 0.8, 0, 0.9 * 0.3 + 0.1 * 0.6])
    )
    assert torch.allclose(bank.vectors[1], torch.tensor([0.0, 1, 0]))


def test_nothing_seen_moves_nothing() -> None:
    bank = VisualBank(torch.eye(3))
    before = bank.vectors.clone()
    bank.update(torch.zeros(0, 3))
    assert torch.equal(bank.vectors, before)
    assert not bank.seen.any()
    assert set(bank.state_dict()) == {"vectors", "seen"}
