"""Caches of network outputs per picture, shared between runs.

Teacher embeddings of views: `<cache>/embeddings/<teacher id>-<policy id>/<shard>.{vectors,keys}.npy`. A shard is an
immutable pair: vectors float16 `[n, D]`, memory-mapped, and keys (16 bytes of content hash, uint16 view). The keys are
renamed into place last, so a shard is complete or does not exist. Its name is a checksum of content, teacher and
policy, so that damaged or foreign shards are detected and computed again. Processes of a run write disjoint shards.
Other outputs without augmentation: `<cache>/vl/<kind>-<hash>.safetensors`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from edgekd.configs.train import TrainConfig
from edgekd.core.console import say, warn
from edgekd.core.errors import EdgekdError
from edgekd.core.files import cache_folder, disk_errors, short_hash, write_bytes
from edgekd.core.readers import map_array, read_array
from edgekd.core.tensors import read_tensors, tensors_hash, write_tensors
from edgekd.data.image_set import ImageSet
from edgekd.distill.inputs.batches import open_store, pixel_batches, store_side
from edgekd.distill.inputs.views import Augmentation, plain
from edgekd.distill.launch import Fabric
from edgekd.distill.models.teachers import ClipTeacher, EmbeddingsTeacher, Teacher, has_bfloat16
from edgekd.distill.progress import counting

LEAST_COSINE = 0.999
"""Minimum cosine between embeddings in bfloat16 and float32 for using bfloat16."""
_CHECKED_IMAGES = 16
_SHARD_S = 60.0
_KEY = np.dtype([("image", "S32"), ("view", "<u2")])
_SORTED = np.dtype(f"S{_KEY.itemsize}")
"""A key as bytes, which can be sorted."""
_CHECKSUM = 32
"""Hexadecimal digits of a shard's name."""
_INFINITE = np.uint16(0x7C00)
"""The exponent of infinities and NaN in float16."""
Embed = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
"""`(positions or image indices int64 [b], views int64 [b])` → embeddings, float32 `[b, D]`."""


