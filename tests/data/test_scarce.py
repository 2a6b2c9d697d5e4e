from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.split import make_split, read_split
from edgekd.data.subsets import (
    check_unseen,
    fewer_labels,
    left_to_test,
    run_images,
    run_split,
    take_shots,
    unseen_test,
    without_classes,
)


@pytest.fixture
def images(tmp_path: Path, make_domain_folder: Callable[..., Path]) -> ImageSet:
    return load_images(
        make_domain_folder(tmp_path / "d", classes=("ant", "bee", "cat", "dog"), count=10)
    )


def test_of_classes_renumbers_and_reads_the_same_pictures(images: ImageSet) -> None:
    some = images.of_classes(["dog", "bee"])
    assert some.classes == ("dog", "bee")
    assert len(some) == 60
    for i in (0, 17, 59):
        whole = images.ids.index(some.ids[i])
        assert (
            some.classes[some.labels[i]]
            == images.classes[images.labels[whole]]
            == some.ids[i].split("/")[1]
        )
        assert some.domains[some.domain_of[i]] == some.ids[i].split("/")[0]
        assert some.keys[i] == images.keys[whole]
        assert np.array_equal(np.asarray(some.read(i)), np.asarray(images.read(whole)))
    with pytest.raises(EdgekdError, match=r'no class "beee"\. Did you mean "bee"'):
        images.of_classes(["beee"])


def test_of_classes_of_drawn_images_can_be_pickled() -> None:
    toy = load_images("toy")
    some = pickle.loads(pickle.dumps(toy.of_classes(toy.classes[3:5])))
    whole = toy.ids.index(some.ids[-1])
    assert np.array_equal(np.asarray(some.read(len(some) - 1)), np.asarray(toy.read(whole)))


def test_labels_are_a_nested_part_of_each_group(images: ImageSet) -> None:
    split = make_split(images, test_domain="sketch")
    ten, fifty = (fewer_labels(images, split, fraction) for fraction in (0.1, 0.5))
    assert len(split.train) == 2 * 4 * 8
    for fewer, count in ((ten, 1), (fifty, 4)):
        groups = images.domain_of[fewer.train] * 4 + images.labels[fewer.train]
        assert np.bincount(groups, minlength=8)[:8].tolist() == [count] * 8
        for role in ("val", "id_test", "ood_test"):
            assert np.array_equal(getattr(fewer, role), getattr(split, role))
    assert set(ten.train) < set(fifty.train) < set(split.train)
    assert len({split.hash, ten.hash, fifty.hash}) == 3
    assert "10 % of each class" in ten.rule


def test_unseen_classes_are_a_test_of_their_own(images: ImageSet) -> None:
    config = TrainConfig(unseen_classes=("bee", "dog"))
    check_unseen(config, images)
    seen = without_classes(images, config.unseen_classes)
    split = run_split(config, seen)
    assert seen.classes == ("ant", "cat")
    assert split.test_domain is None  # auto would leave out sketch
    test = unseen_test(images, config.unseen_classes)
    assert len(test) == 60
    assert {images.classes[c] for c in images.labels[test]} == {"bee", "dog"}
    assert not {images.keys[i] for i in test} & set(seen.keys)


def test_content_that_also_trains_is_no_test(
    tmp_path: Path, make_domain_folder: Callable[..., Path]
) -> None:
    root = make_domain_folder(tmp_path / "d", classes=("ant", "bee", "cat"), count=4)
    (root / "art" / "bee" / "copy.png").write_bytes(
        (root / "art" / "ant" / "0000.png").read_bytes()
    )
    images = load_images(root)
    assert len(unseen_test(images, ["bee"])) == 12


@pytest.mark.parametrize(
    ("unseen", "domain", "sentence"),
    [
        (("bea",), "auto", r'no class "bea"\. Did you mean "bee"'),
        (("ant", "bee", "cat"), "auto", "3 of 4 classes are unseen, and two must train"),
        (("bee",), "sketch", "Both the domain sketch and 1 classes"),
    ],
)
def test_what_cannot_be_unseen(
    images: ImageSet, unseen: tuple[str, ...], domain: str, sentence: str
) -> None:
    with pytest.raises(EdgekdError, match=sentence):
        check_unseen(TrainConfig(unseen_classes=unseen, test_domain=domain), images)


def test_shots_are_nested_and_what_is_left_is_tested(images: ImageSet) -> None:
    unseen = ("dog", "bee")
    one, four = (take_shots(images, unseen, count, 0) for count in (1, 4))
    assert [np.bincount(images.labels[shots], minlength=4).tolist() for shots in (one, four)] == [
        [0, 1, 0, 1],
        [0, 4, 0, 4],
    ]
    assert set(one) < set(four)
    assert set(take_shots(images, unseen, 4, 1)) != set(four)
    left = left_to_test(images, unseen, four)
    assert sorted([*left, *four]) == unseen_test(images, unseen).tolist()


def test_a_copy_of_a_shot_is_neither_a_second_shot_nor_a_test(
    tmp_path: Path, make_domain_folder: Callable[..., Path]
) -> None:
    root = make_domain_folder(tmp_path / "d", classes=("ant", "bee", "cat"), count=1)
    for number in range(5):
        (root / "art" / "bee" / f"copy{number}.png").write_bytes(
            (root / "art" / "bee" / "0000.png").read_bytes()
        )
    images = load_images(root)  # bee: three contents, one of them six times
    shots = take_shots(images, ("bee",), 2, 0)
    assert len({images.keys[i] for i in shots}) == 2
    left = left_to_test(images, ("bee",), shots)
    assert {images.keys[i] for i in left}.isdisjoint({images.keys[i] for i in shots})
    with pytest.raises(
        EdgekdError,
        match=r'3 images of the class "bee" are to be shown, and it has 3 different ones',
    ):
        take_shots(images, ("bee",), 3, 0)


def test_shots_train_and_change_nothing_else(images: ImageSet, tmp_path: Path) -> None:
    base = TrainConfig(unseen_classes=("bee", "dog"))
    config = base.model_copy(update={"shots": 2})
    seen, union = run_images(images, base), run_images(images, config)
    assert union.classes == images.classes
    assert len(union) == len(seen) + 4
    before, split = run_split(base, seen), run_split(config, union)
    for role in ("val", "id_test", "ood_test"):
        assert [union.keys[i] for i in getattr(split, role)] == [
            seen.keys[i] for i in getattr(before, role)
        ]
    few = {images.keys[i] for i in take_shots(images, ("bee", "dog"), 2, 0)}
    assert {union.keys[i] for i in split.train} == {seen.keys[i] for i in before.train} | few
    assert "Of each unseen class 2 images train" in split.rule
    split.write(tmp_path / "split.json")
    assert np.array_equal(read_split(tmp_path / "split.json", union).train, split.train)
