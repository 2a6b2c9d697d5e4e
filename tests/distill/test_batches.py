from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image

from edgekd.configs.train import TrainConfig
from edgekd.core.ahead import map_ahead
from edgekd.data.image_set import ImageSet, load_images
from edgekd.distill.classification.plan import load_data, settle
from edgekd.distill.classification.setup import build
from edgekd.distill.classification.task import Classification
from edgekd.distill.inputs import batches
from edgekd.distill.inputs import cache as caching
from edgekd.distill.inputs.batches import (
    BalancedSampler,
    BatchSource,
    RawBatch,
    Sampler,
    make_sampler,
    open_store,
)
from edgekd.distill.inputs.cache import EmbeddingCache, caching_teacher, fill_views
from edgekd.distill.inputs.restyle import RestylePolicy
from edgekd.distill.inputs.views import Augmentation, ViewPolicy, view_params
from edgekd.distill.launch import make_fabric
from edgekd.distill.models.teachers import ClipTeacher, load_teacher


def sampler(sizes: tuple[int, ...], batch: int, seed: int = 0) -> BalancedSampler:
    edges = np.cumsum([0, *sizes])
    groups = tuple(np.arange(a, b, dtype=np.int64) for a, b in itertools.pairwise(edges))
    return BalancedSampler(groups, batch, seed)


def domain_counts(made: BalancedSampler, indices: np.ndarray) -> list[int]:
    return [int(np.isin(indices, group).sum()) for group in made.groups]


@pytest.mark.parametrize(
    ("sizes", "batch"), [((50, 7, 19), 12), ((30, 30, 30), 8), ((5, 40), 7), ((4, 5, 6, 7), 2)]
)
def test_every_domain_has_the_same_share(sizes: tuple[int, ...], batch: int) -> None:
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
    # A step is a pure function of seed and step.
    again = sampler((12, 5), 4)
    for step in (7, 3):
        assert np.array_equal(again.step(step), sampler((12, 5), 4).step(step))
    assert not np.array_equal(again.step(3), sampler((12, 5), 4, seed=6).step(3))


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
    assert made_sampler(2, 0, 0, 64).epoch_steps == 1


Make = Callable[..., Path]


@pytest.fixture
def images(make_domain_folder: Make, tmp_path: Path, own_cache: Path) -> ImageSet:
    """Sixteen images in two domains."""
    folder = make_domain_folder(tmp_path / "data", domains=("art", "photo"), count=4)
    return load_images(str(folder))


def source(images: ImageSet, **changes: Any) -> BatchSource:
    groups = tuple(np.flatnonzero(images.domain_of == d) for d in range(2))
    sampler = Sampler((BalancedSampler(groups, 4, 0),))
    made = BatchSource(open_store(images, 20), sampler, Augmentation(), np.full(len(images), 2))
    return replace(made, **changes)


def test_a_batch_holds_the_samplers_images(images: ImageSet) -> None:
    made = source(images)
    batch = made(3)
    indices, visits = made.sampler.step(3)
    assert np.array_equal(batch.indices, indices)
    assert batch.labels.tolist() == images.labels[indices].tolist()
    assert batch.pixels.dtype == torch.uint8
    assert np.array_equal(batch.pixels.numpy(), made.store.batch(indices))
    views = ((visits + indices) % 2).tolist()
    expected = view_params([images.keys[i] for i in indices], views, ViewPolicy())
    assert all(torch.equal(a, b) for a, b in zip(batch.params, expected, strict=True))
    assert batch.teacher is None
    assert batch.teacher_pixels is None
    for rank in range(2):  # shards make up the batch of one process
        shard = source(images, rank=rank, world=2)(3)
        assert np.array_equal(shard.indices, batch.indices[rank::2])
        assert torch.equal(shard.pixels, batch.pixels[rank::2])
        assert torch.equal(shard.params.colour, batch.params.colour[rank::2])


