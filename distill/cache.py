"""Teacher embeddings, computed once per view and shared by every run that needs them.

Layout: `<cache>/embeddings/<teacher id>-<policy id>/<shard>.{vectors,keys}.npy`. A shard is an immutable pair: vectors
float16 `[n, D]`, memory-mapped, and keys (16 bytes of image content hash, uint16 view). The keys are renamed into
place last, so a shard exists wholly or not at all, whoever is killed. Processes of one run fill disjoint shards.
"""

from __future__ import annotations

import contextlib
import io
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from edgekd.core.console import say, warn
from edgekd.core.errors import EdgekdError
from edgekd.core.files import cache_folder as folder_of
from edgekd.core.files import disk_errors, write_bytes
from edgekd.core.readers import map_array, read_array

UNAUGMENTED = 0xFFFF
"""The view number of the plain image."""

_SHARD_S = 60.0

_KEY = np.dtype([("image", "S32"), ("view", "<u2")])
_INFINITE = np.uint16(0x7C00)
"""The exponent of infinities and NaN in float16."""


class EmbeddingCache:
    """All stored embeddings of one teacher under one view policy.

    Args:
        teacher_id: changes with the teacher's weights and preprocessing.
        policy_id: changes with the augmentation.
        dim: D.
    """

    def __init__(self, teacher_id: str, policy_id: str, dim: int) -> None:
        self.folder = cache_folder() / f"{teacher_id}-{policy_id}"
        self.dim = dim
        self._shards: list[NDArray[np.float16]] = []
        self._where: dict[tuple[bytes, int], tuple[int, int]] = {}
        self._seen: set[str] = set()
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def refresh(self) -> None:
        """Take in shards that other processes have finished."""
        for keys_path in sorted(self.folder.glob("[!.]*.keys.npy")):
            if keys_path.name in self._seen:
                continue
            self._seen.add(keys_path.name)
            try:
                keys, vectors = self._read(keys_path)
            except EdgekdError as error:
                warn(
                    f"leaving out the damaged cache shard {keys_path} ({error.message}); "
                    "its embeddings are computed again."
                )
                continue
            shard = len(self._shards)
            self._shards.append(vectors)
            for row, (image, view) in enumerate(
                zip(keys["image"].tolist(), keys["view"].tolist(), strict=True)
            ):
                self._where[image, view] = (shard, row)

    def _read(self, keys_path: Path) -> tuple[NDArray[Any], NDArray[np.float16]]:
        """Keys and vectors of a shard; one that is damaged, or not finite, is an `EdgekdError`."""
        keys = read_array(keys_path, "cache shard")
        path = keys_path.with_name(keys_path.name.replace(".keys.", ".vectors."))
        shape = (len(keys) if keys.shape else 0, self.dim)
        found = map_array(path, "cache shard", shape, np.float16)
        if keys.dtype != _KEY or keys.ndim != 1:
            raise EdgekdError(f"{keys_path} holds no keys.")
        if ((found.view(np.uint16) & _INFINITE) == _INFINITE).any():
            raise EdgekdError(f"{path} holds values that are not finite.")
        # Mapped once more by torch, which keeps no file open: a large cache has more shards than a process may open.
        size = path.stat().st_size
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
        return keys, mapped[size - found.nbytes :].view(np.float16).reshape(shape)

    def __len__(self) -> int:
        return len(self._where)

    def missing(self, keys: Sequence[str], views: Sequence[int]) -> list[tuple[int, int]]:
        """`(position in keys, view)` of every pair that is not stored."""
        encoded = [key.encode() for key in keys]
        return [
            (i, view)
            for i, key in enumerate(encoded)
            for view in views
            if (key, view) not in self._where
        ]

    def add(self, keys: Sequence[str], views: Sequence[int], vectors: NDArray[np.float32]) -> None:
        """Store one shard: `vectors[i]` float `[n, D]` belongs to view `views[i]` of image `keys[i]`.

        Raises:
            EdgekdError: a vector is not finite, or too large for float16; the disk is full.
        """
        half = vectors.astype(np.float16)
        if not np.isfinite(half).all():
            bad = int(np.argmin(np.isfinite(half).all(axis=1)))
            raise EdgekdError(
                f"The teacher's embedding of image {keys[bad]} is not finite in 16 bits.",
                "Check the teacher's weights and that image.",
            )
        record = np.array(
            [(key.encode(), view) for key, view in zip(keys, views, strict=True)], dtype=_KEY
        )
        name = uuid.uuid4().hex[:16]
        for part, array in (("vectors", half), ("keys", record)):
            buffer = io.BytesIO()
            np.save(buffer, array)
            write_bytes(self.folder / f"{name}.{part}.npy", buffer.getbuffer())

    def lookup(self, keys: Sequence[str], views: Sequence[int]) -> NDArray[np.float32]:
        """Embeddings of view `views[i]` of image `keys[i]`, float32 `[len(keys), D]`. All must be stored."""
        vectors = np.empty((len(keys), self.dim), dtype=np.float32)
        for i, (key, view) in enumerate(zip(keys, views, strict=True)):
            shard, row = self._where[key.encode(), view]
            vectors[i] = self._shards[shard][row]
        return vectors

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """Hold the right to fill. A second run waits here and then finds the work done; a killed holder lets go."""
        lock = FileLock(self.folder / ".fill.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"another run is filling the cache {self.folder.name}; waiting for it")
            lock.acquire()
        try:
            self.refresh()
            yield
        finally:
            lock.release()


def fill(
    cache: EmbeddingCache,
    work: Sequence[tuple[int, int]],
    keys: Sequence[str],
    embed: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]],
    *,
    batch: int = 64,
    shard_rows: int = 2048,
    on_progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Compute and store `work`, a list of `(image position, view)`.

    Args:
        embed: `(positions int64 [b], views int64 [b])` → float32 `[b, D]`.
        shard_rows: rows per shard; a killed process loses these at most, or a minute's, one that is stopped none.
        on_progress: called with the number of rows just computed.
    """
    done: list[NDArray[np.int64]] = []
    vectors: list[NDArray[np.float32]] = []

    def store() -> None:
        if done:
            rows = np.concatenate(done)  # [n, 2]
            cache.add([keys[i] for i in rows[:, 0]], rows[:, 1].tolist(), np.concatenate(vectors))
            done.clear()
            vectors.clear()

    since = time.monotonic()
    try:
        start = 0
        while start < len(work):
            size = min(batch, shard_rows - sum(map(len, done)))
            rows = np.array(work[start : start + size], dtype=np.int64)
            start += size
            found = embed(rows[:, 0], rows[:, 1])
            done.append(rows)
            vectors.append(found)
            on_progress(len(rows))
            if sum(map(len, done)) >= shard_rows or time.monotonic() - since > _SHARD_S:
                store()
                since = time.monotonic()
    finally:
        store()


def cache_folder() -> Path:
    """Where all embedding caches live."""
    return folder_of("embeddings")
