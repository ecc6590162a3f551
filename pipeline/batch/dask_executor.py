"""An executor on Dask `distributed`: worker processes on this machine or on a cluster.

The process of the run is Dask's client. It claims cases, gives each worker a few of them ahead, and
accounts for the replies; `dask_worker` is what workers do. Records and label maps go to the file
system that all machines share, not through Dask.
"""

from __future__ import annotations

import logging
import queue
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.batch.case_worker import CaseWorker, Task
from pipeline.batch.coordinator import Coordinator
from pipeline.batch.log_file import append_log
from pipeline.batch.outputs import LOG
from pipeline.batch.runner import Executor, Guard
from pipeline.errors import ConfigError, RunStoppedError
from pipeline.log import LOGGER
from pipeline.processes import without_working_folder

if TYPE_CHECKING:
    from distributed import Client, Future

    from pipeline.batch.dask_worker import Reply, RunSettings

LOCAL = "local"
IN_FLIGHT = 2  # cases per worker: one is computed, one waits at the worker
RETRIES = 2  # of a task that met an error of the file system
POLL_SECONDS = 0.25
WORKERS_SECONDS = 2.0  # between two looks at which workers there are
PATIENCE_SECONDS = 15.0  # before it is said that there is no worker
CONNECT_SECONDS = 20.0
GPU = "GPU"  # the resource that Dask's workers with a GPU declare, by the custom of its manual


def dask_executor(
    address: str,
    bundle: Mapping[str, Any],
    *,
    jobs: int = 1,
    threads: int = 1,
    case_timeout: float | None = None,
    retries: int = RETRIES,
) -> Executor:
    """Return an executor that does the cases in workers of Dask, one case at a time each.

    The output folder and the inputs must have the same path on all machines. A case whose worker
    dies is tried once more. A worker that cannot compute for the output folder (it has another
    bundle, not the runtime, not the folder) gets no more cases, and the others go on.

    Args:
        address: of a scheduler, such as `tcp://node1:8786`; `local` starts worker processes on
            this machine, which listen to this machine only.
        bundle: the arguments that `open_bundle` gave the model with; each worker opens the bundle
            by them.
        jobs: number of local worker processes.
        threads: per local worker; workers of a scheduler use as many as Dask was given for them.
        case_timeout: seconds that a case may take; None for no limit.
        retries: of a case that met an error of the file system, on any worker.

    Raises:
        ConfigError: Dask `distributed` is not installed.
    """
    _require_distributed()

    def executor(coordinator: Coordinator, worker: CaseWorker, guard: Guard) -> None:
        from pipeline.batch.dask_worker import RunSettings, remove_marks

        guard.claims.beat_in_thread()
        settings = RunSettings(
            run=guard.claims.holder.run,
            bundle=_for_workers(bundle),
            folder=worker.out.root.absolute(),
            start=Path.cwd(),
            identity=worker.identity,
            threads=threads if address == LOCAL else None,
            case_timeout=case_timeout,
            overwrite=worker.overwrite,
            predict=worker.predict,
        )
        try:
            with _client(address, jobs, guard) as client:
                _DaskRun(client, coordinator, guard, settings, retries, address).run()
        finally:
            remove_marks(worker.out, settings.run)

    return executor


def _require_distributed() -> None:
    """Raise ConfigError if Dask is not installed."""
    from importlib.util import find_spec

    if find_spec("distributed") is None:
        raise ConfigError("--dask needs Dask's distributed: pip install 'volseg[dask]'")