def test_every_cached_view_of_an_image_has_its_turn(images: ImageSet) -> None:
    seen: dict[int, list[int]] = {}

    def lookup(indices: np.ndarray, views: np.ndarray) -> np.ndarray:
        for index, view in zip(indices.tolist(), views.tolist(), strict=True):
            seen.setdefault(index, []).append(view)
        return np.zeros((len(indices), 3), dtype=np.float32)

    made = source(images, embeddings=lookup, views=np.full(len(images), 3))
    for step in range(12):  # three passes over 16 images
        assert made(step).teacher is not None
    assert all(sorted(views) == [0, 1, 2] for views in seen.values())
    assert {views[0] for views in seen.values()} == {0, 1, 2}


def test_without_a_number_of_views_they_are_never_repeated(images: ImageSet) -> None:
    made = source(images, views=None)
    thetas: dict[int, torch.Tensor] = {}
    for step in range(8):
        batch = made(step)
        for index, theta in zip(batch.indices.tolist(), batch.params.theta, strict=True):
            assert index not in thetas or not torch.equal(thetas[index], theta)
            thetas[index] = theta
    assert len(thetas) == 16


def features(raw: RawBatch, teacher: ClipTeacher | None) -> torch.Tensor:
    """The teacher's embeddings of a batch, as the training loop gets them."""
    task: Any = SimpleNamespace(fabric=Fabric(accelerator="cpu", devices=1), teacher=teacher)
    return Classification.teacher_features(task, raw)


@pytest.mark.parametrize("restyling", [None, RestylePolicy()], ids=["plain", "restyled"])
def test_an_online_teacher_gives_what_the_cache_holds(
    images: ImageSet, tiny_teacher: Path, restyling: RestylePolicy | None
) -> None:
    teacher = load_teacher(f"local-dir:{tiny_teacher}")
    augmentation = Augmentation(restyle=restyling)
    assert (augmentation.id == Augmentation().id) == (restyling is None)
    cache = EmbeddingCache(teacher.id, augmentation.id, teacher.dim)
    fabric = Fabric(accelerator="cpu", devices=1)
    fill_views(fabric, cache, teacher, augmentation, images, np.arange(16), 2)
    lookup = partial(cache.embeddings, images.keys)
    stored = source(images, embeddings=lookup, augmentation=augmentation)(2)
    store = open_store(images, round(32 * 1.2))
    online = source(images, teacher_store=store, augmentation=augmentation)(2)
    cached, computed = features(stored, None), features(online, teacher)
    assert torch.allclose(cached, computed, atol=3e-3, rtol=3e-3)  # 16 bits
    assert not torch.allclose(cached[0], computed[1], atol=2e-2)
    loss = torch.zeros(4, 12, requires_grad=True).sub(computed).square().sum()
    loss.backward()  # it is no inference tensor


def raw(step: int) -> RawBatch:
    views = view_params([], [], ViewPolicy())
    return RawBatch(np.array([step]), torch.zeros(1), views, torch.zeros(1), None, None)


def test_batches_come_in_order_one_ahead_and_errors_reach_the_loop() -> None:
    made: list[int] = []
    started = threading.Event()

    def make(step: int) -> RawBatch:
        made.append(step)
        if step == 4:
            started.set()
        if step == 6:
            raise ValueError("broken")
        return raw(step)

    batches = map_ahead(make, range(3, 6), ahead=1)
    assert next(batches).indices[0] == 3
    assert started.wait(10)  # the next one is on its way while this one is used
    assert [one.indices[0] for one in batches] == [4, 5]
    assert made == [3, 4, 5]
    assert list(map_ahead(make, range(0), ahead=1)) == []
    with pytest.raises(ValueError, match="broken"):
        list(map_ahead(make, range(5, 8), ahead=1))


