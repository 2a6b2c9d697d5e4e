from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.split import ROLES, Split, make_split, read_split
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

Make = Callable[..., Path]


def blank(index: int) -> Image.Image:
    return Image.new("RGB", (16, 16))


def image_set(
    rows: list[tuple[str, str, str]], *, roles: list[str] | None = None, domains: tuple[str, ...] | None = None
) -> ImageSet:  # fmt: skip
    """Rows of (domain, class, content); the id tells the row's number apart."""
    names = domains or tuple(sorted({row[0] for row in rows}))
    classes = tuple(sorted({row[1] for row in rows}))
    return ImageSet(
        name="made up", classes=classes, domains=names,
        labels=np.array([classes.index(row[1]) for row in rows], dtype=np.int64),
        domain_of=np.array([names.index(row[0]) for row in rows], dtype=np.int64),
        keys=tuple(hashlib.sha256(row[2].encode()).hexdigest()[:32] for row in rows),
        ids=tuple(f"{row[0]}/{row[1]}/{number}.png" for number, row in enumerate(rows)),
        roles=None if roles is None else tuple(roles), reader=blank,
    )  # fmt: skip


SMALL = [(d, c, f"{d}{c}{i}") for d in "ab" for c in "xy" for i in range(10)]


def roles_by_key(images: ImageSet, split: Split) -> dict[str, str]:
    return {images.keys[i]: role for role in ROLES for i in getattr(split, role).tolist()}


def test_the_last_domain_is_left_out_in_full() -> None:
    images = grid()
    split = make_split(images)
    assert split.test_domain == "c"
    assert split.ood_test.tolist() == list(range(120, 180))
    others = np.concatenate([split.train, split.val, split.id_test])
    assert sorted(others.tolist()) == list(range(120))
    for domain in (0, 1):
        for label in range(3):
            inside = (images.domain_of == domain) & (images.labels == label)
            assert [int(inside[getattr(split, role)].sum()) for role in ROLES] == [16, 2, 2, 0]
    assert make_split(images, test_domain="a").ood_test.tolist() == list(range(60))
    none = make_split(images, test_domain="none")
    assert (none.test_domain, len(none.ood_test), len(none.train)) == (None, 0, 144)
    single = make_split(image_set([("all", c, f"{c}{i}") for c in "xy" for i in range(10)]))
    assert (single.test_domain, len(single.ood_test)) == (None, 0)
    # Order is by hash of seed and content.
    images = image_set(SMALL)
    split = make_split(images, seed=3)
    order = sorted(range(10), key=lambda i: hashlib.sha256(f"3:{images.keys[i]}".encode()).digest())
    assert [i for i in split.val.tolist() if i < 10] == order[:1]
    assert [i for i in split.id_test.tolist() if i < 10] == order[1:2]
    assert split.hash == make_split(images, seed=3).hash != make_split(images).hash
    # Roles of the layout are taken.
    split = make_split(given())
    assert split.train.tolist() == list(range(40))
    assert split.val.tolist() == list(range(40, 50))
    assert split.id_test.tolist() == list(range(50, 60))
    without = make_split(given(val=0))  # a tenth of train
    assert (len(without.train), len(without.val), len(without.id_test)) == (36, 4, 10)


def test_names_order_and_place_change_nothing(tmp_path: Path) -> None:
    images, path = grid(), tmp_path / "split.json"
    shuffle = np.random.default_rng(0).permutation(len(images))
    moved = replace(
        images,
        labels=images.labels[shuffle],
        domain_of=images.domain_of[shuffle],
        keys=tuple(images.keys[i] for i in shuffle),
        ids=tuple(f"elsewhere/{i}" for i in shuffle),
    )
    split, again = (make_split(one, test_domain="b", seed=7) for one in (images, moved))
    assert roles_by_key(images, split) == roles_by_key(moved, again)
    assert split.hash == again.hash
    split.write(path)
    back = read_split(path, moved)
    assert roles_by_key(moved, back) == roles_by_key(images, split)
    assert (back.hash, back.rule, back.seed, back.test_domain) == (split.hash, split.rule, 7, "b")
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"schema_version": 2}))
    with pytest.raises(EdgekdError, match="schema version 2"):
        read_split(path, images)
    name, key = data["roles"]["train"].popitem()
    data["roles"]["val"][name] = key
    path.write_text(json.dumps(data))
    with pytest.raises(EdgekdError, match="was changed"):
        read_split(path, images)


