"""Work of one case beside that of the next: reading ahead and writing behind, each in a thread of its own, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetch(
    function: Callable[[T], R], items: Sequence[T], *, beside: bool
) -> Iterator[tuple[T, Future[R]]]:
    """Each item with a function's result to come; `beside` starts on the next item while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        queue: deque[Future[R]] = deque()
        for number, item in enumerate(items):
            while len(queue) <= beside and number + len(queue) < len(items):
                queue.append(pool.submit(function, items[number + len(queue)]))
            yield item, queue.popleft()


def write_behind(function: Callable[[T], None], items: Iterable[T], *, beside: bool) -> None:
    """Calls a function of each item, in order; `beside` lets the next item be made meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        last: Future[None] | None = None
        for item in items:
            if last is not None:
                last.result()
            last = pool.submit(function, item)
            if not beside:
                last.result()
        if last is not None:
            last.result()
