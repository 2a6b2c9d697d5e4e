"""Map a function over a stream with threads that work ahead."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield the items in lists of `size`, the last one shorter."""
    remaining = iter(items)
    return iter(lambda: list(itertools.islice(remaining, size)), [])


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Yield `function(item)` for each item in order, computed by threads. Its exceptions are raised in order, too.

    Args:
        items: read on the caller's thread, as needed.
        ahead: number of items processed while the caller uses a result, at least 1; bounds the memory.
    """
    waiting: deque[Future[Result]] = deque()
    remaining = iter(items)
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for item in itertools.islice(remaining, ahead):
            waiting.append(pool.submit(function, item))
        while waiting:
            result = waiting.popleft().result()
            for item in itertools.islice(remaining, 1):
                waiting.append(pool.submit(function, item))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
