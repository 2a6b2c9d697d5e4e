from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.split import ROLES, Split, make_split, read_split

Make = Callable[..., Path]


def blank(index: int) -> Image.Image:
    return Image.new("RGB", (16, 16))


def image_set(
    rows: list[tuple[str, str, str]],
    *,
    roles: list[str] | None = None,
    domains: tuple[str, ...] | None = None,
) -> ImageSet:
    """Rows of (domain, class, content); the id tells the row's number apart."""
    names = domains or tuple(sorted({row[0] for row in rows}))
    classes = tuple(sorted({row[1] for row in rows}))
    return ImageSet(
        name="made up",
        classes=classes,
        domains=names,
        labels=np.array([classes.index(row[1]) for row in rows], dtype=np.int64),
        domain_of=np.array([names.index(row[0]) for row in rows], dtype=np.int64),
        keys=tuple(hashlib.sha256(row[2].encode()).hexdigest()[:32] for row in rows),
        ids=tuple(f"{row[0]}/{row[1]}/{number}.png" for number, row in enumerate(rows)),
        roles=None if roles is None else tuple(roles),
        reader=blank,
    )


def grid(domains: str = "abc", classes: str = "xyz", count: int = 20) -> ImageSet:
    return image_set([(d, c, f"{d}{c}{i}") for d in domains for c in classes for i in range(count)])


def roles_by_key(images: ImageSet, split: Split) -> dict[str, str]:
    return {images.keys[i]: role for role in ROLES for i in getattr(split, role).tolist()}


def refusal(images: ImageSet, **options: str) -> EdgekdError:
    with pytest.raises(EdgekdError) as caught:
        make_split(images, **options)  # type: ignore[arg-type]
    assert caught.value.hint
    return caught.value


def test_the_last_domain_is_left_out_in_full() -> None:
    images = grid()
    split = make_split(images)
    assert split.test_domain == "c"
    assert split.ood_test.tolist() == list(range(120, 180))
    assert (len(split.train), len(split.val), len(split.id_test)) == (96, 12, 12)
    assert sorted(np.concatenate([split.train, split.val, split.id_test]).tolist()) == list(
        range(120)
    )
    for indices in (split.train, split.val, split.id_test, split.ood_test):
        assert indices.dtype == np.int64
        assert indices.tolist() == sorted(indices.tolist())
    for domain in (0, 1):
        for label in range(3):
            inside = (images.domain_of == domain) & (images.labels == label)
            assert [int(inside[getattr(split, role)].sum()) for role in ROLES] == [16, 2, 2, 0]
    assert "domain c is ood_test" in split.rule
    assert "80/10/10" in split.rule


def test_a_named_domain_and_none() -> None:
    images = grid()
    assert make_split(images, test_domain="a").ood_test.tolist() == list(range(60))
    none = make_split(images, test_domain="none")
    assert none.test_domain is None
    assert none.ood_test.shape == (0,)
    assert [len(none.train), len(none.val), len(none.id_test)] == [144, 18, 18]


def test_order_is_by_hash_of_seed_and_content() -> None:
    images = grid("ab", "xy", 10)
    split = make_split(images, seed=3)
    order = sorted(range(10), key=lambda i: hashlib.sha256(f"3:{images.keys[i]}".encode()).digest())
    assert [i for i in split.val.tolist() if i < 10] == order[:1]
    assert [i for i in split.id_test.tolist() if i < 10] == order[1:2]


def test_the_seed_changes_the_cut_and_the_hash() -> None:
    images = grid()
    zero, again, one = make_split(images), make_split(images), make_split(images, seed=1)
    assert zero.hash == again.hash
    assert np.array_equal(zero.val, again.val)
    assert zero.hash != one.hash
    assert not np.array_equal(zero.val, one.val)
    assert len(zero.hash) == 16


def test_names_order_and_place_change_nothing() -> None:
    images = grid()
    shuffle = np.random.default_rng(0).permutation(len(images))
    moved = replace(
        images,
        labels=images.labels[shuffle],
        domain_of=images.domain_of[shuffle],
        keys=tuple(images.keys[i] for i in shuffle),
        ids=tuple(f"elsewhere/{i}" for i in shuffle),
    )
    assert roles_by_key(images, make_split(images)) == roles_by_key(moved, make_split(moved))
    assert make_split(images).hash == make_split(moved).hash


