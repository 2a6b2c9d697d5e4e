from __future__ import annotations

import csv
import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import edgekd.data.image_set
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import load_images

ASSETS = Path(os.environ.get("EDGEKD_ASSETS", Path(__file__).parents[3] / "shared" / "assets"))

Make = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("own_cache")


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
    assert images.name == "mine"
    assert images.classes == ("cat", "dog")
    assert images.domains == ("art", "photo", "sketch")
    assert len(images) == 12
    assert images.ids[:3] == ("art/cat/0000.png", "art/cat/0001.png", "art/dog/0000.png")
    assert images.labels.tolist() == [0, 0, 1, 1] * 3
    assert images.domain_of.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert images.labels.dtype == images.domain_of.dtype == np.int64
    assert images.roles is None
    assert (
        images.keys[2] == hashlib.sha256((root / "art/dog/0000.png").read_bytes()).hexdigest()[:32]
    )
    assert images.read(2).size == (40, 32)


def test_class_layout(tmp_path: Path, make_domain_folder: Make) -> None:
    images = load_images(make_domain_folder(tmp_path, domains=(), count=3))
    assert images.domains == ("all",)
    assert images.domain_of.tolist() == [0] * 6
    assert images.ids[3] == "dog/0000.png"


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_role_layout(tmp_path: Path, make_domain_folder: Make, val: str) -> None:
    images = load_images(make_domain_folder(tmp_path, domains=("train", val, "test"), count=1))
    assert images.domains == ("all",)
    assert images.roles is not None
    assert dict(zip(images.ids, images.roles, strict=True)) == {
        "train/cat/0000.png": "train",
        "train/dog/0000.png": "train",
        f"{val}/cat/0000.png": "val",
        f"{val}/dog/0000.png": "val",
        "test/cat/0000.png": "test",
        "test/dog/0000.png": "test",
    }


def test_class_without_a_readable_image(tmp_path: Path, make_domain_folder: Make) -> None:
    root = make_domain_folder(tmp_path, count=1)
    (root / "photo" / "bird").mkdir()
    (root / "photo" / "bird" / "a.jpg").write_bytes(b"no image")
    error = refusal(root)
    assert 'The class folder "bird"' in error.message
    assert "no readable image" in error.message


NOT_READ = [
    ([], "holds no image"),
    (["cat/"], "holds no image"),
    (["cat/notes.txt"], "1 × file ending .txt"),
    (["a.png"], "lie in no class folder"),
    (["cat/a.png", "cat/b.png"], 'only one class, "cat"'),
    (["cat/empty.jpg", "dog/empty.jpg"], "None of the 2 images"),
    (["cat/a.png", "dog/b.png", "bird/empty.jpg"], 'The class folder "bird"'),
    (
        ["cat/a.png", "art/cat/b.png", "art/dog/c.png"],
        "different depths: art/cat/b.png and cat/a.png",
    ),
    (["one/two/art/cat/a.png"], "4 folders deep"),
    (["train/cat/a.png", "train/dog/b.png", "sketch/cat/c.png"], "sketch lies beside train"),
    (["train/a/1.png", "val/a/2.png", "valid/a/3.png"], "two folders for one role"),
]


@pytest.mark.parametrize(("paths", "message"), NOT_READ)
def test_folders_that_cannot_be_read_as_data(
    tmp_path: Path, make_image: Make, paths: list[str], message: str
) -> None:
    for seed, name in enumerate(paths):
        path = tmp_path / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            make_image(path, seed=seed)
        elif not name.endswith("/"):
            path.touch()
    assert message in str(refusal(tmp_path))


def test_data_that_are_not_there_or_a_file(tmp_path: Path, make_image: Make) -> None:
    assert "There is no data at" in refusal(tmp_path / "absent").message
    assert "There is no data at" in refusal(tmp_path / "absent.csv").message
    assert "is a file where a folder is expected" in refusal(make_image(tmp_path / "a.png")).message


