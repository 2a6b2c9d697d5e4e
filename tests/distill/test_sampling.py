from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from edgekd.distill.batches import BalancedSampler, Sampler, make_sampler


def sampler(sizes: tuple[int, ...], batch: int, seed: int = 0) -> BalancedSampler:
    edges = np.cumsum([0, *sizes])
    groups = tuple(np.arange(a, b, dtype=np.int64) for a, b in itertools.pairwise(edges))
    return BalancedSampler(groups, batch, seed)


def domain_counts(made: BalancedSampler, indices: np.ndarray) -> list[int]:
    return [int(np.isin(indices, group).sum()) for group in made.groups]


def test_every_domain_has_the_same_share_of_a_batch() -> None:
    made = sampler((50, 7, 19), 12)
    for step in range(40):
        indices, visits = made.step(step)
        assert indices.shape == visits.shape == (12,)
        assert indices.dtype == visits.dtype == np.int64
        assert domain_counts(made, indices) == [4, 4, 4]


@pytest.mark.parametrize(("sizes", "batch"), [((30, 30, 30), 8), ((5, 40), 7), ((4, 5, 6, 7), 2)])
def test_the_surplus_of_an_undivided_batch_goes_round(sizes: tuple[int, ...], batch: int) -> None:
    made = sampler(sizes, batch)
    total = np.zeros(len(sizes), dtype=int)
    for step in range(60):
        counts = domain_counts(made, made.step(step)[0])
        assert sum(counts) == batch
        assert max(counts) - min(counts) <= 1
        total += counts
        assert total.max() - total.min() <= 1


def test_each_image_comes_once_per_pass_and_its_visits_are_counted() -> None:
    made = sampler((12, 5), 4)
    seen: Counter[int] = Counter()
    for step in range(30):
        for index, visit in zip(*made.step(step), strict=True):
            assert visit == seen[int(index)]
            seen[int(index)] += 1
    # 60 places each: 5 passes over 12 images, 12 passes over 5.
    assert [seen[i] for i in range(12)] == [5] * 12
    assert [seen[i] for i in range(12, 17)] == [12] * 5


def test_passes_come_in_different_orders() -> None:
    made = sampler((16,), 16)
    first, second = made.step(0)[0].tolist(), made.step(1)[0].tolist()
    assert sorted(first) == sorted(second) == list(range(16))
    assert first != second


def test_two_domains_of_one_size_are_ordered_apart() -> None:
    indices, _ = sampler((16, 16), 32).step(0)
    assert indices[:16].tolist() != (indices[16:] - 16).tolist()


def test_a_step_is_a_pure_function_of_seed_and_step() -> None:
    forwards = [sampler((9, 11), 6, seed=5).step(step) for step in range(20)]
    made = sampler((9, 11), 6, seed=5)
    for step in reversed(range(20)):
        again = made.step(step)
        assert all(np.array_equal(a, b) for a, b in zip(forwards[step], again, strict=True))
    other = [sampler((9, 11), 6, seed=6).step(step)[0] for step in range(20)]
    assert any(not np.array_equal(a[0], b) for a, b in zip(forwards, other, strict=True))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shards_make_up_the_global_batch_with_every_domain_in_each(world: int) -> None:
    made = sampler((20, 20), 8)
    indices, _ = made.step(3)
    shards = [indices[rank::world] for rank in range(world)]
    assert sorted(np.concatenate(shards).tolist()) == sorted(indices.tolist())
    assert all(domain_counts(made, shard) == [4 // world, 4 // world] for shard in shards)


def test_an_epoch_draws_about_as_many_images_as_there_are() -> None:
    assert Sampler((sampler((30, 34), 16),)).epoch_steps == 4
    assert Sampler((sampler((2, 1), 64),)).epoch_steps == 1


def made_sampler(
    images: int, unlabelled: int, shots: int, batch: int, share: float = 0.5
) -> Sampler:
    """Two domains that share `images` labelled images, then shots, then unlabelled images."""
    count = images + shots + unlabelled
    domains = np.repeat([0, 1, 0], [images // 2, images // 2, shots + unlabelled])
    is_shot = (np.arange(count) >= images) & (np.arange(count) < images + shots)
    train, others = np.arange(images + shots), np.arange(images + shots, count)
    return make_sampler(train, others, domains, is_shot, share=share, batch=batch, seed=0)


@pytest.mark.parametrize(("count", "places"), [(3, 3), (10, 4)])
def test_shots_are_in_every_batch_at_most_half_of_it(count: int, places: int) -> None:
    sampler = made_sampler(80, 0, count, 8)
    drawn = []
    for step in range(20):
        indices, _ = sampler.step(step)
        assert len(indices) == 8
        few = indices[indices >= 80]
        assert len(set(few)) == len(few) == places
        drawn += few.tolist()
    assert len(set(drawn)) == count
    assert sampler.epoch_steps == round((80 + count) / 8)


def test_without_shots_the_domains_share_a_batch() -> None:
    sampler = made_sampler(20, 0, 0, 6)
    plain = BalancedSampler((np.arange(10), np.arange(10, 20)), 6, 0)
    for step in range(4):
        assert np.array_equal(sampler.step(step)[0], plain.step(step)[0])


def test_a_fixed_part_of_each_batch_is_unlabelled() -> None:
    made = made_sampler(60, 20, 0, 16, share=0.25)
    seen: Counter[int] = Counter()
    for step in range(10):
        indices, visits = made.step(step)
        assert (indices[:12] < 60).all()
        assert (indices[12:] >= 60).all()
        for index, visit in zip(indices[12:].tolist(), visits[12:].tolist(), strict=True):
            assert visit == seen[index]
            seen[index] += 1
    assert set(seen.values()) == {2}  # 40 places, 20 images
    assert made.epoch_steps == 5


def test_few_unlabelled_images_come_once_in_a_batch_and_many_leave_a_label() -> None:
    assert sorted(made_sampler(40, 3, 0, 16).step(7)[0][13:].tolist()) == [40, 41, 42]
    few = made_sampler(40, 100, 0, 8, share=0.99).step(3)[0]
    assert (few < 40).sum() == 1
    alone = make_sampler(
        np.arange(0), np.arange(9), np.zeros(9), np.zeros(9, bool), share=0.5, batch=3, seed=0
    )
    assert alone.epoch_steps == 3
    assert sorted(np.concatenate([alone.step(i)[0] for i in range(3)]).tolist()) == list(range(9))
