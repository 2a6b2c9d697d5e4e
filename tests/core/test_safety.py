"""Files, names and addresses as an attacker would write them: one sentence, and nothing outside is touched."""

from __future__ import annotations

import copy
import functools
import io
import json
import operator
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifact_fakes import CLASSES as RGB
from artifact_fakes import write_artifact, write_colours, write_run
from device_fakes import result_of, run_agent, write_images, write_job

from edgekd.core.errors import EdgekdError
from edgekd.core.files import cache_folder, csv_text, read_index, write_index
from edgekd.core.manifest import read_artifact, read_run
from edgekd.core.readers import (
    map_array,
    parse_json,
    plain_path,
    printable,
    read_array,
    read_arrays,
    read_json,
    read_toml,
    read_yaml,
)
from edgekd.core.tensors import read_tensors
from edgekd.data.image_set import load_images
from edgekd.data.split import make_split, read_split
from edgekd.distill.inputs.batches import open_store
from edgekd.distill.inputs.cache import EmbeddingCache
from edgekd.evaluation.suites import SuiteBuilder
from edgekd.targets.agent.job import Job, parse_job, read_job
from edgekd.targets.agent.model import read_manifest
from edgekd.targets.agent.store import read_step, receive, write_step
from edgekd.targets.bank import read_bank
from edgekd.targets.bank_change import change_bank
from edgekd.targets.devices.payload import Payload, write_agent, write_bundle
from edgekd.targets.devices.result import StoredResult, check_result, open_result
from edgekd.targets.devices.transports import find_device

Make = Callable[..., Path]

OUTSIDE = [
    "../outside", "a/../../outside", "/etc/outside", "", ".", "a//b", "a/./b", "C:outside", "c:/outside",
    "..\\outside", "a\\b", "a\0b", "a\nb", "a\x1b[31m", "a/" * 600 + "b", "x" * 300,
]  # fmt: skip
WRONG: list[Any] = [
    None, True, "\x1b[31mred", -1, 2**63, 1.5, [], ["a", 1, None], {"a": {"b": 1}},
    "__big", "__nan", "__infinite", "__deep", "__deleted", "__surrogate",
]  # fmt: skip
LITERAL = {
    "__big": "1" + "0" * 9999,
    "__nan": "NaN",
    "__infinite": "1e999",
    "__deep": "[" * 5000 + "]" * 5000,
    "__surrogate": r'"\ud800"',
}


def hostile(value: Any, *, most: int = 2) -> Iterator[tuple[str, str]]:
    """Label and JSON text of `value` with one of its fields replaced by something else."""
    for place in _places(value, (), most):
        for wrong in WRONG:
            changed = copy.deepcopy(value)
            inner = changed
            for part in place[:-1]:
                inner = inner[part]
            if wrong == "__deleted":
                del inner[place[-1]]
            else:
                inner[place[-1]] = wrong
            text = json.dumps(changed)
            for name, literal in LITERAL.items():
                text = text.replace(f'"{name}"', literal)
            yield f"{place} = {wrong!r}", text


def _places(value: Any, place: tuple[Any, ...], most: int) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    if isinstance(value, dict):
        for name in list(value)[:30]:
            yield from _places(value[name], (*place, name), most)
    elif isinstance(value, list):
        for index in range(min(most, len(value))):
            yield from _places(value[index], (*place, index), most)


def survives(path: Path, attempt: Callable[[], object]) -> None:
    """Every mutation of the JSON at `path` is read, or refused with an `EdgekdError`."""
    before = path.read_text()
    for label, text in hostile(json.loads(before)):
        path.write_text(text)
        try:
            attempt()
        except EdgekdError:
            pass
        except Exception as error:
            pytest.fail(f"{path.name}: {label}: {error!r}")
    path.write_text(before)


def change(folder: Path, **fields: Any) -> None:
    data = json.loads((folder / "artifact.json").read_text())
    (folder / "artifact.json").write_text(json.dumps(data | fields))


