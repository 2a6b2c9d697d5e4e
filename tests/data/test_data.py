from __future__ import annotations

import csv
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import edgekd.data.sources.checked
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import load_images

pytestmark = pytest.mark.usefixtures("own_cache")

Make = Callable[..., Path]


def refusal(spec: Path) -> EdgekdError:
    with pytest.raises(EdgekdError) as caught:
        load_images(spec)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return caught.value


def write_manifest(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([columns, *rows])
    return path


def warned(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.replace("\n", " ")


def test_domain_layout(tmp_path: Path, make_domain_folder: Make) -> None:
    root = make_domain_folder(tmp_path / "mine", count=2)
    images = load_images(root)
    assert (images.name, images.classes, images.roles) == ("mine", ("cat", "dog"), None)
    assert images.domains == ("art", "photo", "sketch")
    assert images.ids[:3] == ("art/cat/0000.png", "art/cat/0001.png", "art/dog/0000.png")
    assert images.ids == tuple(sorted(images.ids))
    assert images.labels.tolist() == [0, 0, 1, 1] * 3
    assert images.domain_of.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    content = hashlib.sha256((root / "art/dog/0000.png").read_bytes())
    assert images.keys[2] == content.hexdigest()[:32]
    assert images.read(2).size == (40, 32)


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_roles_and_classes_by_value(tmp_path: Path, make_domain_folder: Make, val: str) -> None:
    layout = {"domains": ("train", val, "test"), "classes": ("10", "9")}
    images = load_images(make_domain_folder(tmp_path, **layout, count=1))
    assert (images.classes, images.domains) == (("9", "10"), ("all",))
    roles = {name.split("/")[0]: role for name, role in zip(images.ids, images.roles, strict=True)}
    assert roles == {"train": "train", val: "val", "test": "test"}


NOT_READ = [
    ([], "has no images"),
    (["cat/notes.txt"], "1 × file ending .txt"),
    (["a.png"], "are not in class folders"),
    (["cat/a.png", "cat/b.png"], 'only one class, "cat"'),
    (["cat/empty.jpg", "dog/empty.jpg"], "None of the 2 images"),
    (["cat/a.png", "dog/b.png", "bird/empty.jpg"], 'The class folder "bird"'),
    (["cat/a.png", "art/cat/b.png", "art/dog/c.png"], "art/cat/b.png and cat/a.png"),
    (["one/two/art/cat/a.png"], "4 folders deep"),
    (["train/cat/a.png", "train/dog/b.png", "sketch/cat/c.png"], "sketch is next to train"),
    (["train/a/1.png", "val/a/2.png", "valid/a/3.png"], "two folders for one role"),
]


@pytest.mark.parametrize(("paths", "message"), NOT_READ)
def test_folders_refused(tmp_path: Path, make_image: Make, paths: list[str], message: str) -> None:
    for seed, path in enumerate(tmp_path / name for name in paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        make_image(path, seed=seed) if path.suffix == ".png" else path.touch()
    assert message in str(refusal(tmp_path))


HEADED = b"path,label,domain,split\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("classes.txt", b"tench\n", "has 1 class names, but there are 2 classes"),
        ("classes.txt", b"tench\ntench\n", 'gives two classes the name "tench"'),
        ("classes.txt", b"fire hydrant\nFire_hydrant\n", '"fire hydrant" and "Fire_hydrant"'),
        ("classes.txt", b"n01\ttench\nn2\tshark\n", 'Did you mean "n02"?'),
        ("classes.txt", b"n01\ttench\nshark\n", "Line 2"),
        ("classes.txt", b"n01\ttench\nn01\tshark\n", 'names "n01" again'),
        ("m.csv", b"paht,label\na.png,x\n", "its columns are paht, label"),
        ("m.csv", b"path,klass\na.png,x\n", 'no column "label"'),
        ("m.csv", b"path,label,domian\na.png,x,y\n", 'Did you mean "domain"?'),
        ("m.csv", HEADED + b"a.png,x,y,tran\n", 'Did you mean "train"?'),
        ("m.csv", HEADED + b"a.png,x,y,\n", 'the split ""'),
        ("m.csv", HEADED + b"a.png,x,y,train\n,x,y,train\n", "Row 3"),
        ("m.csv", HEADED + b"a.png,nan,y,train\n", "no label"),
        ("m.csv", HEADED + b"a.png,x,<NA>,train\n", "no domain"),
        ("m.csv", HEADED, "has no rows"),
        ("m.csv", b"", 'no column "path"'),
        ("m.csv", b"path,label\ncaf\xe9.png,x\n", "not readable UTF-8"),
        ("m.parquet", b"PAR1", "not readable Parquet"),
        ("m.parquet", {"path": ["a.png", "b.png"], "label": [1.0, float("nan")]}, "Row 2 of"),
        ("m.parquet", {"path": ["a.png"], "label": ["x"], "domain": [2**62]}, "m.parquet"),
    ],
)
def test_manifests_and_class_names_that_do_not_fit(
    tmp_path: Path, make_domain_folder: Make, name: str, content: Any, message: str
) -> None:
    root = make_domain_folder(tmp_path, domains=("art",), classes=("n01", "n02"), count=1)
    if isinstance(content, bytes):
        (root / name).write_bytes(content)
    else:
        table = pyarrow.table(content)
        if "domain" in content:  # a time out of range
            table = table.set_column(2, "domain", table["domain"].cast(pyarrow.timestamp("us")))
        pyarrow.parquet.write_table(table, root / name)
    assert message in str(refusal(root if name == "classes.txt" else root / name))


def test_gaps(tmp_path: Path, make_domain_folder: Make, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_domain_folder(
        tmp_path, classes=("cat", "dog", "fire hydrant", "fire_hydrant"), count=1
    )
    shutil.rmtree(root / "photo" / "dog")
    (root / "photo" / "fire hydrant" / "0000.png").unlink()
    shutil.copy(root / "art" / "cat" / "0000.png", root / "art" / "dog" / "same.png")
    assert len(load_images(root)) == 11
    text = warned(capsys)
    assert "domain photo has no image of 2 of 4 classes: dog, fire hydrant." in text
    assert "different label (for example art/cat/0000.png and art/dog/same.png)" in text
    assert '"fire hydrant", "fire_hydrant"' in text  # a teacher reads them alike


def test_unreadable_files_are_left_out_and_counted_once(
    tmp_path: Path, make_domain_folder: Make, make_image: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_domain_folder(tmp_path / "data", domains=(), count=2)
    whole = make_image(tmp_path / "whole.jpg", size=(200, 200)).read_bytes()
    (root / "cat" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "cat" / "empty.png").touch()
    (root / "dog" / "page.jpg").write_text("<html>")
    (root / "dog" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    for name in ("notes.txt", ".hidden.png", "Thumbs.db"):
        (root / "dog" / name).write_bytes(b"x")
    assert load_images(root).ids == ("cat/0000.png", "cat/0001.png", "dog/0000.png", "dog/0001.png")
    text = warned(capsys)
    assert text.count("warning") == 1
    assert text.count("1 × ") == 5
    for name in ("cat/empty.png", "cat/cut.jpg", "dog/page.jpg", "dog/gone.jpg", "dog/notes.txt"):
        assert f"(for example {name})" in text


def test_links_in_circles_and_odd_names(tmp_path: Path, make_domain_folder: Make) -> None:
    root = make_domain_folder(tmp_path / "data", count=1)
    (root / "art" / "cat" / "up").symlink_to(root)
    (root / "again").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "dog.jpg").symlink_to(root / "dog.jpg")
    os.mkfifo(root / "art" / "cat" / "pipe.jpg")
    folder = os.fsencode(root / "art" / "cat")
    os.rename(folder + b"/0000.png", folder + b"/caf\xe9.png")
    images = load_images(root)
    assert len(images) == 6
    assert images.ids[0] == "art/cat/caf\\xe9.png"
    assert images.read(0).size == (40, 32)


def test_class_names_by_line_or_as_pairs(tmp_path: Path, make_domain_folder: Make) -> None:
    root = make_domain_folder(tmp_path, classes=("n01", "n02"), count=1)
    for text in ("tench\n\ngreat white shark\n", "n02\tgreat white shark\nn01\ttench\n"):
        (root / "classes.txt").write_text(text)
        assert load_images(root).classes == ("tench", "great white shark")


def test_csv_and_parquet_manifests(
    tmp_path: Path, make_domain_folder: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make_domain_folder(tmp_path / "store", domains=(), count=2)
    rows = [
        ("store/dog/0000.png", "12", "outdoor", "train", "40"),
        ("store/cat/0000.png", "3", "indoor", "valid", "40"),
        ("store/cat/0001.png", "3", "outdoor", "test", "40"),
        ("store/cat/gone.png", "3", "outdoor", "test", "40"),
    ]
    columns = ("path", "label", "domain", "split", "width")
    path = write_manifest(tmp_path / "pets.csv", columns, rows)
    path.write_text("\ufeff" + path.read_text() + "\n", encoding="utf-8")
    table = pyarrow.table(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)))
    numbers = pyarrow.array([12, 3, 3, 3])
    pyarrow.parquet.write_table(table.set_column(1, "label", numbers), tmp_path / "pets.parquet")
    for manifest in (path, path.with_suffix(".parquet")):
        images = load_images(manifest)
        assert images.ids == ("store/cat/0000.png", "store/cat/0001.png", "store/dog/0000.png")
        assert (images.name, images.classes) == ("pets", ("3", "12"))
        assert (images.labels.tolist(), images.domain_of.tolist()) == ([0, 0, 1], [0, 1, 1])
        assert (images.domains, images.roles) == (("indoor", "outdoor"), ("val", "test", "train"))
        text = warned(capsys)
        assert f"{manifest}: width" in text
        assert "1 × missing (for example store/cat/gone.png)" in text


def test_spellings(
    tmp_path: Path, make_domain_folder: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make_domain_folder(tmp_path, domains=(), count=1)
    cat, dog = "cat/0000.png", "dog/0000.png"
    spelled = [(cat, "cat"), (f"./{cat}", "cat"), (str(tmp_path / cat), "cat"), (dog, "dog")]
    path = write_manifest(tmp_path / "m.csv", ("path", "label"), spelled)
    assert load_images(path).ids == (cat, dog)
    assert "2 rows of" in capsys.readouterr().err
    for other in (f"dog/../{cat}", str(tmp_path / cat)):
        write_manifest(path, ("path", "label"), [(cat, "cat"), (dog, "dog"), (other, "dog")])
        message = str(refusal(path))
        assert "Row 4" in message
        assert '"dog" after "cat"' in message


def test_a_second_load_opens_only_what_is_new(
    tmp_path: Path, own_cache: Path, make_domain_folder: Make, make_image: Make, monkeypatch: Any, capsys: Any
) -> None:  # fmt: skip
    root = make_domain_folder(tmp_path / "data", count=2)
    (root / "art" / "cat" / "torn.png").write_bytes(b"\x89PNG")
    first = load_images(root)
    opened: list[str] = []
    plain = edgekd.data.sources.checked.check_content

    def spy(path: Path) -> tuple[str, str]:
        opened.append(path.name)
        return plain(path)

    monkeypatch.setattr(edgekd.data.sources.checked, "check_content", spy)
    assert load_images(root).keys == first.keys
    assert opened == ["torn.png"]  # it may be readable by now
    make_image(root / "art" / "cat" / "0001.png", seed=99)
    os.utime(root / "art" / "cat" / "0001.png", ns=(1, 1))
    second = load_images(root)
    changed = [a != b for a, b in zip(first.keys, second.keys, strict=True)]
    assert changed == [False, True] + [False] * 10
    shutil.rmtree(own_cache)
    own_cache.write_text("a file where the cache's folder should be")
    assert load_images(root).keys == second.keys
    assert "next time" in warned(capsys)


def test_an_image_that_vanishes_later(tmp_path: Path, make_domain_folder: Make) -> None:
    root = make_domain_folder(tmp_path / "data", count=1)
    images = load_images(root)
    (root / "art" / "cat" / "0000.png").unlink()
    with pytest.raises(EdgekdError, match="no longer is: missing"):
        images.read(0)
