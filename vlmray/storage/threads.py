"""Reading and writing many files: threads wait for storage, one behind another in the order of the files."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

NUM_THREADS = 16
"""Requests to a file system at a time."""

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(fn: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Map in threads that are only a little ahead of the reader."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for item in items:
            waiting.append(pool.submit(fn, item))
            if len(waiting) > 2 * NUM_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
