"""A batch from its cases to its tables: plan, claim, compute, record, derive."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from monai.engines import SupervisedEvaluator

from pipeline.batch.case_worker import CaseWorker, Predict, Task, left_out_record
from pipeline.batch.claims import Claims, claims_of_run, holds_claim
from pipeline.batch.coordinator import Coordinator, Progress, remaining_text
from pipeline.batch.identity import remove_output, settle_identity, settle_labels
from pipeline.batch.outputs import CASES, OutputFolder
from pipeline.batch.planning import PlannedCase, plan_case
from pipeline.batch.pool import Died, Finished, Pool, TimedOut
from pipeline.batch.records import CaseRecord, read_record, write_record
from pipeline.batch.suspects import Suspect, clear_suspect, read_suspects
from pipeline.batch.tables import write_tables
from pipeline.errors import InterruptedRunError, PipelineError, RunStoppedError, WriteError
from pipeline.inference import (
    CaseModel,
    Model,
    Prediction,
    PreparedCase,
    evaluate_prepared,
    forks_can_compile,
)
from pipeline.io import case_name
from pipeline.types import Case, PathOrStr

# The tables are derived again during a run when they are so old, and either so many of their rows
# are new or they are much older: what is written per case stays the same however many there are
TABLE_SECONDS, TABLE_GROWTH, OLD_TABLE_SECONDS = 30.0, 0.1, 600.0

Executor = Callable[[Coordinator, CaseWorker, "Guard"], None]
StartMethod = Literal["fork", "forkserver", "spawn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSummary:
    """What became of the cases of a run.

    Attributes:
        counts: status → number of cases; `skipped` were done before.
        seconds: wall time of the run.
    """

    counts: Mapping[str, int]
    seconds: float

    @property
    def total(self) -> int:
        """All cases of the run."""
        return sum(self.counts.values())

    @property
    def left_out(self) -> int:
        """Cases that are no volumes."""
        return self.counts.get("left out", 0)

    @property
    def failed(self) -> int:
        """Cases without a result."""
        return self.counts.get("failed", 0) + self.counts.get("quarantined", 0)


@dataclass
class Guard:
    """What a run looks at several times a second: signals, its heartbeat, the age of the tables."""

    out: OutputFolder
    coordinator: Coordinator
    claims: Claims
    signal_number: int = 0
    kill: Callable[[], None] | None = None
    _tables_at: float = field(default_factory=time.monotonic)
    _table_rows: int = 0

    def tick(self) -> None:
        """Do what is due.

        Raises:
            InterruptedRunError: a signal came.
        """
        self.claims.beat()
        self.refresh_tables()
        if self.signal_number:
            name = signal.Signals(self.signal_number).name
            raise InterruptedRunError(f"interrupted ({name})", self.signal_number)

    def refresh_tables(self) -> None:
        """Derive the tables, if they are old."""
        done = sum(self.coordinator.counts.values())
        age, new = time.monotonic() - self._tables_at, done - self._table_rows
        grown = age > TABLE_SECONDS and new > TABLE_GROWTH * self._table_rows
        if new and (grown or age > OLD_TABLE_SECONDS):
            write_tables(self.out.root)
            self._tables_at, self._table_rows = time.monotonic(), done

    def on_signal(self, number: int, frame: object) -> None:
        """Note the first signal; end at once at the second."""
        if self.signal_number:
            if self.kill is not None:
                self.kill()
            os._exit(128 + number)
        self.signal_number = number
        self.coordinator.stopped = True  # a wait for the cases of other runs ends


@contextmanager
def _signals(guard: Guard) -> Iterator[None]:
    """Have SIGINT and SIGTERM end the run in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, guard.on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_batch(
    model: CaseModel,
    cases: Sequence[Case],
    output_dir: PathOrStr,
    executor: Executor,
    *,
    overwrite: bool = False,
    check_hashes: bool = False,
    label_table: bool | None = None,
    progress: Progress | None = None,
    predict: Predict | None = None,
) -> BatchSummary:
    """Segment cases into an output folder; continue where an earlier run of it stopped.

    A case is done if its record names the bytes of its input as they are, the model and the
    settings, and the bytes of its output as they are. Several runs may work on one folder at the
    same time: they share the cases.

    Args:
        model: an opened bundle.
        cases: with `image`, and with `case` where it is not the name of the file.
        output_dir: made if it does not exist.
        executor: how the cases are computed: `local_executor`, or one that `pool_executor` returns.
        overwrite: whether cases that are done are done again, and results of another model or
            setting in the folder are removed.
        check_hashes: whether files are compared by hash even if size and time are the same.
        label_table: whether label maps hold the names and colours of their labels, as an extension
            of their header; None as in the folder's results, and with them in a new folder.
        progress: called with the record of each case.
        predict: segments a prepared case; the model's own `predict` by default.

    Raises:
        ConfigError: the folder holds results of another model or setting.
        RunStoppedError: the run cannot go on; what it has done stays done.
        InterruptedRunError: a signal ended it.
    """
    begun = time.monotonic()
    out = OutputFolder.create(Path(output_dir))
    identity = settle_identity(out, model, overwrite=overwrite, label_table=label_table)
    settle_labels(out, model)
    worker = CaseWorker(
        model=model, out=out, identity=identity, predict=predict, overwrite=overwrite
    )
    with claims_of_run(out) as claims:
        worker.may_publish = partial(holds_claim, out, claims.holder.run)
        coordinator = Coordinator(out, claims, identity, progress)
        guard = Guard(out, coordinator, claims)
        with _signals(guard):
            try:
                _plan(
                    out,
                    cases,
                    coordinator,
                    guard,
                    endings=model.endings,
                    overwrite=overwrite,
                    hashes=check_hashes,
                )
                executor(coordinator, worker, guard)
                out.check(out.root / CASES)
                write_tables(out.root)
            except BaseException as error:
                coordinator.drop()
                _write_tables_if_possible(out)
                if isinstance(error, RunStoppedError | WriteError | OSError):
                    raise _with_remaining(error, coordinator) from error
                raise
    return BatchSummary(counts=dict(coordinator.counts), seconds=time.monotonic() - begun)