def test_class_missing_from_one_domain_is_said(
    tmp_path: Path, make_domain_folder: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_domain_folder(tmp_path, classes=("cat", "dog", "eel"), count=1)
    shutil.rmtree(root / "photo" / "dog")
    (root / "photo" / "eel" / "0000.png").unlink()
    assert len(load_images(root)) == 7
    assert "domain photo has no image of 2 of 3 classes: dog, eel." in warned(capsys)


def test_unreadable_files_are_left_out_and_counted_once(
    tmp_path: Path, make_domain_folder: Make, make_image: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_domain_folder(tmp_path, domains=(), count=2)
    whole = make_image(tmp_path / "whole.jpg", size=(200, 200)).read_bytes()
    (tmp_path / "whole.jpg").unlink()
    (root / "cat" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "cat" / "empty.png").touch()
    (root / "dog" / "empty.png").touch()
    (root / "dog" / "page.jpg").write_text("<html>")
    (root / "dog" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (root / "dog" / "notes.txt").write_text("none")
    for name in (".hidden.png", "Thumbs.db", ".DS_Store"):
        (root / "dog" / name).write_bytes(b"x")
    (root / ".cache" / "x").mkdir(parents=True)
    assert load_images(root).ids == ("cat/0000.png", "cat/0001.png", "dog/0000.png", "dog/0001.png")
    text = warned(capsys)
    assert text.count("warning") == 1
    for part in (
        "2 × empty file (for example cat/empty.png)",
        "1 × truncated (for example cat/cut.jpg)",
        "1 × not an image (for example dog/page.jpg)",
        "1 × missing (for example dog/gone.jpg)",
        "1 × file ending .txt (for example dog/notes.txt)",
    ):
        assert part in text
    assert "hidden" not in text
    assert "Thumbs" not in text


def test_links_in_circles_end(tmp_path: Path, make_domain_folder: Make) -> None:
    root = make_domain_folder(tmp_path / "data", count=1)
    (root / "art" / "cat" / "up").symlink_to(root)
    (root / "again").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "dog.jpg").symlink_to(root / "dog.jpg")
    os.mkfifo(root / "art" / "cat" / "pipe.jpg")
    assert len(load_images(root)) == 6


def test_same_content_under_two_labels_is_said(
    tmp_path: Path, make_domain_folder: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_domain_folder(tmp_path, domains=(), count=2)
    shutil.copy(root / "cat" / "0000.png", root / "dog" / "same.png")
    shutil.copy(root / "cat" / "0000.png", root / "cat" / "same.png")
    assert len(load_images(root)) == 6
    assert (
        "1 × same content, different label (for example cat/0000.png and dog/same.png)"
        in warned(capsys)
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such file names")
def test_names_that_are_no_utf8(tmp_path: Path, make_domain_folder: Make) -> None:
    root = make_domain_folder(tmp_path, domains=(), count=1)
    os.rename(os.fsencode(root / "cat" / "0000.png"), os.fsencode(root / "cat") + b"/caf\xe9.png")
    images = load_images(root)
    assert images.ids[0] == "cat/caf\\xe9.png"
    assert images.read(0).size == (40, 32)


def test_class_names_by_line_or_as_pairs(tmp_path: Path, make_domain_folder: Make) -> None:
    root = make_domain_folder(tmp_path, classes=("n01", "n02"), count=1)
    for text in ("tench\n\ngreat white shark\n", "n02\tgreat white shark\nn01\ttench\n"):
        (root / "classes.txt").write_text(text)
        assert load_images(root).classes == ("tench", "great white shark")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tench\n", "names 1 classes, but there are 2"),
        ("tench\ntench\n", 'gives two classes the name "tench"'),
        ("fire hydrant\nFire_hydrant\n", 'the name "fire hydrant" and "Fire_hydrant"'),
        ("n01\ttench\nn2\tshark\n", 'Did you mean "n02"?'),
        ("n01\ttench\nshark\n", "Line 2"),
        ("n01\ttench\nn01\tshark\n", 'names "n01" again'),
    ],
)
def test_class_names_that_do_not_fit(
    tmp_path: Path, make_domain_folder: Make, text: str, message: str
) -> None:
    root = make_domain_folder(tmp_path, classes=("n01", "n02"), count=1)
    (root / "classes.txt").write_text(text)
    assert message in str(refusal(root))


def test_numbered_class_folders_are_ordered_by_value(
    tmp_path: Path, make_domain_folder: Make
) -> None:
    images = load_images(
        make_domain_folder(tmp_path, domains=(), classes=("10", "9", "0"), count=1)
    )
    assert images.classes == ("0", "9", "10")
    assert images.ids == ("0/0000.png", "10/0000.png", "9/0000.png")
    assert images.labels.tolist() == [0, 2, 1]


def test_csv_manifest(tmp_path: Path, make_domain_folder: Make) -> None:
    make_domain_folder(tmp_path / "store", domains=(), count=2)
    rows = [
        ("store/dog/0000.png", "hound", "outdoor", "train"),
        ("store/cat/0000.png", "tabby", "indoor", "valid"),
        ("store/cat/0001.png", "tabby", "outdoor", "test"),
    ]
    path = write_manifest(tmp_path / "pets.csv", ("path", "label", "domain", "split"), rows)
    path.write_text("\ufeff" + path.read_text() + "\n", encoding="utf-8")
    images = load_images(path)
    assert images.name == "pets"
    assert images.ids == ("store/cat/0000.png", "store/cat/0001.png", "store/dog/0000.png")
    assert images.classes == ("hound", "tabby")
    assert images.domains == ("indoor", "outdoor")
    assert images.labels.tolist() == [1, 1, 0]
    assert images.domain_of.tolist() == [0, 1, 1]
    assert images.roles == ("val", "test", "train")
    assert np.array_equal(
        np.asarray(images.read(2)), np.asarray(load_images(tmp_path / "store").read(2))
    )


def test_one_file_however_it_is_spelled_is_one_image(
    tmp_path: Path, make_domain_folder: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make_domain_folder(tmp_path, domains=(), count=1)
    cat, dog = "cat/0000.png", "dog/0000.png"
    spelled = [(cat, "cat"), (f"./{cat}", "cat"), (str(tmp_path / cat), "cat"), (dog, "dog")]
    path = write_manifest(tmp_path / "m.csv", ("path", "label"), spelled)
    assert load_images(path).ids == (cat, dog)
    assert "2 rows of" in capsys.readouterr().err
    for other, told in (
        ((f"dog/../{cat}", "dog"), "Row 4"),
        ((str(tmp_path / cat), "dog"), "Row 4"),
    ):
        write_manifest(path, ("path", "label"), [(cat, "cat"), (dog, "dog"), other])
        message = str(refusal(path))
        assert told in message
        assert '"dog" after "cat"' in message


@pytest.mark.parametrize("value", ["", "nan", "NaN", "<NA>"])
@pytest.mark.parametrize("column", ["path", "label", "domain"])
def test_a_row_without_a_value_is_refused_by_its_number(
    tmp_path: Path, column: str, value: str
) -> None:
    row = {"path": "a.png", "label": "dog", "domain": "x"}
    rows = [tuple(row.values()), tuple((row | {column: value}).values())]
    path = write_manifest(tmp_path / "m.csv", tuple(row), rows)
    message = str(refusal(path))
    assert "Row 3" in message
    assert f"no {column}" in message


@pytest.mark.parametrize("alike", [("fire hydrant", "fire_hydrant"), ("cafe\u0301", "caf\u00e9")])
def test_classes_that_a_teacher_reads_alike_are_named(
    tmp_path: Path,
    make_domain_folder: Make,
    capsys: pytest.CaptureFixture[str],
    alike: tuple[str, str],
) -> None:
    load_images(make_domain_folder(tmp_path, domains=(), classes=(*alike, "cat"), count=1))
    assert f'"{alike[0]}", "{alike[1]}"' in capsys.readouterr().err


def test_parquet_manifest_equals_csv(tmp_path: Path, make_domain_folder: Make) -> None:
    import pyarrow
    import pyarrow.parquet

    make_domain_folder(tmp_path, domains=(), count=2)
    names = [f"{name}/000{i}.png" for name in ("cat", "dog") for i in (0, 1)]
    table = {"path": names, "label": [3, 3, 12, 12]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "pets.parquet")
    write_manifest(
        tmp_path / "pets.csv",
        ("path", "label"),
        [(n, str(c)) for n, c in zip(*table.values(), strict=True)],
    )
    parquet, comma = load_images(tmp_path / "pets.parquet"), load_images(tmp_path / "pets.csv")
    assert parquet.classes == comma.classes == ("3", "12")
    assert parquet.ids == comma.ids
    assert parquet.keys == comma.keys
    assert parquet.domains == ("all",)


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        (("paht", "label"), ("a.png", "x"), 'rename "paht" to "path"'),
        (("path", "klass"), ("a.png", "x"), 'no column "label"'),
        (("path", "label", "domian"), ("a.png", "x", "y"), 'Did you mean "domain"?'),
        (("path", "label", "split"), ("a.png", "x", "tran"), 'Did you mean "train"?'),
        (("path", "label", "split"), ("a.png", "x", ""), 'the split ""'),
        (("path", "label"), ("a.png", ""), "Row 2"),
        (("path", "label"), ("", "x"), "has no path"),
        (("path", "label", "domain"), ("a.png", "x", ""), "has no domain"),
    ],
)
def test_manifests_that_do_not_fit(
    tmp_path: Path, columns: Sequence[str], row: Sequence[str], message: str
) -> None:
    assert message in str(refusal(write_manifest(tmp_path / "m.csv", columns, [row])))


def test_manifest_without_rows_or_text(tmp_path: Path) -> None:
    assert (
        "has no rows" in refusal(write_manifest(tmp_path / "m.csv", ("path", "label"), [])).message
    )
    (tmp_path / "zero.csv").touch()
    assert 'no column "path"' in refusal(tmp_path / "zero.csv").message
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    assert "not readable Parquet" in refusal(tmp_path / "torn.parquet").message
    (tmp_path / "latin.csv").write_bytes(b"path,label\ncaf\xe9.png,x\n")
    assert "not readable UTF-8" in refusal(tmp_path / "latin.csv").message


def test_columns_that_are_not_used_are_said(
    tmp_path: Path, make_domain_folder: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make_domain_folder(tmp_path, domains=(), count=1)
    rows = [("cat/0000.png", "c", "40"), ("dog/0000.png", "d", "40"), ("dog/gone.png", "d", "40")]
    assert (
        len(load_images(write_manifest(tmp_path / "m.csv", ("path", "label", "width"), rows))) == 2
    )
    text = warned(capsys)
    assert "does not use: width" in text
    assert "1 × missing (for example dog/gone.png)" in text


def test_order_does_not_depend_on_the_disk(tmp_path: Path, make_domain_folder: Make) -> None:
    first = load_images(make_domain_folder(tmp_path / "a", count=2))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    second = load_images(tmp_path / "b")
    assert first.ids == second.ids == tuple(sorted(first.ids))
    assert first.keys == second.keys


def test_second_load_opens_nothing(
    tmp_path: Path, make_domain_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_domain_folder(tmp_path / "data", count=2)
    (root / "art" / "cat" / "torn.png").write_bytes(b"\x89PNG")
    first = load_images(root)
    opened: list[str] = []
    plain = edgekd.data.image_set.check_content

    def spy(path: Path) -> tuple[str, str]:
        opened.append(path.name)
        return plain(path)

    monkeypatch.setattr(edgekd.data.image_set, "check_content", spy)
    assert load_images(root).keys == first.keys
    # What could not be read is tried again: a permission may have been mended.
    assert opened == ["torn.png"]


def test_an_altered_image_is_looked_at_again(
    tmp_path: Path, make_domain_folder: Make, make_image: Make
) -> None:
    root = make_domain_folder(tmp_path / "data", count=2)
    first = load_images(root)
    make_image(root / "art" / "cat" / "0001.png", seed=99)
    os.utime(root / "art" / "cat" / "0001.png", ns=(1, 1))
    second = load_images(root)
    assert [a == b for a, b in zip(first.keys, second.keys, strict=True)] == [True, False] + [
        True
    ] * 10


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, own_cache: Path, make_domain_folder: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    own_cache.write_text("a file where the cache's folder should be")
    assert len(load_images(make_domain_folder(tmp_path / "data", count=1))) == 6
    assert "checked again next time" in warned(capsys)


def test_reading_is_picklable_and_thread_safe(tmp_path: Path, make_domain_folder: Make) -> None:
    images = load_images(make_domain_folder(tmp_path / "data", count=4))
    twin = pickle.loads(pickle.dumps(images))
    expected = [np.asarray(images.read(i)) for i in range(len(images))]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: np.asarray(twin.read(i)), range(len(twin))))
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def test_reading_at_a_fraction_of_the_size(tmp_path: Path, make_image: Make) -> None:
    for name in ("cat", "dog"):
        make_image(tmp_path / name / "a.jpg", size=(640, 480))
        make_image(tmp_path / name / "b.png", size=(640, 480))
    images = load_images(tmp_path)
    assert images.read(0).size == (640, 480)
    assert images.read(0, draft=200).size == (320, 240)
    assert images.read(1, draft=200).size == (640, 480)


def test_an_image_that_vanishes_later(tmp_path: Path, make_domain_folder: Make) -> None:
    root = make_domain_folder(tmp_path / "data", count=1)
    images = load_images(root)
    (root / "art" / "cat" / "0000.png").unlink()
    with pytest.raises(EdgekdError, match="cannot be now: missing"):
        images.read(0)


@pytest.mark.parametrize("damage", ["text", "truncated", "columns twice", "a time out of range"])
def test_parquet_that_nothing_can_use_is_one_sentence(tmp_path: Path, damage: str) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "m.parquet"
    table = pyarrow.table({"path": ["a.png"], "label": ["cat"]})
    if damage == "columns twice":
        table = table.append_column("path", pyarrow.array(["b.png"]))
    if damage == "a time out of range":
        odd = pyarrow.array([2**62]).cast(pyarrow.timestamp("us"))
        table = table.append_column("domain", odd)
    pyarrow.parquet.write_table(table, path)
    whole = path.read_bytes()
    if damage in ("text", "truncated"):
        path.write_bytes(b"path,label" if damage == "text" else whole[: len(whole) // 2])
    assert str(path) in str(refusal(path))
