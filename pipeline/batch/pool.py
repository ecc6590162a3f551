"""Worker processes under supervision: one that dies or hangs costs its item, not the run.

Each worker gets items one by one through a pipe, some ahead so that it can read the next while it
computes. The supervisor has one thread, so that it can fork at any time.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Protocol, TypeVar

from pipeline.errors import PipelineError, RunStoppedError
from pipeline.inference import keep_forks_computing
from pipeline.processes import without_working_folder

IN_FLIGHT = 3  # items per worker: one is read, one computed, one written
POLL_SECONDS = 0.25
GRACE_SECONDS = 30.0  # for a worker that was asked to end: it finishes what it writes
END_AGAIN_SECONDS = 0.05
PR_SET_PDEATHSIG = 1  # of Linux's prctl

I = TypeVar("I", bound="Item")  # noqa: E741
R = TypeVar("R")
Emit = Callable[[Hashable, Any], None]


class WorkerEnd(BaseException):
    """Raised in a worker process that is asked to end; no failure of the item that it works on."""


class Item(Protocol):
    """What the pool needs to know of an item."""

    @property
    def name(self) -> Hashable:
        """Identifies the item."""

    @property
    def alone(self) -> bool:
        """Whether no other item may be under way in the same process."""


class Source(Protocol[I]):  # type: ignore[misc]
    """Where items come from."""

    def take(self, *, alone: bool) -> I | None:
        """Return the next item; None where there is none at the moment.

        Args:
            alone: whether an item that must be alone may be returned.
        """

    @property
    def exhausted(self) -> bool:
        """Whether no item will come any more, as far as is known."""


class Work(Protocol):
    """What a worker does, in its own process."""

    def start(self, number: int, threads: int) -> None:
        """Settle what is quickly settled; called once, before any item is there.

        Args:
            number: of the worker, from 0; one that replaces a dead one gets its number.
            threads: that the worker may use.
        """

    def run(self, items: Iterator[Any], emit: Emit, ready: Callable[[], None]) -> None:
        """Do items until there are no more, and emit the name and the result of each.

        Args:
            items: waits for the next item.
            emit: sends a result.
            ready: is called once the work is prepared. Items may be read before, but none that
                must be alone: if a worker dies with one before it is ready, no item is to blame.
        """


@dataclass(frozen=True, slots=True)
class Finished(Generic[R]):
    """A result came.

    Attributes:
        name: of the item.
        result: what the worker emitted.
    """

    name: Hashable
    result: R


@dataclass(frozen=True, slots=True)
class Died(Generic[I]):
    """A worker died; its items have no result.

    Attributes:
        items: the oldest first.
        why: how it died.
    """

    items: tuple[I, ...]
    why: str


@dataclass(frozen=True, slots=True)
class TimedOut(Generic[I]):
    """A worker was killed because its oldest item took too long.

    Attributes:
        item: that item.
        others: the items that the worker had as well.
    """

    item: I
    others: tuple[I, ...]


@dataclass
class _Worker(Generic[I]):
    number: int
    process: Any
    connection: Connection
    started: bool = False
    ready: bool = False
    in_flight: dict[Hashable, I] = field(default_factory=dict)
    since: float = 0.0  # when the oldest item became the oldest
    error: BaseException | None = None


class Pool(Generic[I]):
    """Worker processes and their supervisor.

    Args:
        work: what a worker does. A forked worker gets it as it is, a spawned one pickled.
        jobs: number of workers.
        threads: per worker.
        timeout: seconds that an item may take; None for no limit.
        start_method: `fork`, `forkserver` or `spawn`.
    """

    def __init__(
        self,
        work: Work,
        *,
        jobs: int,
        threads: int,
        timeout: float | None = None,
        start_method: str = "spawn",
    ) -> None:
        self.work, self.jobs, self.threads, self.timeout = work, jobs, threads, timeout
        self._context: Any = multiprocessing.get_context(start_method)
        if start_method == "fork":
            keep_forks_computing()  # whatever opened the bundle, or came before, has used torch
        elif start_method == "forkserver":
            self._context.set_forkserver_preload(["pipeline.batch"])
        self._workers: list[_Worker[I]] = []

    def run(
        self,
        source: Source[I],
        on_event: Callable[[Finished[Any] | Died[I] | TimedOut[I]], None],
        on_tick: Callable[[], None],
    ) -> None:
        """Do all items of a source.

        Args:
            source: gives the items.
            on_event: called with what happens, in the caller's thread.
            on_tick: called several times a second; what it raises ends the run.

        Raises:
            PipelineError: what a worker cannot go on after.
        """
        try:
            while self.step(source, on_event):
                on_tick()
        finally:
            self.close(on_event)

    def step(
        self, source: Source[I], on_event: Callable[[Finished[Any] | Died[I] | TimedOut[I]], None]
    ) -> bool:
        """Give out items and wait a moment for what happens; return False when all are done."""
        self._fill(source)
        if not any(worker.in_flight for worker in self._workers) and source.exhausted:
            return False
        self._wait(on_event)
        return True

    def kill(self) -> None:
        """Kill all workers at once."""
        for worker in self._workers:
            worker.process.kill()

    def close(self, on_event: Callable[[Finished[Any] | Died[I] | TimedOut[I]], None]) -> None:
        """End all workers; results that are on the disk already are still reported."""
        for worker in self._workers:
            with suppress(OSError, ValueError):
                worker.connection.send(None)
            if worker.in_flight and worker.process.is_alive():
                worker.process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in self._workers:
            while worker.process.is_alive() and time.monotonic() < deadline:
                worker.process.join(POLL_SECONDS)
                self._receive(worker, on_event)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            self._receive(worker, on_event)
            worker.connection.close()
        self._workers.clear()

    def _fill(self, source: Source[I]) -> None:
        """Give items to workers that have room, and start workers while there are items."""
        for _ in range(IN_FLIGHT):  # one item per worker and round, so that all get some
            for number in range(self.jobs):
                worker = self._workers[number] if number < len(self._workers) else None
                if worker is not None and not _has_room(worker):
                    continue
                item = source.take(alone=worker is None or not worker.in_flight)
                if item is None:
                    return
                if worker is None:
                    worker = self._start()
                self._send(worker, item)

    def _send(self, worker: _Worker[I], item: I) -> None:
        if not worker.in_flight:
            worker.since = time.monotonic()
        worker.in_flight[item.name] = item
        # a worker that has died shows at its sentinel
        with suppress(OSError):
            worker.connection.send(item)

    def _start(self) -> _Worker[I]:
        taken = {worker.number for worker in self._workers}
        number = next(n for n in range(self.jobs) if n not in taken)
        ours, theirs = self._context.Pipe()
        others = [worker.connection for worker in self._workers]
        process = self._context.Process(
            target=_worker_main,
            args=(self.work, theirs, number, self.threads, self._parent),
            # a forked process inherits the other workers' pipes, and would keep them open
            kwargs={"inherited": [*others, ours] if self._forks else []},
            name="volseg-worker",
            daemon=True,
        )
        with without_working_folder():
            process.start()
        theirs.close()
        worker: _Worker[I] = _Worker(number=number, process=process, connection=ours)
        self._workers.append(worker)
        return worker

    @property
    def _parent(self) -> int | None:
        """Process that a worker's parent must be; None for a server, which dies with this one."""
        return None if self._context.get_start_method() == "forkserver" else os.getpid()

    @property
    def _forks(self) -> bool:
        return bool(self._context.get_start_method() == "fork")

    def _wait(self, on_event: Callable[[Finished[Any] | Died[I] | TimedOut[I]], None]) -> None:
        """Wait for messages, deaths or timeouts."""
        waitables: list[Any] = []
        for worker in self._workers:
            waitables += [worker.connection, worker.process.sentinel]
        if waitables:
            wait(waitables, timeout=POLL_SECONDS)
        else:
            time.sleep(POLL_SECONDS)
        for worker in list(self._workers):
            self._receive(worker, on_event)
            if not worker.process.is_alive():
                self._receive(worker, on_event)  # what it sent before it died
                self._bury(worker, on_event)
            elif self._is_late(worker):
                self._kill_late(worker, on_event)

    def _receive(
        self,
        worker: _Worker[I],
        on_event: Callable[[Finished[Any] | Died[I] | TimedOut[I]], None],
    ) -> None:
        try:
            while worker.connection.poll():
                kind, content = worker.connection.recv()
                if kind == "started":
                    worker.started = True
                elif kind == "ready":
                    worker.ready, worker.since = True, time.monotonic()
                elif kind == "error":
                    worker.error = content
                else:
                    name, result = content
                    worker.in_flight.pop(name, None)
                    worker.since = time.monotonic()
                    on_event(Finished(name, result))
        except (EOFError, OSError):
            return

    def _bury(
        self,
        worker: _Worker[I],
        on_event: Callable[[Finished[Any] | Died[I] | TimedOut[I]], None],
    ) -> None:
        self._workers.remove(worker)
        worker.connection.close()
        worker.process.join()
        if worker.error is not None:
            raise worker.error
        why = _death(worker.process.exitcode)
        items = tuple(worker.in_flight.values())
        # no item had been read, so that none is to blame
        if not worker.started or (not worker.ready and all(item.alone for item in items)):
            raise RunStoppedError(f"a worker process could not start: {why}")
        on_event(Died(items, why))

    def _is_late(self, worker: _Worker[I]) -> bool:
        if self.timeout is None or not worker.ready or not worker.in_flight:
            return False
        return time.monotonic() - worker.since > self.timeout

    def _kill_late(
        self,
        worker: _Worker[I],
        on_event: Callable[[Finished[Any] | Died[I] | TimedOut[I]], None],
    ) -> None:
        worker.process.kill()
        worker.process.join()
        self._receive(worker, on_event)
        self._workers.remove(worker)
        worker.connection.close()
        items = tuple(worker.in_flight.values())
        if items:
            on_event(TimedOut(items[0], items[1:]))


