from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import ImageSet, load_images
from edgekd.data.sources import absolute
from edgekd.data.sources.shards import expanded
from edgekd.data.subsets import run_split
from edgekd.data.unlabelled import load_unlabelled

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path: Path, make_domain_folder: Callable[..., Path]) -> Path:
    return make_domain_folder(tmp_path / "images", domains=("art", "photo"), count=5)


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.png"))


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def pack(folder: Path, shards: Path, facts: Callable[[Path], tuple[str, bytes]], n: int = 2) -> str:
    """Write the images of a folder in `n` shards; `facts` gives the ending and content of what lies beside each."""
    shards.mkdir()
    for number in range(n):
        with tarfile.open(shards / f"{number:03d}.tar", "w") as tar:
            for path in files_of(folder)[number::n]:
                stem = "-".join(path.relative_to(folder).with_suffix("").parts)
                ending, content = facts(path)
                add(tar, f"{stem}{ending}", content)
                add(tar, f"{stem}.png", path.read_bytes())
    return f"{shards}/{{000..{n - 1:03d}}}.tar"


def as_json(path: Path) -> tuple[str, bytes]:
    record = {"label": path.parent.name, "domain": path.parent.parent.name}
    return ".json", json.dumps(record).encode()


def content_of(images: ImageSet) -> dict[str, tuple[str, str, bytes]]:
    return {
        key: (
            images.classes[images.labels[i]],
            images.domains[images.domain_of[i]],
            images.read(i).tobytes(),
        )
        for i, key in enumerate(images.keys)
    }


def test_shards_of_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = pack(folder, tmp_path / "shards", as_json)
    packed, plain = load_images(spec), load_images(folder)
    assert content_of(packed) == content_of(plain)
    assert (packed.classes, packed.domains) == (plain.classes, plain.domains)
    some = pickle.loads(pickle.dumps(packed.at(np.array([7, 2]))))
    for index, whole in enumerate((7, 2)):
        assert some.read(index).tobytes() == packed.read(whole).tobytes()
        assert some.read(index, draft=8).size
    ours, theirs = (run_split(TrainConfig(), images).entries for images in (packed, plain))
    for role, part in theirs.items():
        assert set(ours[role].values()) == set(part.values())
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("read again"))
    assert content_of(load_images(spec)) == content_of(plain)


@pytest.mark.parametrize(("ending", "label"), [(".cls", "{index}"), (".txt", "{name}\n")])
def test_labels_by_number_or_name(folder: Path, tmp_path: Path, ending: str, label: str) -> None:
    def facts(path: Path) -> tuple[str, bytes]:
        name = path.parent.name
        return ending, label.format(index=["cat", "dog"].index(name), name=name).encode()

    spec = pack(folder, tmp_path / "shards", facts)
    (tmp_path / "shards" / "classes.txt").write_text("a cat\na dog\n")
    packed = load_images(spec)
    assert packed.classes == ("a cat", "a dog")
    assert np.bincount(packed.labels).tolist() == [10, 10]


def test_unlabelled_shards_need_no_labels_and_images_without_one_are_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = pack(folder, tmp_path / "shards", lambda path: (".md", b"nothing"))
    assert sorted(load_unlabelled(spec).keys) == sorted(load_unlabelled(folder).keys)
    with pytest.raises(EdgekdError):
        load_images(spec)
    assert "20 × no label" in capsys.readouterr().err


def extended(header: dict[str, str], content: bytes) -> bytes:
    """Return a tar member `x.png` behind a header of further fields."""
    member = tarfile.TarInfo("x.png")
    member.size, member.pax_headers = len(content), header
    blocks = member.tobuf(tarfile.PAX_FORMAT)
    return blocks + content + bytes(-len(content) % 512)


def long_names(count: int) -> bytes:
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 512
    return (member.tobuf(tarfile.GNU_FORMAT) + bytes(512)) * count


def test_patterns_of_shards() -> None:
    assert expanded("a/{08..11}.tar") == [f"a/{n}.tar" for n in ("08", "09", "10", "11")]
    assert expanded("{x,y}/{0..1}.tar") == ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]
    assert expanded("plain.tar") == ["plain.tar"]
    unbounded = ("{0..999999999}.tar", "{0..9999}{0..9999}.tar", "{a,b}" * 40 + ".tar")
    for wrong in ("{3..1}.tar", *unbounded):
        with pytest.raises(EdgekdError):
            expanded(wrong)
    assert absolute("memory://a/{0..1}.tar") == "memory://a/{0..1}.tar"
    assert Path(absolute("a/{0..1}.tar")).is_absolute()