def _for_workers(bundle: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `open_bundle` for other folders: a path becomes absolute."""
    path = Path(bundle["bundle"])
    # a name stays a name, by which each machine finds what is installed there
    return {**bundle, "bundle": str(path.absolute()) if path.is_dir() else str(path)}


@contextmanager
def _client(address: str, jobs: int, guard: Guard) -> Iterator[Client]:
    """Yield a client of a scheduler, or of new worker processes on this machine."""
    from distributed import Client

    if address == LOCAL:
        with (
            without_working_folder(),  # as long as workers may be started again
            _local_cluster(jobs, guard) as cluster,
            Client(cluster, set_as_default=False) as it,
        ):
            yield it
        return
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--dask {address}: no scheduler answers there ({error}); expected local, or an "
            "address such as tcp://node1:8786"
        ) from None
    with client:
        yield client


@contextmanager
def _local_cluster(jobs: int, guard: Guard) -> Iterator[Any]:
    """Yield a cluster of processes on this machine, reachable from this machine only.

    Its folder for temporary files is removed, and what runs is killed when a signal came.
    """
    import dask.config
    from distributed import LocalCluster

    folder = tempfile.mkdtemp(prefix="volseg-dask-")
    # the profiler looks at the stacks of all threads a hundred times a second
    options = {
        "temporary_directory": folder,
        "distributed.worker.profile.enabled": False,
    }
    with dask.config.set(options):
        cluster = LocalCluster(
            n_workers=jobs,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            # without a dashboard; Dask's server of HTTP starts all the same
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            memory_limit=None,  # volseg plans its memory; Dask would pause or kill a large case
            local_directory=folder,
            silence_logs=logging.CRITICAL,  # deaths of workers are ours to report
        )
    try:
        yield cluster
    finally:
        if guard.signal_number:
            _kill_workers(cluster)
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


def _kill_workers(cluster: Any) -> None:
    """Kill the worker processes, which would finish the case that they compute."""
    for nanny in cluster.workers.values():
        nanny.auto_restart = False
        with suppress(AttributeError, OSError, ValueError):
            nanny.process.process._process.kill()


@dataclass
class _Flight:
    """A case that was given to Dask.

    Attributes:
        task: the case.
        future: of Dask.
        workers: addresses of those that may do it; empty for all.
    """

    task: Task
    future: Future
    workers: frozenset[str]


@dataclass
class _DaskRun:
    """A run's cases on their way through a cluster."""

    client: Client
    coordinator: Coordinator
    guard: Guard
    settings: RunSettings
    retries: int
    address: str
    flights: dict[str, _Flight] = field(default_factory=dict)
    workers: frozenset[str] = frozenset()
    resources: Mapping[str, float] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    killed: set[str] = field(default_factory=set)
    _done: queue.SimpleQueue[tuple[str, Reply | Exception]] = field(
        default_factory=queue.SimpleQueue
    )
    _looked: float = 0.0
    _lonely_since: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Do all cases.

        Raises:
            ConfigError: the workers do not have volseg.
            RunStoppedError: no worker can go on, or the scheduler is gone.
            InterruptedRunError: a signal came.
        """
        self._register()
        try:
            while True:
                self.guard.tick()
                self._look_at_workers()
                self._fill()
                if not self.flights and self.coordinator.exhausted:
                    return
                self._receive()
        finally:
            self._leave()

    def _register(self) -> None:
        """Send the settings of the run to all workers, also to those that join later."""
        from pipeline.batch.dask_worker import CasePlugin

        try:
            self.client.register_plugin(CasePlugin(self.settings), name=self.settings.plugin)
        except Exception as error:  # of any class: what a worker raised comes back as its text
            raise ConfigError(
                f"--dask {self.address}: a worker cannot load volseg ({error}); install the same "
                "volseg[dask] on all machines"
            ) from None

    def _leave(self) -> None:
        """Cancel what is under way, and have the workers free the model."""
        for flight in self.flights.values():
            with suppress(Exception):  # the scheduler may be gone, which is reported already
                flight.future.cancel()
        self.flights.clear()
        with suppress(Exception):
            self.client.unregister_worker_plugin(self.settings.plugin)

    def _look_at_workers(self) -> None:
        """Learn from time to time which workers there are."""
        if time.monotonic() - self._looked < WORKERS_SECONDS:
            return
        self._looked = time.monotonic()
        if self.client.status != "running":
            raise RunStoppedError(f"--dask {self.address}: the connection to the scheduler is lost")
        known = self.client.scheduler_info(n_workers=-1)["workers"]
        self.workers = frozenset(known)
        has_gpu = any(GPU in info["resources"] for info in known.values())
        self.resources = {GPU: 1} if has_gpu and self._wants_gpu() else {}
        self._check_workers()
        self._move_stranded()

    def _wants_gpu(self) -> bool:
        return self.settings.bundle.get("device") in (None, "auto", "cuda")

    def _check_workers(self) -> None:
        """Stop if no worker is fit; report if there is none at all."""
        if self.workers and self.workers <= set(self.unfit):
            address, reason = next(iter(self.unfit.items()))
            raise RunStoppedError(f"no worker of Dask can go on; {address}: {reason}")
        if self.workers:
            self._lonely_since = time.monotonic()
        elif time.monotonic() - self._lonely_since > PATIENCE_SECONDS:
            self._lonely_since = float("inf")  # said once
            self._note(f"--dask {self.address}: waiting for workers, none has joined")

    def _move_stranded(self) -> None:
        """Give out again what only workers may do that are gone."""
        for key, flight in list(self.flights.items()):
            if flight.workers and not flight.workers & self.workers:
                del self.flights[key]
                flight.future.cancel()
                self._submit(flight.task)

    def _fill(self) -> None:
        """Give Dask cases while its workers have room."""
        while len(self.flights) < IN_FLIGHT * len(self.workers - set(self.unfit)):
            task = self.coordinator.take()
            if task is None:
                return
            self._submit(task)

    def _submit(self, task: Task) -> None:
        from pipeline.batch.dask_worker import do_case

        fit = self.workers - set(self.unfit) if self.unfit else frozenset[str]()
        future = self.client.submit(
            do_case,
            self.settings.plugin,
            task,
            pure=False,
            retries=self.retries,
            resources=dict(self.resources) or None,
            workers=sorted(fit) or None,
        )
        self.flights[future.key] = _Flight(task, future, fit)
        future.add_done_callback(self._keep_result)

    def _keep_result(self, future: Future) -> None:
        """Fetch a result, in a thread of Dask's, so that the run's own thread never waits for it.

        Args:
            future: that is done.
        """
        result: Reply | Exception
        try:
            result = future.result()
        except Exception as error:
            result = error
        self._done.put((future.key, result))

    def _receive(self) -> None:
        """Wait a moment for results, and account for them."""
        with suppress(queue.Empty):
            self._account(*self._done.get(timeout=POLL_SECONDS))
            while True:
                self._account(*self._done.get_nowait())

    def _account(self, key: str, result: Reply | Exception) -> None:
        flight = self.flights.pop(key, None)
        if flight is None or self.guard.signal_number:  # cancelled
            return
        if isinstance(result, Exception):
            self._account_error(flight.task, result)
            return
        actions: Mapping[str, Callable[[Task, Reply], None]] = {
            "finished": self._finished,
            "dropped": self._dropped,
            "died": self._died,
            "timed out": self._timed_out,
            "unfit": self._unfit,
            "stopped": self._stopped,
            "failed": self._failed,
        }
        actions[result.outcome](flight.task, result)

    def _finished(self, task: Task, reply: Reply) -> None:
        if reply.record is not None:
            self.coordinator.finish(reply.record)

    def _dropped(self, task: Task, reply: Reply) -> None:
        self.coordinator.finished(task.name, None)

    def _died(self, task: Task, reply: Reply) -> None:
        self.coordinator.died([task], f"{reply.text}, is gone")

    def _timed_out(self, task: Task, reply: Reply) -> None:
        self.coordinator.timed_out(task, self.settings.case_timeout or 0)

    def _unfit(self, task: Task, reply: Reply) -> None:
        if reply.worker not in self.unfit:
            self.unfit[reply.worker] = reply.text
            self._note(f"Dask's worker {reply.worker} gets no cases: {reply.text}")
            self._check_workers()
        self.coordinator.give_back([task])

    def _stopped(self, task: Task, reply: Reply) -> None:
        raise RunStoppedError(reply.text)

    def _failed(self, task: Task, reply: Reply) -> None:
        self.coordinator.failed(task, RuntimeError(reply.text))

    def _account_error(self, task: Task, error: Exception) -> None:
        """Account for a task that has no reply: Dask gave it up, or it met errors of files."""
        from concurrent.futures import CancelledError

        from distributed import KilledWorker

        if isinstance(error, KilledWorker):
            self._account_killed(task, error)
        elif isinstance(error, CancelledError):  # the scheduler has forgotten it
            self._looked = 0.0
            self.coordinator.give_back([task])
        else:
            self.coordinator.failed(task, error)

    def _account_killed(self, task: Task, error: Exception) -> None:
        """Account for a task that so many workers died with that Dask gave it up."""
        from pipeline.batch.dask_worker import Mark

        begun = Mark(self.guard.out, self.settings.run, task.name).clear()
        if begun:
            self.coordinator.died([task], f"{begun}, is gone")
        elif task.name in self.killed:
            raise RunStoppedError(
                f"workers of Dask die before they begin a case ({error}); do they have the memory "
                "to load the model? Their logs say more"
            )
        else:  # it waited at workers that died of other cases
            self.killed.add(task.name)
            self.coordinator.give_back([task])

    def _note(self, text: str) -> None:
        """Log a warning, also in the output folder."""
        LOGGER.warning("%s", text)
        append_log(self.guard.out.root / LOG, text)