def _with_remaining(
    error: RunStoppedError | WriteError | OSError, coordinator: Coordinator
) -> RunStoppedError:
    text = f"{error}; {remaining_text(coordinator.remaining)}"
    if isinstance(error, InterruptedRunError):
        return InterruptedRunError(text, error.number)
    return RunStoppedError(text)


def _write_tables_if_possible(out: OutputFolder) -> None:
    """Derive the tables after an error, which must not be hidden by another one."""
    try:
        out.check(out.root / CASES)
        write_tables(out.root)
    except (PipelineError, OSError):
        return


def _plan(
    out: OutputFolder,
    cases: Sequence[Case],
    coordinator: Coordinator,
    guard: Guard,
    *,
    endings: Sequence[str],
    overwrite: bool,
    hashes: bool,
) -> None:
    """Give the coordinator what is to be done, and report what is done already."""
    suspects = read_suspects(out)
    for number, case in enumerate(cases):
        coordinator.unplanned = len(cases) - number
        guard.tick()
        named = _with_name(case)
        if overwrite:
            task = _overwritten(out, named)
            if "left_out" in named:
                _leave_out(PlannedCase(task=task, state="left out"), coordinator)
            else:
                coordinator.add([task])
            continue
        suspect = suspects.get(named["case"])
        planned = plan_case(out, named, suspect, endings=endings, check_hashes=hashes)
        if planned.state == "to do":
            suspect = suspect if planned.task.alone else None  # None for a file that was replaced
            coordinator.add(_to_do(planned, suspect, coordinator))
        elif planned.state == "left out":
            _leave_out(planned, coordinator)
        elif planned.record is not None:
            coordinator.claims.remove_dead(named["case"])
            done = planned.state == "done"
            record = planned.record
            coordinator.report(replace(record, status="skipped") if done else record)
    coordinator.unplanned = 0


def _to_do(planned: PlannedCase, suspect: Suspect | None, coordinator: Coordinator) -> list[Task]:
    """Return the task of a case, or none for one that is given up."""
    if suspect is None or not suspect.is_given_up:
        return [planned.task]
    coordinator.give_up(planned.task, suspect)
    return []


def _leave_out(planned: PlannedCase, coordinator: Coordinator) -> None:
    """Record a case that is no volume, unless that is its record already."""
    task, before = planned.task, planned.record
    record = left_out_record(task, coordinator.identity)
    if before is None or (before.status, before.error) != (record.status, record.error):
        _overwritten(coordinator.out, task.case)
        write_record(coordinator.out, record)
    coordinator.report(record)


def _overwritten(out: OutputFolder, case: Case) -> Task:
    """Return the task of a case whose result, if there is one, is removed first."""
    record = read_record(out.record(case["case"]))
    if record is not None and record.case == case["case"]:
        for state in record.outputs:
            remove_output(out, state.path)
    out.record(case["case"]).unlink(missing_ok=True)
    clear_suspect(out, case["case"])
    return Task(case=case, reason="" if record is None else "--overwrite was given")


def _with_name(case: Case) -> Case:
    return case if case.get("case") else Case(**(case | {"case": case_name(case)}))


