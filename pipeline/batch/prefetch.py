"""Reading ahead and writing behind: each in a thread of its own, in the order of the cases."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetch(
    function: Callable[[T], R], items: Sequence[T], *, concurrent: bool
) -> Iterator[tuple[T, Future[R]]]:
    """Yield each item with the future of `function(item)`.

    Args:
        function: runs in a thread of its own, on one item at a time.
        items: in order.
        concurrent: whether the next item is started while the caller uses the present one.
    """
    ahead = 1 if concurrent else 0
    with ThreadPoolExecutor(1) as pool:
        queue: deque[Future[R]] = deque()
        for number, item in enumerate(items):
            while len(queue) <= ahead and number + len(queue) < len(items):
                queue.append(pool.submit(function, items[number + len(queue)]))
            yield item, queue.popleft()


def write_behind(function: Callable[[T], None], items: Iterable[T], *, concurrent: bool) -> None:
    """Call a function on each item, in order, in a thread of its own.

    Args:
        function: is called on one item at a time; what it raises is raised here.
        items: an iterator that computes them.
        concurrent: whether the next item is computed while the function runs.
    """
    with ThreadPoolExecutor(1) as pool:
        last: Future[None] | None = None
        for item in items:
            if last is not None:
                last.result()
            last = pool.submit(function, item)
            if not concurrent:
                last.result()
        if last is not None:
            last.result()