def test_shards_elsewhere(folder: Path, tmp_path: Path) -> None:
    import fsspec

    local = pack(folder, tmp_path / "shards", as_json)
    store = fsspec.filesystem("memory")
    for path in (tmp_path / "shards").glob("*.tar"):
        store.pipe(f"/bucket/{path.name}", path.read_bytes())
    assert content_of(load_images("memory://bucket/{000..001}.tar")) == content_of(
        load_images(local)
    )
    with pytest.raises(EdgekdError):
        load_images("nosuchscheme://bucket/0.tar")


@pytest.fixture
def saved(folder: Path, tmp_path: Path) -> Path:
    """The images of the folder as a `datasets` folder with three splits."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    paths = files_of(folder)
    kinds = {
        "picture": datasets.Image(),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "domain": datasets.Value("string"),
    }
    rows = {
        "picture": [{"bytes": path.read_bytes(), "path": None} for path in paths],
        "label": [path.parent.name for path in paths],
        "domain": [path.parent.parent.name for path in paths],
    }
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    parts = {"train": range(0, 20, 2), "validation": range(1, 20, 4), "test": range(3, 20, 4)}
    whole = datasets.DatasetDict({name: table.select(part) for name, part in parts.items()})
    whole.save_to_disk(tmp_path / "saved")
    table.remove_columns("picture").save_to_disk(tmp_path / "without images")
    return tmp_path / "saved"


def test_a_dataset_on_disk(saved: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_images(f"hf:{saved}")
    assert content_of(found) == content_of(load_images(folder))
    assert [found.roles.count(role) for role in ("train", "val", "test")] == [10, 5, 5]
    part = load_images(f"hf:{saved}:train")
    assert (len(part), part.roles) == (10, None)
    assert pickle.loads(pickle.dumps(part.at(np.array([3])))).read(0).size == (40, 32)
    assert len(load_unlabelled(f"hf:{saved}:test")) == 5
    beside = saved.parent
    for wrong in (f"{saved}:tset", beside / "absent", folder, beside / "without images"):
        with pytest.raises(EdgekdError):
            load_images(f"hf:{wrong}")
    # A table whose offsets lead out of the file.
    [arrow] = (saved / "train").glob("*.arrow")
    lengths = [len(path.parent.parent.name) for path in files_of(folder)[::2]]
    offsets = np.cumsum([0, *lengths]).astype("<i4")
    damaged = offsets.copy()
    damaged[3] = -(10**6)
    content = arrow.read_bytes()
    assert offsets.tobytes() in content
    arrow.write_bytes(content.replace(offsets.tobytes(), damaged.tobytes()))
    with pytest.raises(EdgekdError, match="cannot be loaded"):
        load_images(f"hf:{saved}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EdgekdError) as caught:
        load_images("hf:somebody/pictures")
    assert "edgekd[datasets]" in caught.value.hint


def coco(folder: Path, path: Path, *more: tuple[str, int], **changes: Any) -> Path:
    """Annotate the images of `folder` and `more` of (file name, category); two images have a second category."""
    names, files = ["cat", "dog"], files_of(folder)
    listed = [(str(file.relative_to(folder)), 10 + names.index(file.parent.name)) for file in files]
    listed += more
    labels = [*((n, category) for n, (_, category) in enumerate(listed)), (0, 11), (1, 10)]
    record: dict[str, Any] = {
        "images": [{"id": n, "file_name": name} for n, (name, _) in enumerate(listed)],
        "categories": [{"id": 10 + n, "name": name} for n, name in enumerate(names)],
        "annotations": [{"image_id": n, "category_id": category} for n, category in labels],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record | changes))
    return path


@pytest.mark.parametrize("place", ["images/labels.json", "annotations/instances_images.json"])
def test_coco_annotations_label_whole_images(folder: Path, tmp_path: Path, place: str) -> None:
    found = load_images(coco(folder, tmp_path / place))
    plain = load_images(folder)
    assert (found.classes, len(found)) == (("cat", "dog"), 19)  # the first image has two categories
    labels = dict(zip(plain.keys, plain.labels, strict=True))
    assert all(labels[key] == label for key, label in zip(found.keys, found.labels, strict=True))
    # One file listed twice counts once with one category, and not at all with two.
    again = (("./art/cat/0001.png", 10), ("photo/dog/0004.png", 10))
    assert len(load_images(coco(folder, tmp_path / "images" / "twice.json", *again))) == 18


@pytest.mark.parametrize(
    "change",
    [
        {"images": None},
        {"categories": []},
        {"annotations": []},
        {"categories": [{"id": 10, "name": ""}, {"id": 11, "name": "dog"}]},
        {"categories": [{"id": 10, "name": "nan"}, {"id": 11, "name": "dog"}]},
        "../secret.png",
        "{}/secret.png",
        "a/../../secret.png",
    ],
    ids=str,
)
def test_a_coco_file_that_is_damaged_or_leads_out_is_refused(
    folder: Path, tmp_path: Path, change: Any, make_image: Callable[..., Path]
) -> None:
    make_image(tmp_path / "secret.png", seed=99)
    more, changes = (
        ([(change.format(tmp_path), 10)], {}) if isinstance(change, str) else ([], change)
    )
    with pytest.raises(EdgekdError):
        load_images(coco(folder, tmp_path / "images" / "labels.json", *more, **changes))


@pytest.mark.parametrize("place", ["shard", "manifest", "classes.txt"])
def test_a_text_is_no_name_of_a_class(folder: Path, tmp_path: Path, place: str) -> None:
    text = "x" * 100_000
    if place == "shard":
        data = pack(folder, tmp_path / "shards", lambda path: (".txt", text.encode()))
    elif place == "manifest":
        data = str(folder / "list.csv")
        rows = [f"{path},{path.parent.name}{text}" for path in files_of(folder)]
        Path(data).write_text("\n".join(["path,label", *rows]))
    else:
        data = str(folder)
        (folder / "classes.txt").write_text(f"{text}1\n{text}2\n")
    with pytest.raises(EdgekdError, match="characters") as caught:
        load_images(data)
    assert len(caught.value.message) < 500


def leading_back(images: bytes) -> bytes:
    """A member whose size leads back to the second one."""
    header = bytearray(tarfile.TarInfo("x.bin").tobuf(tarfile.USTAR_FORMAT))
    size = 1024 - (len(images) + 512)
    header[124:136] = b"\xff" + size.to_bytes(11, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return images + header + bytes(1024)


SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "no tar": lambda whole: b"no tar at all" * 100,
    "cut within an image": lambda whole: whole[: len(whole) // 2 // 512 * 512 + 100],
    "cut between images": lambda whole: whole,  # no end is marked
    "an archive of nothing": lambda whole: bytes(10240),
    "a circle": leading_back,
    "sparse map": lambda whole: extended({"GNU.sparse.map": "a,b"}, b"1") + whole,
    "sparse size": lambda whole: extended({"GNU.sparse.size": "many"}, b"1") + whole,
    "short sparse map": lambda whole: extended(SPARSE, (b"9" * 20 + b"\n").ljust(512, b"\0")) + whole,
    "nested names": lambda whole: long_names(3000) + whole,
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_shard_that_is_damaged_is_named(folder: Path, tmp_path: Path, damage: str) -> None:
    spec = pack(folder, tmp_path / "shards", as_json)
    shard = tmp_path / "shards" / "001.tar"
    members = shard.read_bytes().rstrip(b"\0")
    shard.write_bytes(DAMAGED[damage](members.ljust(-(-len(members) // 512) * 512, b"\0")))
    with pytest.raises(EdgekdError, match=r"001\.tar"):
        load_images(spec)
    shard.unlink()
    with pytest.raises(EdgekdError, match=r"001\.tar"):
        load_images(spec)


def test_odd_members(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = pack(folder, tmp_path / "shards", as_json, n=1)
    shard = tmp_path / "shards" / "000.tar"
    endless = SPARSE | {"GNU.sparse.realsize": str(1 << 40)}
    shard.write_bytes(extended(endless, b"0\n".ljust(512, b"\0")) + shard.read_bytes())
    with tarfile.open(shard, "a") as tar:
        add(tar, "torn.png", files_of(folder)[0].read_bytes()[:100])
        add(tar, "torn.json", b'{"label": "cat", "domain": "art"}')
        add(tar, "../../escape.json", b"{")
    assert len(load_images(spec)) == 20
    printed = capsys.readouterr().err
    assert "000/torn.png" in printed
    assert "not a regular file" in printed