def local_executor(coordinator: Coordinator, worker: CaseWorker, guard: Guard) -> None:
    """Do the cases in this process, one after the other."""
    guard.claims.beat_in_thread()
    worker.prepare_network()

    def finish(name: str, record: CaseRecord | None) -> None:
        coordinator.finished(name, record)
        guard.refresh_tables()

    def tasks() -> Iterator[Task]:
        for task in coordinator.tasks():
            if guard.signal_number:
                return
            yield task

    while not coordinator.exhausted:  # again where another run has taken over the last case
        worker.run(tasks(), finish)
    guard.tick()


@dataclass
class _CaseWork:
    """What a worker process does."""

    worker: CaseWorker

    def start(self, number: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.worker.model = on_own_gpu(self.worker.model, number, torch.cuda.device_count())

    def run(
        self,
        items: Iterator[Task],
        emit: Callable[[Hashable, Any], None],
        ready: Callable[[], None],
    ) -> None:
        self.worker.run(items, emit, ready)


def pool_executor(
    *,
    jobs: int,
    threads: int,
    case_timeout: float | None = None,
    start_method: StartMethod | None = None,
) -> Executor:
    """Return an executor that does the cases in worker processes.

    A case whose process dies is tried once more, alone; a case that takes too long is failed.

    Args:
        jobs: number of processes.
        threads: per process.
        case_timeout: seconds that a case may take; None for no limit.
        start_method: `fork` (on a CPU), `forkserver` or `spawn`; by default the one that fits.
    """

    def executor(coordinator: Coordinator, worker: CaseWorker, guard: Guard) -> None:
        method = start_method or default_start_method(worker.model)
        pool: Pool[Task] = Pool(
            _CaseWork(worker),
            jobs=jobs,
            threads=threads,
            timeout=case_timeout,
            start_method=method,
        )
        guard.kill = pool.kill

        def on_event(event: Finished[CaseRecord | None] | Died[Task] | TimedOut[Task]) -> None:
            if isinstance(event, Finished):
                coordinator.finished(str(event.name), event.result)
            elif isinstance(event, Died):
                if not coordinator.stopped and not guard.signal_number:
                    coordinator.died(event.items, event.why)
            else:
                coordinator.timed_out(event.item, case_timeout or 0)
                coordinator.give_back(event.others)

        pool.run(coordinator, on_event, guard.tick)

    return executor


def on_own_gpu(model: CaseModel, number: int, gpus: int) -> CaseModel:
    """Return a model on the GPU of a worker, where there are several GPUs.

    Args:
        model: an opened bundle.
        number: of the worker, from 0.
        gpus: number of GPUs.
    """
    if model.device != torch.device("cuda") or gpus < 2:
        return model
    return model.on_device(torch.device("cuda", number % gpus))


def default_start_method(model: CaseModel) -> StartMethod:
    """Return how worker processes are started.

    A forked process shares the memory of the model and starts at once, but only Linux forks safely,
    and only while no thread and no GPU is in use and OpenVINO has compiled nothing. Else a server
    is started, once, that has imported all and forks without having computed anything.
    """
    if sys.platform != "linux":
        return "spawn"
    alone = threading.active_count() == 1 and not _gpu_in_use() and forks_can_compile()
    return "fork" if alone and model.device.type == "cpu" else "forkserver"


def _gpu_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def segment_cases(
    model: CaseModel,
    cases: Sequence[Case],
    output_dir: PathOrStr,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    predict: Predict | None = None,
) -> list[CaseRecord]:
    """Segment cases in this process; see `run_batch`.

    Returns:
        one record per case, in the order of `cases`; `skipped` if an earlier run has done it.
    """
    named = [_with_name(case) for case in cases]
    records: dict[str, CaseRecord] = {}

    def keep(record: CaseRecord) -> None:
        records[record.case] = record
        if progress is not None:
            progress(record)

    run_batch(
        model,
        named,
        output_dir,
        local_executor,
        overwrite=overwrite,
        progress=keep,
        predict=predict,
    )
    return [records[case["case"]] for case in named]


def run_bundle(
    evaluator: SupervisedEvaluator, model: Model, cases: Sequence[Case], output_dir: PathOrStr
) -> None:
    """Segment cases through a bundle's evaluator, as the run of `python -m monai.bundle run`.

    MONAI's engine stops at the first file that cannot be read, so it gets one prepared case at a
    time.

    Raises:
        PipelineError: after all cases, where some failed; it names them.
    """

    def predict(model: Model, prepared: PreparedCase) -> Prediction:
        return evaluate_prepared(evaluator, model, prepared)

    records = segment_cases(model, cases, output_dir, overwrite=True, predict=predict)
    failed = [f"{record.case}: {record.error}" for record in records if record.is_failure]
    if failed:
        raise PipelineError(
            f"{len(failed)} of {len(records)} cases failed, the others are written:\n"
            + "\n".join(failed)
        )
