from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import NO_CLASS, ImageSet, load_images, toy_images
from edgekd.data.split import ROLES, Split, make_split, read_split
from edgekd.data.subsets import run_split, untested_half
from edgekd.data.unlabelled import NO_DOMAIN, label_free, load_unlabelled, with_unlabelled


def paint(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (number, 0, 0)).save(path)
    return root


def test_images_at_every_depth_or_in_a_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "things"
    with pytest.raises(EdgekdError, match="There is no data at"):
        load_unlabelled(root)
    root.mkdir()
    (root / "clip.mp4").write_text("")
    with pytest.raises(EdgekdError, match=r"has no images \(1 × file ending \.mp4\)"):
        load_unlabelled(root)
    (root / "torn.png").write_text("no image")
    with pytest.raises(EdgekdError, match="None of the 1 images of"):
        load_unlabelled(root)
    paint(root, "b.png", "one/a.png", "1/2/3/4/5/6/deep.png", ".hidden/no.png")
    (root / "again").symlink_to(root, target_is_directory=True)
    images = load_unlabelled(root)
    assert "for example torn.png" in capsys.readouterr().err
    assert images.ids == ("1/2/3/4/5/6/deep.png", "b.png", "one/a.png")
    assert (images.name, images.classes, images.domains) == ("things", (), ("all",))
    assert images.labels.tolist() == [NO_CLASS] * 3
    assert images.read(1).getpixel((0, 0)) == (0, 0, 0)
    assert len(set(images.keys)) == 3
    (root / "some.csv").write_text("path,taken\nb.png,monday\none/a.png,tuesday\n")
    images = load_unlabelled(root / "some.csv")
    assert images.ids == ("b.png", "one/a.png")
    assert images.labels.tolist() == [NO_CLASS] * 2
    (root / "none.csv").write_text("file\na.png\n")
    with pytest.raises(EdgekdError, match="has no column"):
        load_unlabelled(root / "none.csv")


def test_toy_styles_share_no_image_with_the_toy_data() -> None:
    images = load_unlabelled("toy:sketch")
    assert len(images) == 200
    assert images.name == "sketch"
    assert not set(images.keys) & set(toy_images().keys)
    with pytest.raises(EdgekdError, match='no style "scetch"'):
        load_unlabelled("toy:scetch")


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[ImageSet, Split]:
    classes = [f"{domain}/{name}" for domain in ("photo", "sketch") for name in ("cat", "dog")]
    names = [f"{folder}/{number}.png" for folder in classes for number in range(6)]
    images = load_images(paint(tmp_path / "data", *names))
    return images, make_split(images)


def test_unlabelled_images_are_appended(labelled: tuple[ImageSet, Split], tmp_path: Path) -> None:
    images, split = labelled
    names = ("one/camera/a.png", "one/b.png", "two/b.png")
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (0, 9, number)).save(tmp_path / name)
    sources = [str(tmp_path / "one"), str(tmp_path / "two")]
    joined, made = with_unlabelled(images, split, sources)
    assert joined.labels[-3:].tolist() == [NO_CLASS] * 3
    assert joined.domain_of[-3:].tolist() == [NO_DOMAIN] * 3
    assert joined.ids[-3:] == ("b.png", "camera/a.png", f"{tmp_path / 'two'}/b.png")
    assert [joined.read(i).getpixel((0, 0))[2] for i in (24, 25, 26)] == [1, 0, 2]  # type: ignore[index]
    assert dict(made.unlabelled) == dict(zip(joined.ids[-3:], joined.keys[-3:], strict=True))
    assert (made.unlabelled_domains, made.hash) == (("one", "camera", "two"), split.hash)

    fewer, cut = with_unlabelled(images, split, sources, limit=2)
    assert len(fewer) == 26
    assert set(cut.unlabelled.values()) == set(sorted(made.unlabelled.values())[:2])


def test_unlabelled_images_of_a_split(labelled: tuple[ImageSet, Split], tmp_path: Path) -> None:
    images, split = labelled
    source = paint(tmp_path / "more", *(f"{number}.png" for number in range(30)))
    _, made = with_unlabelled(images, split, [str(source)])
    assert len(made.unlabelled) == 6  # 24 of the 30 have contents of the labelled data
    made.write(tmp_path / "split.json")
    again = read_split(tmp_path / "split.json", images)
    assert again.unlabelled == made.unlabelled
    assert again.unlabelled_domains == made.unlabelled_domains
    with_unlabelled(images, again, [str(source)])
    (source / "27.png").unlink()
    with pytest.raises(EdgekdError, match="unlabelled images are missing"):
        with_unlabelled(images, again, [str(source)])


