from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from edgekd.configs.train import TrainConfig
from edgekd.data.image_set import ImageSet, load_images
from edgekd.distill import cache as caching
from edgekd.distill.batches import (
    BalancedSampler,
    BatchSource,
    Prefetcher,
    RawBatch,
    Sampler,
    open_store,
)
from edgekd.distill.cache import (
    EmbeddingCache,
    caching_teacher,
    fill_views,
)
from edgekd.distill.classification.task import Classification
from edgekd.distill.teachers import ClipTeacher, load_teacher
from edgekd.distill.views import Augmentation, RestylePolicy, ViewPolicy, view_params

Make = Callable[..., Path]


@pytest.fixture
def images(make_domain_folder: Make, tmp_path: Path, own_cache: Path) -> ImageSet:
    return load_images(
        str(make_domain_folder(tmp_path / "data", domains=("art", "photo"), count=4))
    )


def source(images: ImageSet, **changes: Any) -> BatchSource:
    groups = tuple(np.flatnonzero(images.domain_of == d) for d in range(2))
    settings: dict[str, Any] = {
        "store": open_store(images, 20),
        "sampler": Sampler((BalancedSampler(groups, 4, 0),)),
        "augmentation": Augmentation(),
        "views": np.full(len(images), 2),
        "embeddings": None,
        "teacher_store": None,
        "rank": 0,
        "world": 1,
    }
    return BatchSource(**settings | changes)


def test_a_batch_holds_the_samplers_images(images: ImageSet) -> None:
    made = source(images)
    batch = made(3)
    indices, visits = made.sampler.step(3)
    assert np.array_equal(batch.indices, indices)
    assert batch.labels.tolist() == images.labels[indices].tolist()
    assert batch.pixels.dtype == torch.uint8
    assert np.array_equal(batch.pixels.numpy(), made.store.batch(indices))
    views = [
        (visit + index) % 2 for visit, index in zip(visits.tolist(), indices.tolist(), strict=True)
    ]
    expected = view_params([images.keys[i] for i in indices], views, ViewPolicy())
    assert all(torch.equal(a, b) for a, b in zip(batch.params, expected, strict=True))
    assert batch.teacher is None
    assert batch.teacher_pixels is None


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
    first, later = (made(step) for step in (0, 4))  # one pass apart
    thetas: dict[int, torch.Tensor] = {}
    for step in range(8):
        batch = made(step)
        for index, theta in zip(batch.indices.tolist(), batch.params.theta, strict=True):
            assert index not in thetas or not torch.equal(thetas[index], theta)
            thetas[index] = theta
    assert len(thetas) == 16
    assert not torch.equal(first.params.theta, later.params.theta)


def test_shards_make_up_the_batch_of_one_process(images: ImageSet) -> None:
    whole = source(images)(5)
    shards = [source(images, rank=rank, world=2)(5) for rank in range(2)]
    for rank, shard in enumerate(shards):
        assert np.array_equal(shard.indices, whole.indices[rank::2])
        assert torch.equal(shard.pixels, whole.pixels[rank::2])
        assert torch.equal(shard.params.colour, whole.params.colour[rank::2])


def features(raw: RawBatch, teacher: ClipTeacher | None) -> torch.Tensor:
    """The teacher's embeddings of a batch, as the training loop gets them."""
    task: Any = SimpleNamespace(fabric=Fabric(accelerator="cpu", devices=1), teacher=teacher)
    found = Classification.teacher_features(task, raw)
    assert found is not None
    return found


@pytest.mark.parametrize("restyling", [None, RestylePolicy()], ids=["plain", "restyled"])
def test_an_online_teacher_gives_what_the_cache_holds(
    images: ImageSet, tiny_teacher: Path, restyling: RestylePolicy | None
) -> None:
    teacher = load_teacher(f"local-dir:{tiny_teacher}")
    assert isinstance(teacher, ClipTeacher)
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
    return RawBatch(
        np.array([step]),
        torch.zeros(1),
        view_params([], [], ViewPolicy()),
        torch.zeros(1),
        None,
        None,
    )


def test_batches_come_in_order_one_ahead() -> None:
    made: list[int] = []
    started = threading.Event()

    def make(step: int) -> RawBatch:
        made.append(step)
        if step == 4:
            started.set()
        return raw(step)

    batches = iter(Prefetcher(make, range(3, 6)))
    assert next(batches)[0] == 3
    assert started.wait(10)  # the next one is on its way while this one is used
    assert [step for step, _ in batches] == [4, 5]
    assert made == [3, 4, 5]
    assert list(Prefetcher(make, range(0))) == []


def test_only_standing_still_counts_as_waiting() -> None:
    def make(step: int) -> RawBatch:
        time.sleep(0.05)
        return raw(step)

    starved = Prefetcher(make, range(4))
    assert sum(starved.waited_s for _ in starved) > 0.15
    fed = Prefetcher(make, range(4))
    for _ in fed:
        time.sleep(0.2)
    assert fed.waited_s < 0.1


def test_an_error_in_the_background_reaches_the_loop() -> None:
    def make(step: int) -> RawBatch:
        if step == 1:
            raise ValueError("broken")
        return raw(step)

    batches = iter(Prefetcher(make, range(3)))
    next(batches)
    with pytest.raises(ValueError, match="broken"):
        next(batches)


@pytest.mark.parametrize(
    ("least", "capable", "wanted", "precision"),
    [
        (0.5, True, "auto", "bf16"),
        (1.1, True, "auto", "fp32"),  # embeddings that differ
        (0.5, False, "auto", "fp32"),  # a processor without
        (1.1, False, "bf16", "bf16"),
        (0.5, True, "fp32", "fp32"),
    ],
)
def test_the_cache_is_filled_in_bfloat16_where_that_changes_nothing(
    images: ImageSet,
    tiny_teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    least: float,
    capable: bool,
    wanted: str,
    precision: str,
) -> None:
    monkeypatch.setattr(caching, "LEAST_COSINE", least)
    monkeypatch.setattr(caching, "has_bfloat16", lambda: capable)
    teacher = load_teacher(f"local-dir:{tiny_teacher}")
    assert isinstance(teacher, ClipTeacher)
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
