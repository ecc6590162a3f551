from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.batch.pool import IN_FLIGHT, Died, Emit, Finished, Pool, TimedOut
from pipeline.batch.stages import run_stages
from pipeline.errors import ConfigError, PipelineError, RunStoppedError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork")


@dataclass(frozen=True)
class Job:
    """An item: what a worker is to do with it is its action."""

    name: int
    action: str = "ok"
    alone: bool = False


class Jobs:
    """Gives out jobs; those that must be alone last. Counts what became of each."""

    def __init__(self, jobs: Sequence[Job], *, retry: bool = True) -> None:
        self.queue = deque(jobs)
        self.results: list[tuple[int, str]] = []
        self.deaths: list[tuple[int, ...]] = []
        self.whys: list[str] = []
        self.late: list[int] = []
        self.died_alone: list[int] = []
        self.retry = retry

    @property
    def exhausted(self) -> bool:
        return not self.queue

    def take(self, *, alone: bool) -> Job | None:
        if self.queue and (alone or not self.queue[0].alone):
            return self.queue.popleft()
        return None

    def on_event(self, event: Finished[Any] | Died[Job] | TimedOut[Job]) -> None:
        if isinstance(event, Finished):
            assert event.name == event.result[0]
            self.results.append(event.result)
            return
        if isinstance(event, TimedOut):
            self.late.append(event.item.name)
            self.queue.extendleft(reversed(event.others))
            return
        self.deaths.append(tuple(item.name for item in event.items))
        self.whys.append(event.why)
        for item in event.items:
            if item.alone:
                assert len(event.items) == 1
                self.died_alone.append(item.name)
            elif self.retry:
                self.queue.append(replace(item, alone=True))


@dataclass
class Work:
    """Does what the action of a job says, in three stages as a worker of a batch does."""

    start_action: str = "ok"

    def start(self, number: int, threads: int) -> None:
        act(self.start_action)

    def run(self, items: Iterator[Job], emit: Emit, ready: Callable[[], None]) -> None:
        def compute(job: Job) -> Job:
            act(job.action)
            return job

        def write(job: Job) -> None:
            emit(job.name, (job.name, str(os.getpid())))

        run_stages(items, lambda job: job, compute, write, concurrent=True, prepare=ready)


def act(action: str) -> None:
    faulthandler.disable()  # pytest's, which would print where SIGSEGV came
    if action.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, action))
    if action == "exit":
        os._exit(7)
    if action == "hang":
        time.sleep(60)
    if action == "config":
        raise ConfigError("this machine cannot do it")
    if action == "bug":
        raise ZeroDivisionError
    time.sleep(0.01)


def run(source: Jobs, **options: Any) -> Pool[Job]:
    settings: dict[str, Any] = {"jobs": 2, "threads": 1, "start_method": "fork"}
    work = options.pop("work", Work())
    tick = options.pop("tick", lambda: None)
    pool: Pool[Job] = Pool(work, **settings | options)
    pool.run(source, source.on_event, tick)
    return pool


def left_over() -> list[int]:
    """Return the worker processes that are still there."""
    import multiprocessing

    return [child.pid or 0 for child in multiprocessing.active_children()]


