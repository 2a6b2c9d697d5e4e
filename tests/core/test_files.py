from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from edgekd.core import hub
from edgekd.core.errors import EdgekdError
from edgekd.core.files import disk_errors, replacing, scratch_folder, short_hash, sweep
from edgekd.core.preprocess import Preprocess
from edgekd.core.readers import sha256_file
from edgekd.core.tensors import read_tensors, write_tensors


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with replacing(path) as scratch:
        scratch.write_text("half")
        assert not path.exists()
        scratch.write_text("whole")
    with contextlib.suppress(RuntimeError), replacing(path) as scratch:
        scratch.write_text("new")
        raise RuntimeError("stop")
    assert path.read_text() == "whole"
    assert names(path.parent) == ["a.txt"]


def test_only_old_scraps_of_the_very_path_are_swept(tmp_path: Path) -> None:
    tmp = ".tmp-0123456789ab"
    scraps = [f"{tmp}-a", f"{tmp}-ba", f"{tmp}-a-old", ".tmp-a", "a"]
    for age, left in ((0, scraps), (3600, scraps), (1e6, scraps[1:])):
        for name in scraps:
            (tmp_path / name).write_text("half")
            os.utime(tmp_path / name, (time.time() - age,) * 2)
        sweep(tmp_path / "a")
        assert names(tmp_path) == sorted(left)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_full_or_locked_disk_is_an_error_of_its_own(tmp_path: Path, number: int) -> None:
    with pytest.raises(EdgekdError) as caught, disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint
    # As shutil reports it of a whole folder.
    collected = shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")])
    with pytest.raises(EdgekdError, match=r"The disk holding .* is full"), disk_errors(tmp_path):
        raise collected


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


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxy, no memory of earlier answers, and the switch of the hub client put back afterwards."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.hub_reachable.cache_clear()
    yield
    hub.hub_reachable.cache_clear()


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("status", [200, 405, None, "nowhere.invalid", "no address"])
def test_any_answer_is_reachable_and_none_sends_the_client_to_its_cache(
    status: int | str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(int(status or 0))
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.handle_request, daemon=True).start()
        if status is None:
            server.socket.close()
        monkeypatch.setattr(constants, "ENDPOINT", status if isinstance(status, str) else address)
        assert hub.hub_reachable() is isinstance(status, int)
    hub.prefer_local_cache()
    assert constants.HF_HUB_OFFLINE is not isinstance(status, int)
    # Offline by choice sends no request.
    hub.hub_reachable.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("a request was made"))
    assert not hub.hub_reachable()


def picture(width: int, height: int) -> Image.Image:
    """Smooth waves in three channels."""
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 4, height))
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1)
    return Image.fromarray((127.5 + 127.5 * waves).astype(np.uint8))


@pytest.mark.parametrize("size", [(60, 40), (48, 48), (40, 97), (33, 50), (51, 67), (200, 31)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_is_torchvisions_resize_and_centre_crop(
    size: tuple[int, int], interpolation: str
) -> None:
    image = picture(*size)
    preprocess = Preprocess(size=28, resize="crop", crop_pct=0.875, interpolation=interpolation)
    short = Resize(32, InterpolationMode(interpolation))
    expected = np.asarray(CenterCrop(28)(short(image)))
    assert np.array_equal(preprocess.pixels(image), expected)


def test_the_hash_changes_with_every_field() -> None:
    base = Preprocess(size=32)
    changes: list[dict[str, Any]] = [
        {"size": 33}, {"resize": "crop"}, {"crop_pct": 0.9}, {"interpolation": "bilinear"},
        {"mean": (0.5, 0.5, 0.5)}, {"std": (0.5, 0.5, 0.5)},
    ]  # fmt: skip
    assert len({base.hash, *(base.model_copy(update=change).hash for change in changes)}) == 7
    assert short_hash("a", "bc") != short_hash("ab", "c")
    assert Preprocess.model_validate_json(base.model_dump_json()) == base
    senseless: list[dict[str, Any]] = [
        {"size": 15}, {"size": 5000}, {"crop_pct": 0.0}, {"interpolation": "lanczos"}, {"std": (0.5, 0.0, 0.5)},
        {"mean": (0.5, float("nan"), 0.5)}, {"crop_pct": 1e-3},  # would resize to 1,000 times the size first
    ]  # fmt: skip
    for field in senseless:
        with pytest.raises(ValidationError):
            Preprocess.model_validate({"size": 32} | field)