class EmbeddingCache:
    """All stored embeddings of one teacher under one view policy.

    Args:
        teacher_id: changes with the teacher's weights and preprocessing.
        policy_id: changes with the augmentation.
        dim: D.
    """

    def __init__(self, teacher_id: str, policy_id: str, dim: int) -> None:
        self.folder = cache_folder("embeddings") / f"{teacher_id}-{policy_id}"
        self.dim = dim
        self._shards: list[NDArray[np.float16]] = []
        # Sorted arrays instead of a dictionary: 42 bytes an entry instead of about 300.
        self._keys = np.zeros(0, dtype=_SORTED)
        self._places = np.zeros(0, dtype=np.int64)  # shard · 2³² + row
        self._seen: set[tuple[str, int, int]] = set()
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def refresh(self) -> None:
        """Open shards that other processes have finished."""
        found, places = [self._keys], [self._places]
        for keys_path in sorted(self.folder.glob(f"{'?' * _CHECKSUM}.keys.npy")):
            state = keys_path.stat()  # a damaged shard keeps its name when it is written again
            file = (keys_path.name, state.st_ino, state.st_mtime_ns)
            if file in self._seen:
                continue
            self._seen.add(file)
            try:
                keys, vectors = self._read(keys_path)
            except EdgekdError as error:
                warn(
                    f"ignoring the damaged cache shard {keys_path} ({error.message}); "
                    "its embeddings are computed again."
                )
                continue
            found.append(keys.view(_SORTED))
            places.append((len(self._shards) << 32) + np.arange(len(keys)))
            self._shards.append(vectors)
        if len(found) > 1:
            everything = np.concatenate(found)
            self._keys, first = np.unique(everything, return_index=True)
            self._places = np.concatenate(places)[first]

    def _read(self, keys_path: Path) -> tuple[NDArray[Any], NDArray[np.float16]]:
        """Return keys and memory-mapped vectors of a shard; raise `EdgekdError` if it is damaged."""
        keys = read_array(keys_path, "cache shard")
        path = keys_path.with_name(keys_path.name.replace(".keys.", ".vectors."))
        shape = (len(keys) if keys.shape else 0, self.dim)
        found = map_array(path, "cache shard", shape, np.float16)
        if keys.dtype != _KEY or keys.ndim != 1:
            raise EdgekdError(f"{keys_path} has no keys.")
        if ((found.view(np.uint16) & _INFINITE) == _INFINITE).any():
            raise EdgekdError(f"{path} has values that are not finite.")
        if keys_path.name.partition(".")[0] != self._checksum(keys, found):
            raise EdgekdError(f"{path} holds other numbers than were written.")
        # Mapped again by torch, which keeps no file open, since a large cache has more shards than a process may open.
        size = path.stat().st_size
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
        return keys, mapped[size - found.nbytes :].view(np.float16).reshape(shape)

    def _checksum(self, keys: NDArray[Any], vectors: NDArray[np.float16]) -> str:
        digest = hashlib.sha256(self.folder.name.encode())
        for part in (keys, vectors):
            digest.update(np.ascontiguousarray(part).data.cast("B"))
        return digest.hexdigest()[:_CHECKSUM]

    def __len__(self) -> int:
        return len(self._keys)

    def _find(self, wanted: NDArray[Any]) -> NDArray[np.int64]:
        """Return the places of records of `_KEY`, int64 `[n]`, −1 for missing ones."""
        if not len(self._keys):
            return np.full(len(wanted), -1)
        keys = wanted.view(_SORTED)
        at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._places[at], -1)

    def missing(self, keys: Sequence[str], views: Sequence[int]) -> list[tuple[int, int]]:
        """Return `(position in keys, view)` of every pair that is not stored."""
        count = len(views)
        pairs = _records(np.repeat(_encoded(keys), count), np.tile(views, len(keys)))
        absent = np.flatnonzero(self._find(pairs) < 0).tolist()
        return [(place // count, views[place % count]) for place in absent]

    def add(self, keys: Sequence[str], views: Sequence[int], vectors: NDArray[np.float32]) -> None:
        """Store one shard: `vectors[i]` float `[n, D]` belongs to view `views[i]` of image `keys[i]`.

        A vector that is not finite in float16, and a full disk, are an `EdgekdError`.
        """
        half = vectors.astype(np.float16)
        if not np.isfinite(half).all():
            bad = int(np.argmin(np.isfinite(half).all(axis=1)))
            raise EdgekdError(
                f"The teacher's embedding of image {keys[bad]} is not finite in 16 bits.",
                "Check the teacher's weights and that image.",
            )
        record = _records(_encoded(keys), np.asarray(views))
        name = self._checksum(record, half)
        for part, array in (("vectors", half), ("keys", record)):
            buffer = io.BytesIO()
            np.save(buffer, array)
            write_bytes(self.folder / f"{name}.{part}.npy", buffer.getbuffer())

    def lookup(self, keys: Sequence[str], views: Sequence[int]) -> NDArray[np.float32]:
        """Return the embeddings of view `views[i]` of image `keys[i]`, float32 `[len(keys), D]`. All must be stored."""
        places = self._find(_records(_encoded(keys), np.asarray(views)))
        if (places < 0).any():
            raise KeyError(keys[int(np.argmin(places))])
        vectors = np.empty((len(keys), self.dim), dtype=np.float32)
        shards, rows = places >> 32, places & 0xFFFFFFFF
        for shard in np.unique(shards):
            own = shards == shard
            vectors[own] = self._shards[shard][rows[own]]
        return vectors

    def embeddings(
        self, keys: Sequence[str], indices: NDArray[np.int64], views: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return the embeddings of views of images, float32 `[b, D]`; `keys` are of all images."""
        return self.lookup([keys[i] for i in indices], views.tolist())

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """Hold the lock for filling the cache. A second run waits for it and then has nothing to compute."""
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


def _encoded(keys: Sequence[str]) -> NDArray[np.bytes_]:
    return np.array(keys, dtype=_KEY["image"])


def _records(images: NDArray[np.bytes_], views: NDArray[Any]) -> NDArray[Any]:
    """Return records of `_KEY`, `[n]`."""
    records = np.empty(len(images), dtype=_KEY)
    records["image"], records["view"] = images, views
    return records


def fill(
    cache: EmbeddingCache,
    work: Sequence[tuple[int, int]],
    keys: Sequence[str],
    embed: Embed,
    *,
    batch: int = 64,
    shard_rows: int = 2048,
    on_progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Compute and store `work`, a list of `(image position, view)`.

    Args:
        shard_rows: rows per shard. A killed process loses at most one shard or a minute of work; a stopped one nothing.
        on_progress: called with the number of new rows.
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
    start = 0
    try:
        while start < len(work):
            size = min(batch, shard_rows - sum(map(len, done)))
            rows = np.array(work[start : start + size], dtype=np.int64)
            start += size
            vectors.append(embed(rows[:, 0], rows[:, 1]))
            done.append(rows)
            on_progress(len(rows))
            if sum(map(len, done)) >= shard_rows or time.monotonic() - since > _SHARD_S:
                store()
                since = time.monotonic()
    finally:
        store()


def fill_views(
    fabric: Fabric,
    cache: EmbeddingCache,
    teacher: ClipTeacher,
    augmentation: Augmentation,
    images: ImageSet,
    indices: NDArray[np.int64],
    views: int,
) -> None:
    """Embed the missing ones of the first `views` views of the images at `indices`; processes share the work."""
    keys = [images.keys[i] for i in indices]
    # Process 0 decides what is missing, since another run may add a shard at any time.
    if not fabric.broadcast(bool(cache.missing(keys, range(views)))):
        cache.refresh()
        say(f"teacher cache: all {len(keys) * views:,} views are cached, no teacher pass needed")
        return
    with cache.filling() if fabric.is_global_zero else contextlib.nullcontext():
        fabric.barrier()
        cache.refresh()
        missing = cache.missing(keys, range(views))
        fabric.barrier()  # no process may add a shard before all have counted
        work = missing[fabric.global_rank :: fabric.world_size]
        size = teacher.preprocess.size
        store = open_store(images, store_side(size))
        teacher.model.to(fabric.device)

        def embed(positions: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.float32]:
            pixels = torch.from_numpy(store.batch(indices[positions])).to(fabric.device)
            names = [keys[i] for i in positions]
            drawn = augmentation.for_teacher(pixels, names, chosen.tolist(), size)
            return teacher.embed_images(drawn).cpu().numpy()

        with counting(f"teacher passes ({teacher.spec})", len(missing), fabric) as advance:
            fill(cache, work, keys, embed, on_progress=lambda n: advance(n * fabric.world_size))
        fabric.barrier()
        cache.refresh()


def caching_teacher(
    fabric: Fabric,
    config: TrainConfig,
    teacher: ClipTeacher,
    images: ImageSet,
    indices: NDArray[np.int64],
    policy_id: str,
) -> ClipTeacher:
    """Return the teacher that fills the cache, in bfloat16 if the processor supports it and the embeddings agree.

    Existing float32 embeddings are used. The embeddings agree if the smallest cosine between the two precisions on the
    first images is at least `LEAST_COSINE`.

    Args:
        policy_id: identity of the views (`Augmentation.id`).
    """
    wanted = config.teacher_precision
    able = fabric.device.type == "cpu" and has_bfloat16()
    if wanted == "fp32" or (wanted == "auto" and not able):
        return teacher
    keys = [images.keys[i] for i in indices]
    before = EmbeddingCache(teacher.cache_id, policy_id, teacher.dim)
    if wanted == "auto" and not fabric.broadcast(bool(before.missing(keys, range(config.views)))):
        return teacher
    half = teacher.in_bfloat16()
    if wanted == "bf16" or len(EmbeddingCache(half.cache_id, policy_id, teacher.dim)):
        return half
    some = indices[:_CHECKED_IMAGES]
    views = plain(torch.from_numpy(next(pixel_batches(images, some, teacher.preprocess))))
    full, reduced = teacher.embed_images(views), half.embed_images(views)
    cosine = float(cosine_similarity(full, reduced, dim=-1).min())
    fits = fabric.broadcast(cosine >= LEAST_COSINE)
    shown = f"smallest cosine to float32 {cosine:.5f} on {len(some)} images"
    say(f"teacher: embeds in {'bfloat16' if fits else 'float32, not bfloat16'} ({shown})")
    return half if fits else teacher


def plain_embeddings(
    teacher: Teacher,
    images: ImageSet,
    indices: NDArray[np.int64],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the teacher's embeddings of images without augmentation, float32 `[len(indices), D]`, on the CPU."""
    if isinstance(teacher, EmbeddingsTeacher):
        return teacher.lookup([images.ids[i] for i in indices])
    teacher.model.to(device)
    batches = (torch.from_numpy(b) for b in pixel_batches(images, indices, teacher.preprocess))
    found = [teacher.embed_images(plain(batch.to(device))).cpu() for batch in batches]
    return torch.cat(found)


def caption_embeddings(fabric: Fabric, teacher: ClipTeacher, captions: Sequence[str]) -> Tensor:
    """Return the teacher's text embeddings of captions, float32 `[len(captions), D]`, cached like those of images."""
    cache = EmbeddingCache(teacher.id, "captions", teacher.dim)
    keys = [hashlib.sha256(caption.encode()).hexdigest()[:32] for caption in captions]
    if fabric.is_global_zero:
        with cache.filling():
            first = {key: place for place, key in reversed(list(enumerate(keys)))}
            work = [(first[key], 0) for key in first if cache.missing([key], [0])]
            if work:
                say(f"teacher's text embeddings of {len(work):,} captions")

            def embed(positions: NDArray[np.int64], _: NDArray[np.int64]) -> NDArray[np.float32]:
                return teacher.embed_texts([captions[i] for i in positions]).numpy()

            fill(cache, work, keys, embed)
    fabric.barrier()
    cache.refresh()
    return torch.from_numpy(cache.lookup(keys, [0] * len(keys)))


def cached_tensors(
    kind: str, facts: tuple[str, ...], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return `compute()`, or its cached result for the same `kind` and `facts`.

    `kind` names what is stored and the version of how it is computed, `facts` everything else that the values depend
    on.
    """
    path = cache_folder("vl") / f"{kind}-{short_hash(kind, *facts)}.safetensors"
    with disk_errors(path), FileLock(f"{path}.lock"):  # parallel runs compute once
        if path.exists():
            try:
                tensors, written = read_tensors(path, "stored outputs of a network")
                if written == {"sha256": tensors_hash(tensors)}:
                    return tensors
                raise EdgekdError(f"{path} holds other numbers than were written.")
            except EdgekdError as error:
                warn(f"{error.message} It is computed again.")
        values = compute()
        write_tensors(path, values, {"sha256": tensors_hash(values)})
        return values