@pytest.mark.parametrize(
    ("least", "capable", "wanted", "precision"),
    [
        (0.5, True, "auto", "bf16"),
        (1.1, True, "auto", "fp32"),  # embeddings that differ
        (0.5, False, "auto", "fp32"),  # a processor without
        (1.1, False, "bf16", "bf16"),
    ],
)
def test_the_cache_is_filled_in_bfloat16_where_that_changes_nothing(
    images: ImageSet, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch,
    least: float, capable: bool, wanted: str, precision: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(caching, "LEAST_COSINE", least)
    monkeypatch.setattr(caching, "has_bfloat16", lambda: capable)
    teacher = load_teacher(f"local-dir:{tiny_teacher}")
    fabric = Fabric(accelerator="cpu", devices=1)
    config = TrainConfig.model_validate({"teacher_precision": wanted, "views": 1})
    everything, policy = np.arange(len(images)), Augmentation()

    def choice() -> str:
        return caching_teacher(fabric, config, teacher, images, everything, policy.id).precision

    assert choice() == precision
    # What is there in float32 is used as it is, unless told otherwise.
    cache = EmbeddingCache(teacher.cache_id, policy.id, teacher.dim)
    fill_views(fabric, cache, teacher, policy, images, everything, 1)
    assert choice() == ("bf16" if wanted == "bf16" else "fp32")


def expected(images: ImageSet, index: int, side: int) -> np.ndarray:
    return np.asarray(images.read(index).resize((side, side), Image.Resampling.BICUBIC))


def test_a_store_decodes_images_once(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.array([15, 0, 5, 5])
    batch = open_store(images, 24).batch(rows)
    assert batch.dtype == np.uint8
    assert np.array_equal(batch, np.stack([expected(images, int(i), 24) for i in rows]))
    on_the_fly = open_store(images, 24, max_bytes=1000)
    assert on_the_fly.array is None
    assert np.array_equal(on_the_fly.batch(rows), batch)
    monkeypatch.setattr(batches, "squashed", lambda *a: pytest.fail("decoded again"))
    assert np.array_equal(open_store(images, 24).batch(rows), batch)


def test_stores_by_side_and_content(images: ImageSet, make_image: Make, tmp_path: Path) -> None:
    for side in (24, 20):
        assert open_store(images, side).batch(np.array([0])).shape[1] == side
    make_image(tmp_path / "data" / "art" / "cat" / "0000.png", seed=999)
    # A large JPEG, which is read at a reduced size.
    x, y = np.meshgrid(np.linspace(0, 150, 800), np.linspace(0, 110, 600))
    waves = 127.5 + 100 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1)
    jpeg = tmp_path / "data" / "art" / "cat" / "large.jpg"
    Image.fromarray(waves.astype(np.uint8)).save(jpeg, quality=95)
    changed = load_images(str(tmp_path / "data"))
    first, large = (changed.ids.index(f"art/cat/{name}") for name in ("0000.png", "large.jpg"))
    found = open_store(changed, 60).batch(np.array([first, large])).astype(int)
    assert np.array_equal(found[0], expected(changed, first, 60))
    assert np.abs(found[1] - expected(changed, large, 60)).mean() < 1.5


@pytest.mark.parametrize(("balance", "rare"), [("domains", 0.2), ("classes", 0.5)])
def test_shares_of_an_uneven_data_set(
    balance: str, rare: float, tmp_path: Path, own_cache: Path, make_domain_folder: Make, make_image: Make
) -> None:  # fmt: skip
    root = make_domain_folder(tmp_path / "data", count=10)
    for number in range(60):
        domain = ("art", "photo")[number % 2]
        make_image(root / domain / "cat" / f"more{number}.png", seed=1000 + number)
    config = settle(
        TrainConfig.load(
            student="test_efficientnet", pretrained="scratch", size=32, data=root, recipe="erm",
            batch_size=8, steps=3, balance=balance, out=tmp_path / "run",
        )
    )  # fmt: skip
    found, split = load_data(config)
    task = build(make_fabric(config), config, found, split)
    drawn = np.concatenate([task.sampler.step(step)[0] for step in range(64)])
    labels, domains = found.labels[drawn], found.domain_of[drawn]
    assert (labels == found.classes.index("dog")).mean() == pytest.approx(rare, abs=0.02)
    for domain in np.unique(domains):
        assert (domains == domain).mean() == pytest.approx(0.5)
