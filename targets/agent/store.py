"""The agent's folder on a device: what was sent, which steps are done, and who is at work.

A finished step is one file in `done/`, renamed into place. That folder is the journal: a step with a file is never run
again, a step without one is run from its beginning, so a device may lose power at any moment and nothing is counted
twice.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError
from edgekd.core.readers import inside, parse_json, read_arrays, read_errors, sha256_file

try:
    import fcntl
except ImportError:  # Windows: no lock between two agents on one job
    fcntl = None  # type: ignore[assignment]

Arrays = dict[str, NDArray[Any]]


def receive(root: Path, name: str, size: int, sha256: str, source: BinaryIO) -> None:
    """Append `source` to the partial file of `name` in `root` until it has `size` bytes, check it, and put it in place.

    Bytes that end early leave the partial file; those that were not announced are removed. Both are an `EdgekdError`.
    """
    path = inside(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "ab") as handle:
        while handle.tell() < size:
            block = source.read(min(1 << 16, size - handle.tell()))
            if not block:
                raise EdgekdError(
                    f"The copy of {path.name} stopped at {handle.tell()} of {size} bytes.",
                    "Try again.",
                )
            handle.write(block)
        handle.flush()
        os.fsync(handle.fileno())
    if sha256_file(part) != sha256:
        part.unlink()
        raise EdgekdError(f"{path.name} arrived damaged.", "Run the same command again.")
    os.replace(part, path)


def write_step(path: Path, arrays: Arrays, facts: dict[str, Any]) -> None:
    """Write a step's arrays and facts in one rename."""
    buffer = io.BytesIO()
    named = dict[str, Any](arrays)
    np.savez(buffer, **named, facts=np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path, buffer.getvalue()):
        pass


@contextlib.contextmanager
def written(path: Path, data: bytes) -> Iterator[None]:
    """Put `data` at `path` in one rename when the block ends; nothing when it raises."""
    scratch = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with open(scratch, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        yield
        os.replace(scratch, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            scratch.unlink()


def read_step(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Return the arrays and facts that `write_step` wrote; another file is an `EdgekdError`."""
    arrays = read_arrays(path, "result", "Copy it again, or measure again.")
    with read_errors(path, "result", "npz", "Copy it again, or measure again."):
        facts = parse_json(arrays.pop("facts").tobytes())
        if not isinstance(facts, dict):
            raise ValueError("its facts are not a JSON object")
    return arrays, facts


@contextlib.contextmanager
def only_one(job: Path) -> Iterator[Iterator[None]]:
    """Hold the job's lock; the kernel frees it when its holder dies.

    Yields:
        An iterator that ends when the lock is held and yields once a second while another agent holds it.
    """
    with open(job / "lock", "a+", encoding="ascii") as handle:

        def waiting() -> Iterator[None]:
            while fcntl is not None:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    yield
                    time.sleep(1.0)
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()

        yield waiting()


def holder(job: Path) -> int | None:
    """Process that holds the job's lock, None when nobody does."""
    if fcntl is None or not (job / "lock").exists():
        return None
    with open(job / "lock", encoding="ascii") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            text = handle.read().strip()
            return int(text) if text.isdigit() else None
    return None