def test_one_more_image_moves_at_most_the_cutting_points() -> None:
    rows = [(d, c, f"{d}{c}{i}") for d in "abc" for c in "xyz" for i in range(20)]
    before, after = image_set(rows), image_set([*rows, ("a", "x", "new")])
    old, new = roles_by_key(before, make_split(before)), roles_by_key(after, make_split(after))
    assert sum(new[key] != role for key, role in old.items()) <= 2
    assert len(new) == len(old) + 1


@pytest.mark.parametrize(
    ("count", "expected"), [(1, 1), (3, 1), (4, 2), (10, 8), (14, 12), (15, 11), (25, 19)]
)
def test_sizes_of_groups(count: int, expected: int) -> None:
    # 15 → 1.5 rounds to 2, 25 → 2.5 rounds to 3; small groups keep one each.
    big = [("a", "big", f"big{i}") for i in range(30)]
    small = [("a", "small", f"small{i}") for i in range(count)]
    images = image_set(big + small, domains=("a", "b"))
    split = make_split(images, test_domain="none")
    assert sum(i >= 30 for i in split.train.tolist()) == expected


def test_too_few_images() -> None:
    assert "too few images" in refusal(grid("ab", "xy", 1), test_domain="none").message


def test_a_single_unnamed_domain_has_no_ood() -> None:
    images = image_set([("all", c, f"{c}{i}") for c in "xy" for i in range(10)])
    split = make_split(images)
    assert split.test_domain is None
    assert len(split.ood_test) == 0
    assert "No domain is left out" in split.rule
    assert "no domains" in refusal(images, test_domain="sketch").message


@pytest.mark.parametrize("wanted", ["auto", "photo"])
def test_only_one_domain(wanted: str) -> None:
    images = image_set([("photo", c, f"{c}{i}") for c in "xy" for i in range(10)])
    error = refusal(images, test_domain=wanted)
    assert "only one domain" in error.message
    assert "--test-domain none" in error.hint
    assert len(make_split(images, test_domain="none").train) == 16


def test_unknown_domain() -> None:
    images = image_set(
        [(d, c, f"{d}{c}{i}") for d in ("photo", "sketch") for c in "xy" for i in range(10)]
    )
    assert refusal(images, test_domain="sketsch").hint == 'Did you mean "sketch"?'


def test_a_class_only_in_the_domain_left_out() -> None:
    rows = [(d, c, f"{d}{c}{i}") for d in "ab" for c in "xy" for i in range(10)] + [
        ("b", "eel", "eel")
    ]
    error = refusal(image_set(rows))
    assert "1 of 3 classes: eel" in error.message
    assert "b is left out" in error.message
    assert make_split(image_set(rows), test_domain="a").test_domain == "a"


def test_copies_follow_the_first_one() -> None:
    rows = [(d, c, f"{d}{c}{i}") for d in "abc" for c in "xy" for i in range(10)]
    copies = [("b", "x", f"ax{i}") for i in range(10)] + [("a", "x", f"ax{i}") for i in range(10)]
    images = image_set(rows + copies)
    split = make_split(images)
    role_of: dict[str, set[str]] = {}
    for role in ROLES:
        for index in getattr(split, role).tolist():
            role_of.setdefault(images.keys[index], set()).add(role)
    assert all(len(roles) == 1 for roles in role_of.values())
    assert len(split.train) == 4 * 8 + 2 * 8
    # The copies count for nothing when the groups are cut.
    plain = image_set(rows)
    assert roles_by_key(plain, make_split(plain)) == roles_by_key(images, split)


def test_content_of_the_domain_left_out_does_not_train(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(d, c, f"{d}{c}{i}") for d in "ab" for c in "xy" for i in range(10)]
    images = image_set([*rows, ("a", "x", "bx3")])
    split = make_split(images)
    assert len(split.ood_test) == 20
    assert 40 not in np.concatenate([split.train, split.val, split.id_test]).tolist()
    assert "content that is also in b (for example a/x/40.png)" in capsys.readouterr().err.replace(
        "\n", " "
    )