def test_images_of_the_split_do_not_train_without_labels(
    labelled: tuple[ImageSet, Split], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, split = labelled
    root = tmp_path / "camera"
    root.mkdir()
    for role in ROLES:
        images.read(int(getattr(split, role)[0])).save(root / f"{role}.png")
    for name in ("new.png", "twice.png"):
        Image.new("RGB", (12, 12), (1, 2, 3)).save(root / name)
    _, made = with_unlabelled(images, split, [str(root)])
    assert list(made.unlabelled) == ["new.png"]
    assert capsys.readouterr().err.count("1 ×") == 5
    # Its neighbours trained, so the unseen domain is none any more.
    assert "sketch" in made.unlabelled_domains
    for name in ("new.png", "twice.png"):
        (root / name).unlink()
    with pytest.raises(EdgekdError, match="No unlabelled image is left"):
        with_unlabelled(images, split, [str(root)])


def test_half_of_a_domain_adapts(tmp_path: Path, make_domain_folder: Callable[..., Path]) -> None:
    images = load_images(make_domain_folder(tmp_path / "data", domains=("photo", "sketch")))
    split = run_split(TrainConfig(data="x", adapt=4), images)
    half = untested_half(images, split)
    assert len(split.ood_test) == len(half) == 10
    sketches = np.flatnonzero(images.domain_of == 1)
    assert sorted([*split.ood_test, *half]) == sketches.tolist()
    joined, made = with_unlabelled(images, split, [], adapt=4)
    assert joined.keys[-4:] == tuple(images.keys[i] for i in half[:4])
    assert joined.labels[-4:].tolist() == [NO_CLASS] * 4
    assert made.unlabelled_domains == ("sketch",)
    assert not set(made.unlabelled.values()) & set(made.entries["ood_test"].values())
    # The tested half does not depend on how many of the others train.
    assert run_split(TrainConfig(data="x", adapt=0), images).hash == split.hash
    with pytest.raises(EdgekdError, match="needs a domain that is left out"):
        run_split(TrainConfig(data="x", adapt=4, test_domain="none"), images)


def test_a_run_without_any_label_holds_a_tenth_out(tmp_path: Path) -> None:
    source = paint(tmp_path / "camera", *(f"{number}.png" for number in range(30)))
    images, split = label_free([str(source)], ("cat", "dog"))
    assert (images.classes, len(images)) == (("cat", "dog"), 30)
    assert images.labels.tolist() == [NO_CLASS] * 30
    assert split.val.tolist() == [0, 1, 2]
    assert len(split.train) == len(split.id_test) == len(split.ood_test) == 0
    assert list(split.unlabelled.values()) == list(images.keys[3:])
    split.write(tmp_path / "split.json")
    # Pictures that come later do not change the run's.
    Image.new("RGB", (12, 12), (200, 200, 200)).save(source / "later.png")
    again, same = label_free([str(source)], ("cat", "dog"), before=tmp_path / "split.json")
    assert (again.keys, same.hash, same.unlabelled) == (images.keys, split.hash, split.unlabelled)
    (source / images.ids[7]).unlink()
    with pytest.raises(EdgekdError, match="unlabelled images are missing"):
        label_free([str(source)], ("cat", "dog"), before=tmp_path / "split.json")


def test_names_that_print_alike_are_told_apart(tmp_path: Path) -> None:
    """A control character is shown as its escape, which another file may have in its name."""
    names = ("a\x1b.png", "a\\x1b.png", "c.png")
    images = load_unlabelled(paint(tmp_path / "u", *names))
    assert len(images.ids) == len(set(images.ids)) == 3
    pets = tmp_path / "pets"
    for name in ("cat", "dog"):
        paint(pets / name, *names)
    for number, path in enumerate(sorted(pets.rglob("*.png"))):
        Image.new("RGB", (12, 12), (0, number, 9)).save(path)
    labelled = load_images(pets)
    assert len(set(labelled.ids)) == 6
    joined, split = with_unlabelled(
        labelled, make_split(labelled, test_domain="none"), [str(tmp_path / "u")]
    )
    assert len(split.unlabelled) == len(joined) - len(labelled) == 3