# 15 → 1.5 rounds to 2, 25 → 2.5 rounds to 3; small groups keep one each.
@pytest.mark.parametrize(
    ("count", "expected"), [(1, 1), (3, 1), (4, 2), (14, 12), (15, 11), (25, 19)]
)
def test_sizes_of_groups(count: int, expected: int) -> None:
    sizes = {"big": 30, "small": count}
    images = image_set([("a", c, f"{c}{i}") for c, size in sizes.items() for i in range(size)])
    split = make_split(images, test_domain="none")
    assert sum(i >= 30 for i in split.train.tolist()) == expected


@pytest.mark.parametrize(
    ("images", "domain", "said"),
    [
        ([*SMALL, ("b", "eel", "eel")], "auto", "1 of 3 classes: eel"),
        (SMALL, "bb", 'Did you mean "b"?'),
        ([*SMALL[::10], ("b", "eel", "eel")], "none", "too few images"),
        (SMALL[:20], "auto", "--test-domain none"),
        (SMALL[:20], "a", "--test-domain none"),
    ],
)
def test_domains_refused(images: list[tuple[str, str, str]], domain: str, said: str) -> None:
    with pytest.raises(EdgekdError) as caught:
        make_split(image_set(images), test_domain=domain)
    assert said in caught.value.message + caught.value.hint


def test_copies_follow_the_first_one(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(d, c, f"{d}{c}{i}") for d in "abc" for c in "xy" for i in range(10)]
    copies = [(d, "x", f"ax{i}") for d in "ba" for i in range(10)]
    images = image_set(rows + copies)
    split = make_split(images)
    roles = [{images.keys[i] for i in getattr(split, role).tolist()} for role in ROLES]
    assert sum(len(keys) for keys in roles) == len(set.union(*roles))
    assert len(split.train) == 4 * 8 + 2 * 8
    # The copies count for nothing when the groups are cut.
    plain = image_set(rows)
    assert roles_by_key(plain, make_split(plain)) == roles_by_key(images, split)
    # One of the domain left out does not train, nor does one of a given test image.
    split = make_split(image_set([*SMALL, ("a", "x", "bx3")]))
    assert len(split.ood_test) == 20
    assert 40 not in np.concatenate([split.train, split.val, split.id_test]).tolist()
    keys = list(given().keys)
    keys[7] = keys[55]
    split = make_split(replace(given(), keys=tuple(keys)))
    assert 55 in split.id_test.tolist()
    assert 7 not in np.concatenate([split.train, split.val, split.id_test]).tolist()
    assert capsys.readouterr().err.count("warning") >= 2


def given(train: int = 20, val: int = 5, test: int = 5) -> ImageSet:
    """A set whose layout gives the roles."""
    parts = (("train", train), ("val", val), ("test", test))
    rows = [("all", c, f"{c}{r}{i}") for r, count in parts for c in "xy" for i in range(count)]
    return image_set(rows, roles=[role for role, count in parts for _ in range(2 * count)])


def grid() -> ImageSet:
    """Three domains of three classes with 20 images each."""
    return image_set([(d, c, f"{d}{c}{i}") for d in "abc" for c in "xyz" for i in range(20)])