def given(train: int = 20, val: int = 5, test: int = 5) -> ImageSet:
    parts = (("train", train), ("val", val), ("test", test))
    rows = [
        ("all", c, f"{c}{role}{i}") for role, count in parts for c in "xy" for i in range(count)
    ]
    return image_set(rows, roles=[role for role, count in parts for _ in range(2 * count)])


def test_roles_of_the_layout_are_taken() -> None:
    split = make_split(given())
    assert split.train.tolist() == list(range(40))
    assert split.val.tolist() == list(range(40, 50))
    assert split.id_test.tolist() == list(range(50, 60))
    assert "own train, val and test" in split.rule


def test_a_missing_val_is_cut_from_train() -> None:
    split = make_split(given(val=0))
    assert (len(split.train), len(split.val), len(split.id_test)) == (36, 4, 10)
    assert "val, which it lacks, as a tenth of train" in split.rule


def test_train_copies_of_a_given_test_image_do_not_train(
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = given()
    keys = list(images.keys)
    keys[7] = keys[55]
    split = make_split(replace(images, keys=tuple(keys)))
    assert 55 in split.id_test.tolist()
    assert 7 not in np.concatenate([split.train, split.val, split.id_test]).tolist()
    assert "also held out" in capsys.readouterr().err.replace("\n", " ")


def test_a_split_comes_back_from_its_file(tmp_path: Path) -> None:
    images = grid()
    split = make_split(images, test_domain="b", seed=7)
    split.write(tmp_path / "split.json")
    back = read_split(tmp_path / "split.json", images)
    for role in ROLES:
        assert np.array_equal(getattr(back, role), getattr(split, role))
    assert (back.hash, back.rule, back.seed, back.test_domain) == (split.hash, split.rule, 7, "b")
    data = json.loads((tmp_path / "split.json").read_text())
    assert data["schema_version"] == 1
    assert data["roles"]["ood_test"]["b/x/60.png"] == images.keys[60]


def test_a_split_survives_a_move_and_new_images(
    tmp_path: Path, make_domain_folder: Make, make_image: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_domain_folder(tmp_path / "here")
    images = load_images(root)
    split = make_split(images)
    split.write(tmp_path / "split.json")
    shutil.move(root, tmp_path / "there")
    (tmp_path / "there" / "art" / "cat" / "0003.png").rename(
        tmp_path / "there" / "art" / "cat" / "renamed.png"
    )
    make_image(tmp_path / "there" / "art" / "cat" / "0000-new.png", seed=1000)
    moved = load_images(tmp_path / "there")
    back = read_split(tmp_path / "split.json", moved)
    assert roles_by_key(moved, back) == roles_by_key(images, split)
    assert back.hash == split.hash
    assert "1 images of there are not in" in capsys.readouterr().err.replace("\n", " ")


def test_a_split_whose_images_are_gone_or_altered(
    tmp_path: Path, make_domain_folder: Make, make_image: Make
) -> None:
    root = make_domain_folder(tmp_path / "data")
    make_split(load_images(root)).write(tmp_path / "split.json")
    (root / "art" / "cat" / "0003.png").unlink()
    with pytest.raises(EdgekdError, match=r"1 gone, for example art/cat/0003\.png"):
        read_split(tmp_path / "split.json", load_images(root))
    make_image(root / "art" / "cat" / "0003.png", seed=1000)
    with pytest.raises(EdgekdError, match=r"1 altered, for example art/cat/0003\.png"):
        read_split(tmp_path / "split.json", load_images(root))


def test_files_that_are_no_split(tmp_path: Path) -> None:
    images = grid()
    path = tmp_path / "split.json"
    with pytest.raises(EdgekdError, match="There is no split"):
        read_split(path, images)
    for text in ("{", "[]", "{}", '{"schema_version": 1, "roles": []}'):
        path.write_text(text)
        with pytest.raises(EdgekdError):
            read_split(path, images)
    make_split(images).write(path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"schema_version": 2}))
    with pytest.raises(EdgekdError, match="schema version 2"):
        read_split(path, images)
    name, key = next(iter(data["roles"]["train"].items()))
    del data["roles"]["train"][name]
    data["roles"]["val"][name] = key
    path.write_text(json.dumps(data))
    with pytest.raises(EdgekdError, match="was altered"):
        read_split(path, images)
