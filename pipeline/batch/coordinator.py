"""The tasks of a run: who gets which case next, and what follows when a process died.

One coordinator serves all ways to run: in this process, in worker processes, on a cluster.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.batch.case_worker import Task, failed_record
from pipeline.batch.claims import Claims, Death
from pipeline.batch.failures import CaseTimeoutError, WorkerDiedError
from pipeline.batch.log_file import append_log
from pipeline.batch.outputs import LOG, OutputFolder
from pipeline.batch.records import CaseRecord, read_record, record_time, write_record
from pipeline.batch.suspects import Suspect, clear_suspect, count_death

WAIT_SECONDS = 0.5  # between two looks at a case that another run has claimed
Progress = Callable[[CaseRecord], None]


@dataclass
class _Waiting:
    """A task whose case another run has claimed."""

    task: Task
    looked: float


class Coordinator:
    """Gives out the tasks of a run, one claim each, and keeps account of what became of them.

    Several threads may call it.

    Args:
        out: the output folder.
        claims: of this run.
        identity: of the folder's results.
        progress: called with the record of each case, in any thread, one at a time.
    """

    def __init__(
        self,
        out: OutputFolder,
        claims: Claims,
        identity: Mapping[str, str],
        progress: Progress | None = None,
    ) -> None:
        self.out, self.claims, self.identity = out, claims, identity
        self.progress = progress
        self.counts: dict[str, int] = {}
        self.stopped = False
        self.unplanned = 0  # cases that were not looked at yet
        self._queue: deque[Task] = deque()
        self._last: deque[Task] = deque()  # those that must be alone come last
        self._waiting: deque[_Waiting] = deque()
        self._under_way: dict[str, Task] = {}
        self._lock = threading.RLock()

    def add(self, tasks: Sequence[Task]) -> None:
        """Add tasks to be given out; those that must be alone in their process come last."""
        for task in tasks:
            (self._last if task.alone else self._queue).append(task)

    @property
    def remaining(self) -> int:
        """Cases that are not done yet."""
        with self._lock:
            waiting = len(self._queue) + len(self._last) + len(self._waiting)
            return self.unplanned + waiting + len(self._under_way)

    @property
    def exhausted(self) -> bool:
        """Whether no task will be given out any more, as far as is known."""
        with self._lock:
            return self.stopped or not (self._queue or self._last or self._waiting)

    def take(self, *, alone: bool = True) -> Task | None:
        """Claim a case and return its task; None where there is none at the moment.

        Args:
            alone: whether a task that must be alone may be given out.
        """
        with self._lock:
            while not self.stopped:
                task = self._next(alone=alone)
                if task is None:
                    return None
                task = self._claimed(task)
                if task is not None:
                    self._under_way[task.name] = task
                    return task
        return None

    def tasks(self) -> Iterator[Task]:
        """Yield tasks until there are no more; waits for cases that other runs have claimed."""
        while not self.exhausted:
            task = self.take()
            if task is not None:
                yield task
            elif not self.exhausted:
                time.sleep(WAIT_SECONDS)

    def finished(self, name: str, record: CaseRecord | None) -> None:
        """Account for a task that a worker has done, or has left to the run that took it over."""
        if record is not None:
            self.finish(record)
            return
        with self._lock:
            task = self._under_way.pop(name, None)
            if task is not None:
                self._waiting.append(_Waiting(task, time.monotonic()))

    def finish(self, record: CaseRecord) -> None:
        """Account for a case whose record is on the disk."""
        with self._lock:
            self._under_way.pop(record.case, None)
            if not record.is_failure:
                clear_suspect(self.out, record.case)
            self.claims.release(record.case)
            self.report(record)

    def report(self, record: CaseRecord) -> None:
        """Count a record, log it and show it."""
        with self._lock:
            self.counts[record.status] = self.counts.get(record.status, 0) + 1
            detail = record.error or "; ".join(record.warnings)
            text = f"{record.status} {record.case}" + (f": {detail}" if detail else "")
            append_log(self.out.root / LOG, text)
            if self.progress is not None:
                self.progress(record)

    def failed(self, task: Task, error: BaseException, *, quarantined: bool = False) -> None:
        """Write the record of a case that no worker can write."""
        record = failed_record(task, self.identity, error)
        if quarantined:
            record = replace(record, status="quarantined")
        write_record(self.out, record)
        self.finish(record)

    def timed_out(self, task: Task, seconds: float) -> None:
        """Account for a case that was killed because it took too long."""
        message = f"took longer than --case-timeout allows, {seconds:g} s; it was killed"
        if not self._was_recorded(task):
            self.failed(task, CaseTimeoutError(message))

    def died(self, tasks: Sequence[Task], why: str) -> None:
        """Account for the tasks of a process that died: each is tried again alone, or given up."""
        append_log(self.out.root / LOG, f"a process died with {len(tasks)} cases: {why}")
        for task in tasks:
            if self._was_recorded(task):
                continue
            suspect = count_death(self.out, task.name, why, lost=False)
            if suspect.is_given_up:
                self.give_up(task, suspect)
            else:
                self.give_back([replace(task, alone=True, reason="the process died")])

    def _was_recorded(self, task: Task) -> bool:
        """Account for a task whose process ended after its record was written, if it was."""
        record = self._newer_record(task)
        if record is not None:
            self.finish(record)
        return record is not None

    def _newer_record(self, task: Task) -> CaseRecord | None:
        """Return the record of a task's case if it was written since the run began."""
        record = read_record(self.out.record(task.name))
        newer = record_time(self.out, task.name) != task.record_time
        return record if newer else None

    def give_up(self, task: Task, suspect: Suspect) -> None:
        """Write that a case is not tried again."""
        self.failed(task, WorkerDiedError(suspect.reason()), quarantined=True)

    def give_back(self, tasks: Sequence[Task]) -> None:
        """Take back tasks that were not done, to be given out again."""
        with self._lock:
            for task in tasks:
                self._under_way.pop(task.name, None)
                self.claims.release(task.name)
            self.add(tasks)

    def drop(self) -> None:
        """Give out nothing more, and end the claims of what is under way."""
        with self._lock:
            self.stopped = True
            for name in self._under_way:
                self.claims.release(name)

    def _next(self, *, alone: bool) -> Task | None:
        if self._queue:
            return self._queue.popleft()
        if self._last and alone:
            return self._last.popleft()
        if self._waiting and time.monotonic() - self._waiting[0].looked >= WAIT_SECONDS:
            task = self._waiting.popleft().task
            if alone or not task.alone:
                return task
            self._last.append(task)
        return None

    def _claimed(self, task: Task) -> Task | None:
        """Claim a task's case; None where another run has it or has done it."""
        taken = self.claims.take(task.name)
        if isinstance(taken, Death):
            if taken.by_restart:
                self.add([task])
                return None
            why = "the whole run died"
            suspect = count_death(self.out, task.name, why, lost=True)
            if suspect.is_given_up:
                if self.claims.take(task.name) is True:
                    self.give_up(task, suspect)
                else:
                    self._waiting.append(_Waiting(task, time.monotonic()))
                return None
            self.add([replace(task, alone=True)])
            return None
        if not taken:
            self._waiting.append(_Waiting(task, time.monotonic()))
            return None
        record = self._newer_record(task)
        if record is not None:  # another run has done it since this one looked
            self.claims.release(task.name)
            self.report(replace(record, status="skipped") if not record.is_failure else record)
            return None
        return task


def remaining_text(count: int) -> str:
    """Return what to do about cases that a run left undone."""
    return (
        f"{count} cases are not done; start the same command again: it continues with them"
        if count
        else "all cases are done"
    )
