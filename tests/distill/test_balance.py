"""`--balance classes` deals every class of every domain equally, however few images it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekd.configs.train import TrainConfig
from edgekd.distill.classification.plan import load_data, settle
from edgekd.distill.classification.setup import build
from edgekd.distill.launch import make_fabric


@pytest.mark.parametrize(("balance", "rare"), [("domains", 0.2), ("classes", 0.5)])
def test_shares_of_an_uneven_data_set(
    balance: str, rare: float, tmp_path: Path, own_cache: Path, make_domain_folder: Callable[..., Path],
    make_image: Callable[..., Path],
) -> None:  # fmt: skip
    root = make_domain_folder(tmp_path / "data", domains=("art", "photo", "sketch"), count=10)
    for domain in ("art", "photo", "sketch"):
        for number in range(30):
            seed = 1000 + number + 100 * ("art", "photo", "sketch").index(domain)
            make_image(root / domain / "cat" / f"more{number}.png", seed=seed)
    config = settle(
        TrainConfig.load(
            student="mobilenetv3_small_050", pretrained="scratch", size=32, data=root, recipe="erm",
            batch_size=8, steps=3, balance=balance, out=tmp_path / "run",
        )
    )  # fmt: skip
    images, split = load_data(config)
    task = build(make_fabric(config), config, images, split)
    drawn = np.concatenate([task.sampler.step(step)[0] for step in range(64)])
    labels, domains = images.labels[drawn], images.domain_of[drawn]
    assert (labels == images.classes.index("dog")).mean() == pytest.approx(rare, abs=0.02)
    for domain in np.unique(domains):
        assert (domains == domain).mean() == pytest.approx(0.5)
