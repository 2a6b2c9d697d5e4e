from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edgekd.data import toy
from edgekd.data.image_set import toy_images


def mean_colour(cls: str, domain: str, seed: int) -> list[float]:
    return list(np.asarray(toy.draw(cls, domain, seed), np.float64).mean(axis=(0, 1)))


@pytest.mark.parametrize(
    ("cls", "domain", "seed", "expected"),
    [
        ("house", "photo", 7, (133.9, 144.6, 119.9)),
        ("fish", "painting", 7, (84.0, 97.2, 94.8)),
        ("house", "cartoon", 7, (151.8, 156.5, 142.5)),
        ("fish", "sketch", 7, (205.3, 203.3, 192.8)),
    ],
)
def test_drawings_stay_what_they_were(
    cls: str, domain: str, seed: int, expected: tuple[float, float, float]
) -> None:
    # A new VERSION may change these; an unchanged one may not. The tolerance covers other PIL releases.
    assert mean_colour(cls, domain, seed) == pytest.approx(expected, abs=4.0)


def test_habits_hold_in_the_suite_and_not_in_the_world() -> None:
    def green_share(world: bool) -> float:
        return sum(toy.look("tree", seed, world=world).main == "green" for seed in range(500)) / 500

    # By habit, and 1 in 10 colours otherwise.
    assert green_share(world=False) == pytest.approx(toy.HABIT + (1 - toy.HABIT) / 10, abs=0.06)
    assert green_share(world=True) == pytest.approx(1 / 10, abs=0.06)


def test_suite_is_balanced_named_and_distinct() -> None:
    images = toy_images(per_class=3)
    assert len(images) == 4 * 10 * 3
    assert set(
        Counter(zip(images.domain_of.tolist(), images.labels.tolist(), strict=True)).values()
    ) == {3}
    assert len(set(images.keys)) == len(set(images.ids)) == len(images)
    assert all(len(key) == 32 and int(key, 16) >= 0 for key in images.keys)
    assert images.labels.dtype == images.domain_of.dtype == np.int64
    for i in (0, 47, len(images) - 1):
        domain, cls, _ = images.ids[i].split("/")
        assert (images.domains[images.domain_of[i]], images.classes[images.labels[i]]) == (
            domain,
            cls,
        )


def test_suites_of_other_seeds_and_of_the_teacher_share_no_image() -> None:
    suites = [
        toy_images(per_class=4),
        toy_images(seed=1, per_class=4),
        toy_images(per_class=4, world=True),
    ]
    assert len({key for suite in suites for key in suite.keys}) == sum(
        len(suite) for suite in suites
    )


def test_reader_survives_pickling_and_knows_its_length() -> None:
    images = pickle.loads(pickle.dumps(toy_images(per_class=1)))
    assert np.array_equal(np.asarray(images.read(7)), np.asarray(toy_images(per_class=1).read(7)))
    for outside in (len(images), -1):
        with pytest.raises(IndexError):
            images.read(outside)


def test_kept_drawings_that_are_damaged_are_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEKD_CACHE", str(tmp_path))
    (tmp_path / "toy").mkdir()
    drawn = toy.ToyReader(seed=0, per_class=1, world=False)
    name = f"{toy.VERSION}-0-1.npy"
    (tmp_path / "toy" / name).write_bytes(b"x" * 5000)
    np.testing.assert_array_equal(np.asarray(drawn(3)), np.asarray(drawn.draw(3)))
    assert "drawn again" in capsys.readouterr().err
