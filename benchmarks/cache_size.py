"""Measure large caches of teacher embeddings: seconds to open, images/s of training batches, memory.

```
python benchmarks/cache_size.py --entries 10000,100000,1000000 --dim 512
```

For each size, write synthetic embeddings to a separate cache in a temporary folder, and read batches of random entries
as in training. Sizes are measured in turn, each in a separate process, and each number is the median over the rounds.
`anonymous_mb` is memory that is not backed by a file; the vectors themselves are mapped from disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHARD_ROWS = 2048
BATCH = 64
VIEWS = 4


def key(number: int) -> str:
    """Return a pseudo-random key with the length of a content hash."""
    number = int(number)
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}{number:016x}"


def anonymous_mb() -> float:
    """Return this process's memory that is not backed by a file, in MB."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) / 1000 if found else float("nan")


def write(entries: int, dim: int) -> None:
    """Fill the cache of `EDGEKD_CACHE`."""
    from edgekd.distill.inputs.cache import EmbeddingCache

    cache = EmbeddingCache("synthetic", "views", dim)
    rng = np.random.default_rng(0)
    for start in range(0, entries, SHARD_ROWS):
        rows = np.arange(start, min(start + SHARD_ROWS, entries))
        vectors = rng.standard_normal((len(rows), dim), dtype=np.float32)
        cache.add([key(row // VIEWS) for row in rows], [row % VIEWS for row in rows], vectors)


def measure(entries: int, dim: int, batches: int) -> dict[str, float]:
    """Open the cache of `EDGEKD_CACHE` and read batches."""
    from edgekd.distill.inputs.cache import EmbeddingCache

    before, started = anonymous_mb(), time.process_time()
    cache = EmbeddingCache("synthetic", "views", dim)
    opened = time.process_time() - started
    assert len(cache) == entries
    after_opening = anonymous_mb()
    rng = np.random.default_rng(1)
    drawn = rng.integers(0, entries, (batches, BATCH))
    work = [([key(n // VIEWS) for n in rows], (rows % VIEWS).tolist()) for rows in drawn]
    started = time.process_time()
    for keys, views in work:
        cache.lookup(keys, views)
    seconds = time.process_time() - started
    return {
        "entries": entries,
        "open_s": opened,
        "index_bytes_per_entry": 1e6 * (after_opening - before) / entries,
        "images_per_s": batches * BATCH / seconds,
        "anonymous_mb": anonymous_mb(),
        "grown_while_reading_mb": anonymous_mb() - after_opening,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--entries", default="10000,100000,1000000")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        task, entries = options.child.split(":")
        if task == "write":
            write(int(entries), options.dim)
        else:
            print(json.dumps(measure(int(entries), options.dim, options.batches)))
        return
    sizes = [int(size) for size in options.entries.split(",")]
    with tempfile.TemporaryDirectory() as folder:

        def child(task: str, size: int) -> str:
            words = [
                sys.executable,
                __file__,
                "--child",
                f"{task}:{size}",
                "--dim",
                str(options.dim),
            ]
            words += ["--batches", str(options.batches)]
            place = {"EDGEKD_CACHE": f"{folder}/{size}"}
            return subprocess.run(
                words, env=os.environ | place, check=True, capture_output=True, text=True
            ).stdout

        for size in sizes:
            child("write", size)
        rounds = [
            [json.loads(child("read", size)) for size in sizes] for _ in range(options.rounds)
        ]
    for place, size in enumerate(sizes):
        found = [rows[place] for rows in rounds]
        print(
            json.dumps(
                {name: round(statistics.median(row[name] for row in found), 3) for name in found[0]}
                | {"entries": size}
            )
        )


if __name__ == "__main__":
    main()