def _has_room(worker: _Worker[Any]) -> bool:
    alone = any(item.alone for item in worker.in_flight.values())
    return not alone and len(worker.in_flight) < IN_FLIGHT


def _death(exit_code: int | None) -> str:
    """Return how a process ended, in words."""
    if exit_code is None or exit_code >= 0:
        return f"it ended with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    if name == "SIGKILL":
        return "it was killed (SIGKILL): most often because the machine ran out of memory"
    if name == "SIGSEGV":
        return "it crashed (SIGSEGV, a segmentation fault)"
    return f"it crashed ({name})"


def _worker_main(
    work: Work,
    connection: Connection,
    number: int,
    threads: int,
    parent: int | None,
    *,
    inherited: list[Connection],
) -> None:
    """Run in a worker process: receive items, do them, send results."""
    for pipe in inherited:
        pipe.close()
    # Ctrl-C goes to all processes of a terminal; the supervisor decides what ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    sys.unraisablehook = _end_later
    _die_with(parent)
    sending = threading.Lock()

    def send(kind: str, content: Any = None) -> None:
        with sending:
            connection.send((kind, content))

    def items() -> Iterator[Any]:
        while (item := _next_item(connection)) is not None:
            yield item

    try:
        work.start(number, threads)
        send("started")
        work.run(
            items(), lambda name, result: send("result", (name, result)), lambda: send("ready")
        )
    except PipelineError as error:
        with suppress(OSError):
            send("error", error)
    except WorkerEnd as end:
        sys.exit(end.args[0])


def _next_item(connection: Connection) -> Any:
    try:
        return connection.recv()
    except (EOFError, OSError):  # the supervisor is gone
        return None


def _end(number: int, frame: object) -> None:
    raise WorkerEnd(128 + number)


def _end_later(unraisable: Any) -> None:
    """End a worker where Python has dropped the exception that should, as in a `__del__`."""
    if isinstance(unraisable.exc_value, WorkerEnd):
        threading.Timer(END_AGAIN_SECONDS, os.kill, [os.getpid(), signal.SIGTERM]).start()
    else:
        sys.__unraisablehook__(unraisable)


def _die_with(parent: int | None) -> None:
    """Have this process killed when its parent dies, where the system can (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent not in (None, os.getppid()):  # it died before
        os._exit(1)
