from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from edgekd.core.errors import EdgekdError
from edgekd.core.files import cache_folder
from edgekd.distill.inputs.cache import EmbeddingCache, cached_tensors, fill

DIM = 3

KEYS = [f"{number:032x}" for number in range(1, 21)]

PAIRS = [(i, view) for i in range(20) for view in range(2)]


def expected(position: int, view: int) -> list[float]:
    """A made-up teacher's answer, exact in 16 bits."""
    return [float(position), float(view), position * 4.0 + view]


def answer(positions: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.float32]:
    rows = [expected(i, v) for i, v in zip(positions, views, strict=True)]
    return np.array(rows, dtype=np.float32)


def opened() -> EmbeddingCache:
    return EmbeddingCache("teacher", "policy", DIM)


def fill_all(cache: EmbeddingCache) -> None:
    fill(cache, cache.missing(KEYS, range(2)), KEYS, answer, batch=3, shard_rows=8)
    cache.refresh()


def check(cache: EmbeddingCache) -> None:
    got = cache.lookup([KEYS[i] for i, _ in PAIRS], [view for _, view in PAIRS])
    assert got.dtype == np.float32
    assert got.tolist() == [expected(*pair) for pair in PAIRS]
    assert not cache.missing(KEYS, range(2))


def files(kind: str) -> list[Path]:
    return sorted(cache_folder("embeddings").glob(f"*/*.{kind}.npy"))


def test_what_is_stored_is_found_by_teacher_policy_image_and_view(own_cache: Path) -> None:
    cache = opened()
    cache.add(KEYS[:4], [1] * 4, answer(np.arange(4), np.ones(4, dtype=np.int64)))
    cache.refresh()
    assert cache.missing(KEYS[:3], range(2)) == [(0, 0), (1, 0), (2, 0)]
    fill_all(cache)
    check(cache)
    check(opened())
    assert [len(np.load(path)) for path in files("keys")].count(8) == 4
    assert cache.folder.parent == own_cache / "embeddings"
    assert len(EmbeddingCache("teacher", "another", DIM)) == 0
    assert len(EmbeddingCache("another", "policy", DIM)) == 0


def test_keys_are_written_last(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies_after_the_first(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        raise KeyboardInterrupt

    cache = opened()
    with monkeypatch.context() as patch:
        patch.setattr("edgekd.distill.inputs.cache.write_bytes", dies_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            cache.add(KEYS[:1], [0], np.ones((1, DIM), dtype=np.float32))
    assert len(files("vectors")) == 1
    assert not files("keys")


@pytest.mark.parametrize("kind", ["keys", "vectors"])
@pytest.mark.parametrize("damage", ["truncated", "another shape", "other values", "gone"])
def test_a_damaged_shard_is_left_out_with_a_warning_and_computed_again(
    own_cache: Path, kind: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_all(opened())
    path = files(kind)[2]
    if damage == "gone":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        shape = np.zeros((3, 2), dtype=np.float16)
        np.save(path, shape if damage == "another shape" else np.load(path)[::-1])
    capsys.readouterr()
    cache = opened()
    without_keys = (kind, damage) == ("keys", "gone")  # then there is no shard
    assert ("damaged cache shard" in capsys.readouterr().err) is not without_keys
    assert len(cache) == 32
    fill_all(cache)
    check(opened())


def test_a_foreign_shard_is_computed_again(own_cache: Path) -> None:
    fill_all(opened())
    for kind in ("keys", "vectors"):  # as edgekd's first versions named them
        path = files(kind)[0]
        path.rename(path.with_name(f"{'0' * 16}.{kind}.npy"))
    assert len(opened()) == 32
    other = EmbeddingCache("other teacher", "policy", DIM)
    other.add(KEYS[:8], [0] * 8, np.ones((8, DIM), dtype=np.float32))
    for path in other.folder.glob("*.npy"):
        path.rename(opened().folder / path.name)
    cache = opened()
    fill_all(cache)
    check(cache)


@pytest.mark.parametrize("damage", ["other numbers", "no checksum", "torn"])
def test_outputs_of_a_network_are_computed_once_for_the_same_facts_unless_damaged(
    own_cache: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def stored(value: float, facts: tuple[str, ...] = ("a", "b")) -> float:
        found = cached_tensors("kind-1", facts, lambda: {"x": torch.full((3,), value)})
        return float(found["x"].sum())

    assert (stored(1.0), stored(2.0)) == (3.0, 3.0)
    [path] = (own_cache / "vl").glob("*.safetensors")
    assert stored(2.0, ("a", "c")) == 6.0
    if damage == "no checksum":
        save_file({"x": torch.zeros(3)}, path)
    else:
        path.write_bytes(
            b"torn" if damage == "torn" else path.read_bytes()[:-4] + np.float32(7).tobytes()
        )
    assert stored(2.0) == 6.0
    assert "computed again" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_what_is_not_finite_in_16_bits_is_refused(own_cache: Path, value: float) -> None:
    cache = opened()
    vectors = np.ones((3, DIM), dtype=np.float32)
    vectors[1, 2] = value
    with pytest.raises(EdgekdError, match=KEYS[1]):
        cache.add(KEYS[:3], [0, 0, 0], vectors)
    assert not files("keys")
    assert not files("vectors")


def fill_slowly(cache_root: str, log: str) -> None:
    """In a process of its own: fill under the lock, writing down every row it computes."""
    os.environ["EDGEKD_CACHE"] = cache_root

    def embed(positions: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.float32]:
        time.sleep(0.01)
        with open(log, "a") as handle:
            handle.write("".join(f"{i} {v}\n" for i, v in zip(positions, views, strict=True)))
        return answer(positions, views)

    cache = opened()
    with cache.filling():
        fill(cache, cache.missing(KEYS, range(2)), KEYS, embed, batch=2, shard_rows=4)


@pytest.mark.slow
def test_two_runs_compute_every_view_once(own_cache: Path, tmp_path: Path) -> None:
    log, context = tmp_path / "log", multiprocessing.get_context("spawn")
    arguments = (str(own_cache), str(log))
    both = [context.Process(target=fill_slowly, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    computed = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
    assert sorted(computed) == PAIRS
    check(opened())