def test_a_split_survives_a_move_and_new_images_but_none_that_are_gone_or_altered(
    tmp_path: Path, make_domain_folder: Make, make_image: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    images = load_images(make_domain_folder(tmp_path / "here"))
    split = make_split(images)
    split.write(tmp_path / "split.json")
    cats = shutil.move(tmp_path / "here", tmp_path / "there") / "art" / "cat"
    (cats / "0003.png").rename(cats / "renamed.png")
    make_image(cats / "0000-new.png", seed=1000)
    moved = load_images(tmp_path / "there")
    back = read_split(tmp_path / "split.json", moved)
    assert roles_by_key(moved, back) == roles_by_key(images, split)
    assert back.hash == split.hash
    assert "1 images of there are not in" in capsys.readouterr().err.replace("\n", " ")
    (cats / "renamed.png").unlink()
    with pytest.raises(EdgekdError, match=r"1 gone, for example art/cat/0003\.png"):
        read_split(tmp_path / "split.json", load_images(tmp_path / "there"))
    make_image(cats / "0003.png", seed=1001)
    with pytest.raises(EdgekdError, match=r"1 altered, for example art/cat/0003\.png"):
        read_split(tmp_path / "split.json", load_images(tmp_path / "there"))


@pytest.fixture
def images(tmp_path: Path, make_domain_folder: Callable[..., Path]) -> ImageSet:
    classes = ("ant", "bee", "cat", "dog")
    return load_images(make_domain_folder(tmp_path / "d", classes=classes, count=10))


def test_of_classes_renumbers_and_reads_the_same_images(images: ImageSet) -> None:
    some = pickle.loads(pickle.dumps(images.of_classes(["dog", "bee"])))
    assert (some.classes, len(some)) == (("dog", "bee"), 60)
    for i in (0, 17, 59):
        whole = images.ids.index(some.ids[i])
        domain, name, _ = some.ids[i].split("/")
        assert (some.domains[some.domain_of[i]], some.classes[some.labels[i]]) == (domain, name)
        assert some.keys[i] == images.keys[whole]
        assert np.array_equal(np.asarray(some.read(i)), np.asarray(images.read(whole)))
    with pytest.raises(EdgekdError, match=r'no class "beee"\. Did you mean "bee"'):
        images.of_classes(["beee"])


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
    assert seen.classes == ("ant", "cat")
    assert run_split(config, seen).test_domain is None  # auto would leave out sketch
    test = unseen_test(images, config.unseen_classes)
    assert len(test) == 60
    assert {images.classes[c] for c in images.labels[test]} == {"bee", "dog"}
    assert not {images.keys[i] for i in test} & set(seen.keys)
    for unseen, domain in (
        (("bea",), "auto"),
        (("ant", "bee", "cat"), "auto"),
        (("bee",), "sketch"),
    ):
        with pytest.raises(EdgekdError):
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


def test_copies_of_a_shot(tmp_path: Path, make_domain_folder: Callable[..., Path]) -> None:
    root = make_domain_folder(tmp_path / "d", classes=("ant", "bee", "cat"), count=1)
    for number in range(5):
        shutil.copy(root / "art" / "bee" / "0000.png", root / "art" / "bee" / f"copy{number}.png")
    shutil.copy(root / "art" / "ant" / "0000.png", root / "art" / "bee" / "trains.png")
    images = load_images(root)  # bee: three contents of its own, one of them six times
    assert len(unseen_test(images, ["bee"])) == 8
    shots = take_shots(images, ("bee",), 2, 0)
    assert len({images.keys[i] for i in shots}) == 2
    left = left_to_test(images, ("bee",), shots)
    assert {images.keys[i] for i in left}.isdisjoint({images.keys[i] for i in shots})
    with pytest.raises(EdgekdError, match="too few different images"):
        take_shots(images, ("bee",), 4, 0)


def test_shots_train_and_change_nothing_else(images: ImageSet, tmp_path: Path) -> None:
    base = TrainConfig(unseen_classes=("bee", "dog"))
    config = base.model_copy(update={"shots": 2})
    seen, union = run_images(images, base), run_images(images, config)
    assert (union.classes, len(union)) == (images.classes, len(seen) + 4)
    before, split = run_split(base, seen), run_split(config, union)
    for role in ("val", "id_test", "ood_test"):
        left, right = getattr(split, role), getattr(before, role)
        assert [union.keys[i] for i in left] == [seen.keys[i] for i in right]
    few = {images.keys[i] for i in take_shots(images, ("bee", "dog"), 2, 0)}
    assert {union.keys[i] for i in split.train} == {seen.keys[i] for i in before.train} | few
    split.write(tmp_path / "split.json")
    assert np.array_equal(read_split(tmp_path / "split.json", union).train, split.train)