@pytest.mark.parametrize("jobs", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_each_item_has_one_result(count: int, jobs: int) -> None:
    """From the workers, which are gone afterwards; with one worker, in order."""
    source = Jobs([Job(number) for number in range(count)])
    run(source, jobs=jobs)
    names = [name for name, _ in source.results]
    assert sorted(names) == list(range(count))
    assert jobs > 1 or names == sorted(names)
    assert len({worker for _, worker in source.results}) <= jobs
    assert str(os.getpid()) not in {worker for _, worker in source.results}
    assert not left_over()


def test_all_workers_get_work() -> None:
    """With more items than workers can take at once."""
    source = Jobs([Job(number) for number in range(60)])
    run(source, jobs=3)
    assert len({worker for _, worker in source.results}) == 3


@pytest.mark.parametrize(
    ("action", "why"),
    [
        ("SIGKILL", "it was killed (SIGKILL): most often because the machine ran out of memory"),
        ("SIGSEGV", "it crashed (SIGSEGV, a segmentation fault)"),
        ("SIGABRT", "it crashed (SIGABRT)"),
        ("exit", "it ended with exit code 7"),
    ],
)
def test_a_death_costs_its_item_only(action: str, why: str) -> None:
    """Those that were under way in the same process are done alone; the bad one dies alone."""
    source = Jobs([Job(number, action if number == 5 else "ok") for number in range(20)])
    run(source)
    assert sorted(name for name, _ in source.results) == [n for n in range(20) if n != 5]
    assert source.died_alone == [5]
    assert len(source.deaths) == 2
    assert 5 in source.deaths[0]
    assert len(source.deaths[0]) <= IN_FLIGHT
    assert set(source.whys) == {why}
    assert not left_over()


def test_workers_that_die_at_every_item_do_not_end_the_run() -> None:
    """Each item is tried twice."""
    source = Jobs([Job(number, "exit") for number in range(6)])
    run(source, jobs=3)
    assert sorted(source.died_alone) == list(range(6))
    assert source.results == []


def test_an_item_that_hangs_is_stopped() -> None:
    """The others of the same process are done; the time counts from when an item is the oldest."""
    source = Jobs([Job(number, "hang" if number == 2 else "ok") for number in range(12)])
    begun = time.monotonic()
    run(source, timeout=1.0)
    assert time.monotonic() - begun < 15
    assert source.late == [2]
    assert sorted(name for name, _ in source.results) == [n for n in range(12) if n != 2]
    assert source.deaths == []


@dataclass
class Slow(Work):
    """Takes longer to start than an item may take."""

    def start(self, number: int, threads: int) -> None:
        time.sleep(1.5)


def test_the_start_of_a_worker_is_not_the_time_of_an_item() -> None:
    """A timeout below it stops nothing."""
    source = Jobs([Job(number) for number in range(4)])
    run(source, timeout=1.0, work=Slow())
    assert len(source.results) == 4
    assert source.late == []


@dataclass
class Overlaps(Work):
    """Emits how many items were under way while each was done."""

    def run(self, items: Iterator[Job], emit: Emit, ready: Callable[[], None]) -> None:
        taken: list[Job] = []
        done = 0

        def read(job: Job) -> Job:
            taken.append(job)
            return job

        def compute(job: Job) -> Job:
            time.sleep(0.05)
            return job

        def write(job: Job) -> None:
            nonlocal done
            emit(job.name, (job.name, len(taken) - done))
            done += 1

        run_stages(items, read, compute, write, concurrent=True, prepare=ready)


def test_items_that_must_be_alone_are_alone() -> None:
    """No other one is in their process, before or after; others overlap."""
    jobs = [Job(number) for number in range(8)]
    jobs += [Job(number, alone=True) for number in range(8, 14)]
    source = Jobs(jobs)
    run(source, work=Overlaps())
    overlap = {name: int(count) for name, count in source.results}
    assert set(overlap) == set(range(14))
    assert all(overlap[number] == 1 for number in range(8, 14))
    assert max(overlap[number] for number in range(8)) > 1


@pytest.mark.parametrize("action", ["SIGKILL", "exit", "bug"])
def test_a_worker_that_cannot_start_ends_the_run(action: str) -> None:
    """With the reason, instead of starting it for ever."""
    with pytest.raises(RunStoppedError, match="a worker process could not start"):
        run(Jobs([Job(1)]), work=Work(action))
    assert not left_over()


@dataclass
class Prepares(Work):
    """Reads while it prepares, which takes a moment or fails; it reads no item that is alone."""

    preparation: str = "wait"

    def run(self, items: Iterator[Job], emit: Emit, ready: Callable[[], None]) -> None:
        prepared = threading.Event()

        def prepare() -> None:
            time.sleep(0.3)
            act(self.preparation)
            ready()
            prepared.set()

        def read(job: Job) -> Job:
            if job.alone:
                prepared.wait()
            act(job.action)
            return job

        def write(job: Job) -> None:
            emit(job.name, (job.name, ""))

        run_stages(items, read, lambda job: job, write, concurrent=True, prepare=prepare)


@pytest.mark.parametrize("action", ["SIGKILL", "exit"])
def test_an_item_that_kills_while_the_worker_prepares_is_to_blame(action: str) -> None:
    """It is tried once more alone, after the preparation; the others are done."""
    source = Jobs([Job(number, action if number == 0 else "ok") for number in range(7)])
    run(source, work=Prepares())
    assert source.died_alone == [0]
    assert sorted(name for name, _ in source.results) == list(range(1, 7))


def test_a_preparation_that_kills_ends_the_run() -> None:
    """It dies again with an item that is alone, which had not been read."""
    source = Jobs([Job(number) for number in range(3)])
    with pytest.raises(RunStoppedError, match="a worker process could not start"):
        run(source, work=Prepares(preparation="SIGKILL"))
    assert source.died_alone == []
    assert not left_over()


def test_what_a_worker_cannot_go_on_after_ends_the_run() -> None:
    """An error that the user can fix comes out as it is, at the start and later."""
    with pytest.raises(ConfigError, match="this machine cannot do it"):
        run(Jobs([Job(1)]), work=Work("config"))
    with pytest.raises(PipelineError, match="this machine cannot do it"):
        run(Jobs([Job(number, "config" if number == 3 else "ok") for number in range(9)]))
    assert not left_over()


def test_an_error_of_ours_in_a_worker_is_a_death() -> None:
    """Its items are tried again alone."""
    source = Jobs([Job(number, "bug" if number == 3 else "ok") for number in range(9)])
    run(source)
    assert source.died_alone == [3]
    assert set(source.whys) == {"it ended with exit code 1"}


def test_what_the_tick_raises_ends_the_run_and_all_workers() -> None:
    """As a signal does; results that are ready are still reported."""
    source = Jobs([Job(number, "hang" if number == 6 else "ok") for number in range(9)])

    def tick() -> None:
        if len(source.results) >= 2:
            raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(source, tick=tick)
    assert time.monotonic() - begun < 10
    assert not left_over()
    assert source.deaths == []


class Stubborn:
    """Takes its time to be deleted, and what is raised meanwhile is dropped by Python."""

    def __del__(self) -> None:
        time.sleep(3)


@dataclass
class DeletesSlowly(Work):
    """Is asked to end while an object is deleted."""

    def run(self, items: Iterator[Job], emit: Emit, ready: Callable[[], None]) -> None:
        ready()
        for job in items:
            emit(job.name, (job.name, ""))
            stubborn = Stubborn()
            del stubborn
            time.sleep(60)


@pytest.mark.slow
def test_a_worker_ends_although_its_end_is_dropped_once(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Python ignores what is raised in a `__del__`; nothing is printed about it."""
    source = Jobs([Job(number) for number in range(2)])

    def tick() -> None:
        if source.results:
            raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(source, jobs=1, work=DeletesSlowly(), tick=tick)
    assert time.monotonic() - begun < 15
    assert capfd.readouterr().err == ""


def test_workers_ignore_the_terminals_interrupt() -> None:
    """Ctrl-C goes to all processes of a terminal; the supervisor decides."""
    source = Jobs([Job(number, "SIGINT") for number in range(5)])
    run(source)
    assert len(source.results) == 5
    assert source.deaths == []


def test_no_worker_outlives_a_supervisor_that_is_killed() -> None:
    """Its workers are killed with it."""
    reading, writing = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        os.close(reading)

        def tick() -> None:
            from multiprocessing import active_children

            children = active_children()
            if children:
                os.write(writing, f"{children[0].pid}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            run(Jobs([Job(1, "hang")]), jobs=1, tick=tick)
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(supervisor, 0)
    with os.fdopen(reading) as pipe:
        worker = int(pipe.readline())
        assert pipe.read() == ""  # the worker's copy of the pipe is closed: it has ended
    assert worker > 0


@pytest.mark.slow
def test_spawned_workers_do_the_same() -> None:
    """A death among them included."""
    source = Jobs([Job(number, "exit" if number == 2 else "ok") for number in range(6)])
    run(source, start_method="spawn")
    assert sorted(name for name, _ in source.results) == [0, 1, 3, 4, 5]
    assert source.died_alone == [2]


def test_kill_ends_all_workers_at_once() -> None:
    """From a signal handler, which runs in the middle of the loop."""
    source = Jobs([Job(number, "hang") for number in range(2)], retry=False)
    pool: Pool[Job] = Pool(Work(), jobs=2, threads=1, start_method="fork")
    before = signal.signal(signal.SIGALRM, lambda number, frame: pool.kill())
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        pool.run(source, source.on_event, lambda: None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert sorted(name for death in source.deaths for name in death) == [0, 1]


# Its own program: the server of `forkserver` is started once per process.
ELSEWHERE = """
import sys
from pipeline.batch.pool import Pool

class Work:
    def start(self, number, threads):
        pass

    def run(self, items, emit, ready):
        ready()
        for item in items:
            emit(item.name, item.name)

class Item:
    name, alone = 1, False

class Source:
    items = [Item()]

    @property
    def exhausted(self):
        return not self.items

    def take(self, *, alone):
        return self.items.pop() if self.items else None

if __name__ == "__main__":
    results = []
    pool = Pool(Work(), jobs=1, threads=1, start_method=sys.argv[1])
    pool.run(Source(), lambda event: results.append(event.result), lambda: None)
    assert results == [1]
"""
# modules that multiprocessing and volseg's dependencies import, some of them only if they exist
SHADOWED = ("struct", "pickle", "selectors", "onnx", "jsonschema", "pandas")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_import_nothing_of_the_working_folder(method: str, tmp_path: Path) -> None:
    """A bundle that is looked at in its own folder runs none of its code."""
    (tmp_path / "program.py").write_text(ELSEWHERE)
    folder, mark = tmp_path / "bundle", tmp_path / "mark"
    folder.mkdir()
    for name in SHADOWED:
        (folder / f"{name}.py").write_text(f"import os\nos.close(os.open({str(mark)!r}, 65))\n")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), method],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert not mark.exists()
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_worker_computes_after_its_parent_has(tmp_path: Path) -> None:
    """OpenMP's threads, which a bundle that reads its own weights starts, do not stop the child."""
    computing = "torch.rand(4_000_000).exp().sum()"
    program = ELSEWHERE.replace("import sys", "import sys, torch")
    program = program.replace("        pass", f"        torch.set_num_threads(2); {computing}")
    program = program.replace(
        "    results = []", f"    torch.set_num_threads(2); {computing}\n    results = []"
    )
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), "fork"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
