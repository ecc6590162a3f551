"""Three stages at work at the same time: read the next item, compute this one, write the last."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")


class _Stop(BaseException):
    """Ends a thread whose neighbour has ended."""


class _Channel(Generic[T]):
    """A queue from one stage to the next that holds one item, and can be closed."""

    def __init__(self) -> None:
        self._items: queue.Queue[T | None] = queue.Queue(1)
        self._closed = threading.Event()

    def put(self, item: T | None) -> None:
        while not self._closed.is_set():
            try:
                self._items.put(item, timeout=0.2)
                return
            except queue.Full:
                continue
        raise _Stop

    def get(self) -> T | None:
        while not self._closed.is_set():
            try:
                return self._items.get(timeout=0.2)
            except queue.Empty:
                continue
        raise _Stop

    def close(self) -> None:
        self._closed.set()


def run_stages(
    items: Iterable[T],
    read: Callable[[T], A],
    compute: Callable[[A], B],
    write: Callable[[B], None],
    *,
    concurrent: bool,
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Pass each item through three functions, in order.

    Args:
        items: is iterated in the thread that reads.
        read: runs in a thread of its own, at most one item ahead of `compute`.
        compute: runs in the caller's thread.
        write: runs in a thread of its own.
        concurrent: whether the stages overlap; else each item is finished before the next begins.
        prepare: runs once in the caller's thread, before it computes; the first item is read
            meanwhile, if the stages overlap.

    Raises:
        BaseException: what a stage raised; the items that wait are dropped, a write is finished.
    """
    if concurrent:
        _Stages(items, read, compute, write, prepare).run()
        return
    prepare()
    for item in items:
        write(compute(read(item)))


class _Stages(Generic[T, A, B]):
    """The three stages and what they share."""

    def __init__(
        self,
        items: Iterable[T],
        read: Callable[[T], A],
        compute: Callable[[A], B],
        write: Callable[[B], None],
        prepare: Callable[[], None],
    ) -> None:
        self.items, self.read, self.compute, self.write = items, read, compute, write
        self.prepare = prepare
        self.ahead: _Channel[A] = _Channel()
        self.behind: _Channel[B] = _Channel()
        # a channel alone would let a second item be read ahead
        self.may_read = threading.Semaphore(1)
        self.errors: list[BaseException] = []

    def run(self) -> None:
        # a read that hangs must not keep an interrupted process alive
        reader = threading.Thread(target=self._guarded, args=(self._reading,), daemon=True)
        writer = threading.Thread(target=self._guarded, args=(self._writing,), daemon=True)
        reader.start()
        writer.start()
        self._guarded(self._computing)
        writer.join()
        if self.errors:
            raise self.errors[0]
        reader.join()

    def _guarded(self, stage: Callable[[], None]) -> None:
        try:
            stage()
        except _Stop:
            return
        except BaseException as error:
            self.errors.append(error)
            self.ahead.close()
            self.behind.close()

    def _reading(self) -> None:
        for item in self.items:
            while not self.may_read.acquire(timeout=0.2):
                if self.errors:
                    raise _Stop
            self.ahead.put(self.read(item))
        self.ahead.put(None)

    def _computing(self) -> None:
        self.prepare()
        while (item := self.ahead.get()) is not None:
            self.may_read.release()
            self.behind.put(self.compute(item))
            del item  # or it would be held while the next one is computed
        self.behind.put(None)

    def _writing(self) -> None:
        while (item := self.behind.get()) is not None:
            self.write(item)
            del item  # or it would be held until the next one comes