# Readers


DEEP = "[" * 50_000
UNUSABLE = {
    "json": (
        "{", b"\xff\xfe", "[" * 100_000, '{"a":' * 65 + "1" + "}" * 65, "1" * 10_000, str(2**64), str(-(2**63) - 1),
        "NaN", "-Infinity", "1e999", r'["\ud800"]',
    ),
    "toml": ("a = ", f"a = {DEEP}", "a = " + "9" * 5000, "a = nan", f"a = {2**64}"),
    "yaml": (
        f"a: {DEEP}", "- " * 65, "a: " + "b" * 10**6, "a: &a [*a]", "a: !!python/name:os.system", "a: [", "a: .nan",
        f"a: {2**64}",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("read", "kind"), [(read_json, "json"), (read_toml, "toml"), (read_yaml, "yaml")]
)
def test_text_that_nothing_can_use_is_one_sentence(
    tmp_path: Path, read: Callable[[Path, str], object], kind: str
) -> None:
    for content in UNUSABLE[kind]:
        (tmp_path / "a").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(EdgekdError, match="note"):
            read(tmp_path / "a", "note")
    for content in UNUSABLE["json"]:
        with pytest.raises(ValueError):  # noqa: PT011  of json, or ours
            parse_json(content)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    for name in ("pipe", "gone", ".", "a\0b"):
        for read in (read_json, read_toml, read_arrays, read_array, read_tensors):
            with pytest.raises(EdgekdError):
                read(tmp_path / name, "thing")
    with pytest.raises(EdgekdError, match="not a regular file"):
        read_json(Path("/dev/zero"), "thing")


def npy(shape: str = "(3,)", descr: str = "'<f4'", data: bytes = b"\0" * 12) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def npz(member: bytes, *, compressed: bool = False, name: str = "a.npy") -> bytes:
    buffer = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(
            zipfile.ZipInfo(name), member, kind
        )  # without a date: it is in a test's name
    return buffer.getvalue()


def marked(data: bytes, place: int, value: int) -> bytes:
    """The same zip file with another byte `place` bytes into both headers of its member."""
    found = bytearray(data)
    found[place] = found[found.index(b"PK\x01\x02") + place + 2] = value
    return bytes(found)


@pytest.mark.parametrize(
    "content",
    [
        npz(npy())[:-30],
        npz(npy())[:40],
        b"PK\x03\x04" + bytes(range(200)),
        marked(npz(npy()), 6, 1),  # encrypted
        marked(npz(npy()), 8, 99),  # another compression
        npz(npy("(4000000000,)")),
        npz(npy("(99999999999999999999, 99999999)")),
        npz(npy("(-3,)")),
        npz(npy(descr="'|O'")),
        npz(npy("(1,)", "'<c8'", b"\0" * 8)),
        npz(npy(descr="[('a', '|O')]")),
        npz(npy("(" * 3000 + ")" * 3000)),
        npz(npy("__import__('os').getpid()")),
        npz(b"hello"),
    ],
)
def test_arrays_that_are_not_what_they_say_are_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(EdgekdError, match="result"):
        read_arrays(tmp_path / "a.npz", "result")


def test_a_small_file_does_not_fill_the_memory(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w", force_zip64=True) as member,
    ):
        member.write(npy(f"({1100 * 2**20},)", "'|u1'", b""))
        for _ in range(1100):
            member.write(bytes(2**20))
    with pytest.raises(EdgekdError, match="inflate"):
        read_arrays(tmp_path / "a.npz", "result")


def test_arrays_that_are_sound_come_back(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.int16).reshape(2, 3),
        "b": np.asfortranarray(np.random.default_rng(0).normal(size=(3, 4))),
        "c": np.array(["ä", "bc"]),
        "d": np.float32(2.5),
        "e": np.zeros((0, 4), dtype=np.float32),
        "f": np.array([True, False]),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
        found = read_arrays(tmp_path / "a.npz", "arrays")
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == np.asarray(array).dtype
    np.save(tmp_path / "b.npy", arrays["b"])
    np.testing.assert_array_equal(read_array(tmp_path / "b.npy", "array"), arrays["b"])
    np.save(tmp_path / "a.npy", arrays["a"])
    np.testing.assert_array_equal(map_array(tmp_path / "a.npy", "a", (2, 3), np.int16), arrays["a"])
    for wrong in (npy()[:-1], npy("(4000000000,)"), npy(descr="'|O'"), b""):
        (tmp_path / "a.npy").write_bytes(wrong)
        with pytest.raises(EdgekdError, match="array"):
            read_array(tmp_path / "a.npy", "array")


# Names


def test_names_of_folders_manifests_and_runs_cannot_drive_a_terminal(
    tmp_path: Path, make_image: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make_image(tmp_path / "data" / "art" / "cat\x1b[2J" / "a\x07.png", seed=1)
    make_image(tmp_path / "data" / "art" / "dog" / "b.png", seed=2)
    make_image(tmp_path / "data" / "pho\x1bto" / "dog" / "c.png", seed=3)
    found = load_images(tmp_path / "data")
    (tmp_path / "m.csv").write_text(
        "path,label,domain\ndata/art/dog/b.png,d\x1bog,a\x1b\ndata/art/dog/gone\x1b.png,x,b\n"
        "data/pho\x1bto/dog/c.png,c\x9bat,b\n"
    )
    listed = load_images(tmp_path / "m.csv")
    for images in (found, listed):
        names = [images.name, *images.classes, *images.domains, *images.ids]
        assert [printable(name) for name in names] == names
    assert found.classes == ("cat\\x1b[2J", "dog")
    assert np.asarray(found.read(0)).any()
    assert "\x1b" not in capsys.readouterr().err
    folder = write_run(
        tmp_path / "run", name="r\x1b[31m", classes=("a\x07", "b"), test_domain="d\u202e"
    )
    run = read_run(folder)
    assert (run.name, run.classes[0], run.test_domain) == ("r\\x1b[31m", "a\\x07", "d\\u202e")
    artifact = write_artifact(tmp_path / "artifact")
    change(artifact, name="a\x1b", classes=["r\x1b", "g", "b"], source={"domains": ["x\x1b"]})
    read = read_artifact(artifact)
    assert (read.name, read.classes[0]) == ("a\\x1b", "r\\x1b")
    assert read.source == {"domains": ["x\\x1b"]}
    assert printable("a\x1b[31m\n\u202eb\x9bc\u2028") == "a\\x1b[31m\\x0a\\u202eb\\x9bc\\u2028"
    for text in ("naïve", "猫", "می\u200cخواهم", "👩\u200d🔬", "a b"):
        assert printable(text) == text
    # Nor a spreadsheet.
    text = csv_text([("=1+1", "+a", "-a", "@a", "\ta", 'say "x", y'), (-1.5, 2, "a=b", "", None)])
    assert text == '\'=1+1,\'+a,\'-a,\'@a,\'\ta,"say ""x"", y"\n-1.5,2,a=b,,\n'


# Nothing is executed or written outside


@pytest.mark.parametrize("name", [*OUTSIDE, "link"])
def test_manifests_name_files_inside_their_folder_only(tmp_path: Path, name: str) -> None:
    if name != "link":
        with pytest.raises(ValueError, match="a"):
            plain_path(name)
    folder = write_colours(tmp_path / "artifact")
    secret = tmp_path / "outside"
    secret.write_bytes((folder / "bank.npz").read_bytes())
    (folder / "link").symlink_to(secret)
    data = json.loads((folder / "artifact.json").read_text())
    digest = data["files"]["bank.npz"]
    change(folder, files=data["files"] | {name: digest})
    for read in (read_artifact, read_manifest):
        with pytest.raises(EdgekdError):
            read(folder)
    change(folder, bank=name, files=data["files"] | {name: digest})
    with pytest.raises(EdgekdError):
        change_bank(folder, lambda bank: bank)
    with pytest.raises(EdgekdError):
        read_artifact(folder, check_hashes=False)
    assert secret.exists()


def test_the_agent_writes_and_removes_inside_its_root_only(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (tmp_path / "outside").write_text("mine")
    (root / "link").symlink_to(tmp_path)
    write_agent(tmp_path / "agent.pyz")
    for name in ("../outside", "link/outside"):
        with pytest.raises(EdgekdError):
            receive(root, name, 1, "0", io.BytesIO(b"x"))
        for words in (["probe", str(root), name], ["remove", str(root), name]):
            code, told = run_agent(sys.executable, tmp_path / "agent.pyz", *words)
            assert (code, "error" in told[-1]) == (2, True)
    assert (tmp_path / "outside").read_text() == "mine"
    files = {"agent": tmp_path / "agent.pyz", "../x": tmp_path / "outside"}
    with pytest.raises(EdgekdError):
        write_bundle(Payload(files, "job"), tmp_path / "b", "", [])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "spec",
    [
        "ssh://-Fconfig@host", "ssh://-oProxyCommand=x", "ssh://host:0", "ssh://host:99999", "ssh://a b", "ssh://h\n",
        "ssh://u@-h", "ssh://h;x", "ssh://ü@h", "ssh://h?x=1", "adb:-s", "adb:a b", "adb:", "adb:a\x1b", "adb:ä",
        "bundle", "local:/nowhere/python", "x\x1b",
    ],
)  # fmt: skip
def test_an_address_cannot_become_an_option(spec: str) -> None:
    with pytest.raises(EdgekdError) as caught:
        find_device(spec)
    assert "\x1b" not in str(caught.value)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result file as the agent wrote it."""
    root = tmp_path_factory.mktemp("measured")
    write_agent(root / "agent.pyz")
    job = write_job(root, write_images(root / "images", 6))
    code, told = run_agent(sys.executable, root / "agent.pyz", "run", str(job))
    assert code == 0, told
    return job / "edgekd-result.npz"


def wrong(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a path."""
    changed = copy.deepcopy(value)
    functools.reduce(operator.getitem, path[:-1], changed)[path[-1]] = new
    return changed


def test_a_result_is_believed_in_no_field(measured: Path, tmp_path: Path) -> None:
    arrays, facts = read_step(measured)
    job = open_result(measured).job
    refused = 0
    for label, text in hostile(facts, most=1):
        try:
            told = parse_json(text)
            check_result(StoredResult(measured, parse_job(told.get("job")), arrays, told), job)
        except (EdgekdError, ValueError):
            refused += 1
        except Exception as error:
            pytest.fail(f"{label}: {error!r}")
    assert refused > 500
    before = ("environment", "before")
    for path, value in (
        ((*before, "throttle_flags"), "hot"), ((*before, "throttle_flags"), ""), ((*before, "load_average"), 1e300),
        ((*before, "load_average"), -1.0), ((*before, "cpu_mhz"), -2400.0), ((*before, "throttle_count"), -1),
        # A foreign job is refused before its steps are expanded.
        (("job", "protocol", "processes"), 10**9), (("job", "protocol", "runs"), -1), (("job", "threads"), 1.5),
        (("job", "artifacts", 0, "name"), "x" * 10**6), (("job", "artifacts", 0, "folder"), "../x"),
        (("job", "image_file"), "/etc/x"), (("job", "grid"), [[1, 1]] * 10**5), (("job", "artifacts"), []),
        (("job", "protocol", "processes"), 2),
    ):  # fmt: skip
        write_step(tmp_path / "r.npz", arrays, wrong(facts, path, value))
        with pytest.raises(EdgekdError):
            check_result(open_result(tmp_path / "r.npz"), job)


def test_times_and_logits_are_finite_and_of_their_kind(measured: Path, tmp_path: Path) -> None:
    arrays, facts = read_step(measured)
    for name, x in arrays.items():
        for other in (
            np.full(x.shape, np.nan), -x.astype(np.float64) - 1, x.astype(np.complex128), x[:1], x.astype(str), x[None],
        ):  # fmt: skip
            write_step(tmp_path / "r.npz", arrays | {name: other}, facts)
            with pytest.raises(EdgekdError):
                result_of(tmp_path / "r.npz")


def test_manifests_splits_and_jobs_with_any_wrong_field(
    measured: Path, tmp_path: Path, make_domain_folder: Make
) -> None:
    folder = write_colours(tmp_path / "artifact")
    for read in (read_manifest, read_artifact):
        survives(folder / "artifact.json", lambda read=read: read(folder))  # type: ignore[misc]
    write_run(tmp_path / "run")
    survives(tmp_path / "run" / "run.json", lambda: read_run(tmp_path / "run"))
    images = load_images(make_domain_folder(tmp_path / "data", count=3))
    make_split(images).write(tmp_path / "split.json")
    survives(tmp_path / "split.json", lambda: read_split(tmp_path / "split.json", images))
    (tmp_path / "job.json").write_text(open_result(measured).job.to_json())
    survives(tmp_path / "job.json", lambda: read_job(tmp_path))
    assert isinstance(read_job(tmp_path), Job)


def test_a_bank_of_other_arrays(tmp_path: Path) -> None:
    folder = write_colours(tmp_path / "artifact")
    arrays = read_arrays(folder / "bank.npz", "bank")
    about = json.loads(str(arrays["about"]))
    others: list[dict[str, Any]] = [
        {"vectors": np.zeros(3)}, {"vectors": np.full((2, 3), np.nan)}, {"vectors": np.array("x")},
        {"classes": np.array(["a"])}, {"classes": np.array("a")}, {"logit_scale": np.array([1.0, 2.0])},
        {"logit_scale": np.array(np.inf)}, {"about": np.array("[" * 5000)}, {"about": np.array("[]")},
        {"about": np.array(json.dumps(about | {"added": [{"class": "gone"}]}))}, {"text_mean": np.zeros(5)},
        {"about": np.array(json.dumps(about | {"added": "x"}))}, {"logit_scale": np.array("x")},
    ]  # fmt: skip
    for arrays_now in others:
        np.savez(tmp_path / "b.npz", **(arrays | arrays_now))  # type: ignore[arg-type]
        with pytest.raises(EdgekdError):
            read_bank(tmp_path / "b.npz")


def test_a_row_that_is_no_regular_file_is_never_opened(
    tmp_path: Path, make_image: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog"):
        make_image(tmp_path / name / "a.png", seed=len(name) + ord(name[0]))
    os.mkfifo(tmp_path / "pipe.png")
    rows = "cat/a.png,cat dog/a.png,dog /dev/zero,cat pipe.png,cat cat,dog a\0b.png,dog"
    (tmp_path / "m.csv").write_text("\n".join(["path,label", *rows.split(" ")]))
    assert len(load_images(tmp_path / "m.csv")) == 2
    assert "4 × not a regular file" in capsys.readouterr().err


def test_stored_pixels_that_are_damaged_are_made_again(
    tmp_path: Path, own_cache: Path, make_domain_folder: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    images = load_images(make_domain_folder(tmp_path / "data", count=2))
    before = np.array(open_store(images, 24).batch(np.arange(4)))
    [path] = (own_cache / "pixels").glob("*.npy")
    checksum, whole = path.with_name(f"{path.name}.crc32"), path.read_bytes()
    damages: list[tuple[Callable[[], object], bool]] = [
        (lambda: path.write_bytes(whole[:200]), True),
        (lambda: path.write_bytes(b"x" * 5000), True),
        (lambda: np.save(path, np.zeros((2, 24, 24, 3), dtype=np.uint8)), True),
        (lambda: np.save(path, np.load(path)[::-1]), True),
        (lambda: checksum.write_bytes(b"\xff"), True),
        (checksum.unlink, False),  # of a version before
    ]
    for damage, warned in damages:
        damage()
        np.testing.assert_array_equal(open_store(images, 24).batch(np.arange(4)), before)
        assert ("warning" in capsys.readouterr().err) is warned
        assert path.read_bytes() == whole


def flipped(content: bytes) -> bytes:
    """Return a content whose last digit is another."""
    at = max(content.rfind(digit) for digit in b"01234567")
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("packed", [False, True])
def test_an_index_of_images_that_is_damaged_is_made_again(
    tmp_path: Path, own_cache: Path, make_domain_folder: Make, packed: bool, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    data = make_domain_folder(tmp_path / "data", count=2)
    if packed:
        with tarfile.open(tmp_path / "data.tar", "w") as tar:
            for number, path in enumerate(sorted(data.rglob("*.png"))):
                tar.add(path, f"{number}.png")
                label = tarfile.TarInfo(f"{number}.cls")
                label.size = 1
                tar.addfile(label, io.BytesIO(b"%d" % (number % 2)))
        data = tmp_path / "data.tar"
    keys = load_images(data).keys
    [path] = (own_cache / "index").iterdir()
    whole = path.read_bytes()
    for damaged in (b"[" * 5000, b"", whole[:-9], flipped(whole)):
        path.write_bytes(damaged)
        assert load_images(data).keys == keys
        assert "damaged" in capsys.readouterr().err
        assert path.read_bytes() == whole
    # A sound index of something else.
    write_index("a", {"x": [1, "2"]})
    assert read_index("a", dict[str, tuple[int, str]]) == {"x": (1, "2")}
    assert read_index("a", dict[str, tuple[int, int]]) is None


@pytest.mark.slow
def test_more_shards_than_a_process_may_open(own_cache: Path) -> None:
    cache = EmbeddingCache("t", "p", 4)
    for number in range(70):
        cache.add([f"{number:032x}"], [0], np.full((1, 4), number, dtype=np.float32))
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from edgekd.distill.inputs.cache import EmbeddingCache\n"
        "cache = EmbeddingCache('t', 'p', 4)\n"
        "print(cache.lookup([f'{n:032x}' for n in range(70)], [0] * 70)[:, 0].sum())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == sum(range(70))


def test_a_cache_that_is_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", Path("/dev/null/x"), Path("/proc/edgekd")):
        monkeypatch.setenv("EDGEKD_CACHE", str(place))
        with pytest.raises(EdgekdError, match="EDGEKD_CACHE"):
            cache_folder("embeddings")


def test_images_of_one_class_are_a_test_set(tmp_path: Path, make_image: Make) -> None:
    for number in range(3):
        make_image(tmp_path / "data" / "g" / f"{number}.png", seed=number)
    [suite] = SuiteBuilder(RGB).folder("x", str(tmp_path / "data"))
    assert suite.images.classes == RGB
    assert suite.labels.tolist() == [1, 1, 1]
    with pytest.raises(EdgekdError, match="only one class"):
        load_images(tmp_path / "data")


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("{} list targets 2>&- <&-", {"HOME": "/nowhere", "COLUMNS": "20", "NO_COLOR": "1"}),
        ("{} verify nowhere 2>&1 >&- | grep -q nowhere", {}),
        ("{} list targets | head -1", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    ],
)  # fmt: skip
def test_an_odd_environment_is_no_traceback(line: str, settings: dict[str, str]) -> None:
    command = ["bash", "-c", line.format(f"{sys.executable} -m edgekd.cli")]
    environment = os.environ | settings
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
