from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edgekd.core.errors import EdgekdError, did_you_mean
from edgekd.core.files import (
    cache_root,
    disk_errors,
    replacing,
    scratch_folder,
    short_hash,
    sweep,
    write_json,
    write_text,
)
from edgekd.core.readers import read_json, sha256_file
from edgekd.core.tensors import read_tensors, write_tensors


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with replacing(path) as scratch:
        scratch.write_text("half")
        assert not path.exists()
        scratch.write_text("whole")
    assert path.read_text() == "whole"
    assert names(path.parent) == ["a.txt"]


def test_a_failed_write_leaves_the_old_file_and_no_scrap(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with contextlib.suppress(RuntimeError), replacing(path) as scratch:
        scratch.write_text("new")
        raise RuntimeError("stop")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_replaces_a_full_folder(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with replacing(path) as scratch:
        scratch.mkdir()
        (scratch / "new.txt").write_text("new")
        assert names(path) == ["old.txt"]
    assert names(path) == ["new.txt"]
    assert names(tmp_path) == ["run"]


def test_only_old_scraps_of_the_very_path_are_swept(tmp_path: Path) -> None:
    scraps = [
        ".tmp-0123456789ab-a",
        ".tmp-0123456789ab-ba",
        ".tmp-0123456789ab-a-old",
        ".tmp-a",
        "a",
    ]
    for name in scraps:
        (tmp_path / name).write_text("half")
    sweep(tmp_path / "a")
    assert names(tmp_path) == sorted(scraps), "all of them are new"
    for name in scraps:
        os.utime(tmp_path / name, (0, 0))
    sweep(tmp_path / "a")
    assert names(tmp_path) == sorted(scraps[1:])


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM]
)
def test_a_full_or_locked_disk_is_an_error_of_its_own(tmp_path: Path, number: int) -> None:
    with pytest.raises(EdgekdError) as caught, disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


def test_a_full_disk_under_a_copied_folder_too(tmp_path: Path) -> None:
    collected = shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")])
    with pytest.raises(EdgekdError, match=r"The disk holding .* is full"), disk_errors(tmp_path):
        raise collected
    with pytest.raises(shutil.Error), disk_errors(tmp_path):
        raise shutil.Error("`a` and `a` are the same file")


def test_scratch_goes_and_a_full_temporary_place_is_called_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with scratch_folder() as folder:
        (folder / "a").write_text("a")
        assert folder.parent == tmp_path / "temporary"
    with (
        pytest.raises(EdgekdError, match="temporary is full"),
        replacing(tmp_path / "artifact"),
        scratch_folder(),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path / "temporary") == []


def test_json_goes_round(tmp_path: Path) -> None:
    value = {"name": "Bär", "list": [1, 2.5, None]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json", "thing") == value
    assert "Bär" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_equal_tensors_and_facts_are_equal_bytes(tmp_path: Path) -> None:
    """safetensors writes several entries of metadata in random order."""
    tensors = {name: torch.arange(3) * number for number, name in enumerate("cab")}
    facts = {name: {"z": 1, "a": ["Bär"]} for name in ["student", "recipe", "data", "seed"]}
    hashes = set()
    for number in range(20):
        names = sorted(facts, reverse=bool(number % 2))
        write_tensors(tmp_path / "t", tensors, {name: facts[name] for name in names})
        hashes.add(sha256_file(tmp_path / "t"))
    assert len(hashes) == 1
    assert read_tensors(tmp_path / "t", "tensors")[1] == facts
    save_file(tensors, tmp_path / "old", metadata={"student": "a", "recipe": "b"})
    assert read_tensors(tmp_path / "old", "tensors")[1] == {"student": "a", "recipe": "b"}
    save_file(tensors, tmp_path / "plain")
    assert read_tensors(tmp_path / "plain", "tensors")[1] == {}


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    assert short_hash("a", "bc") != short_hash("ab", "c")
    assert len(short_hash("a")) == 16


def test_the_cache_can_be_put_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKD_CACHE", str(tmp_path / "c"))
    assert cache_root() == tmp_path / "c"
    monkeypatch.delenv("EDGEKD_CACHE")
    assert "edgekd" in str(cache_root())


def test_the_closest_word_or_all_of_them() -> None:
    assert did_you_mean("mobilnetv3", ["mobilenetv3", "resnet18"]) == 'Did you mean "mobilenetv3"?'
    assert did_you_mean("zzz", ["b", "a"]) == "Known: a, b."
    many = did_you_mean("zzz", [f"w{i:02d}" for i in range(20)])
    assert many.endswith("w11, ….")
