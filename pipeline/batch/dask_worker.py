"""What a worker of Dask `distributed` does for a batch. Imports `distributed`: import it when used.

Each worker process gets the name and the settings of a bundle, opens it once, and does one case at
a time. All that goes wrong comes back as a reply: an exception whose
causes form a cycle would keep Dask's scheduler busy for ever.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from distributed import Worker, WorkerPlugin, get_worker

from pipeline.batch.case_worker import CaseWorker, Predict, Task
from pipeline.batch.claims import holds_claim
from pipeline.batch.identity import LABEL_TABLE, results_identity
from pipeline.batch.outputs import OutputFolder, case_key
from pipeline.batch.records import CaseRecord, read_record, record_time
from pipeline.bundle import open_for_cases
from pipeline.errors import ConfigError, PipelineError, RunStoppedError, describe_error
from pipeline.io import DicomSeries, read_json, source_list
from pipeline.types import Case, ImageSource

PLUGIN = "volseg-"  # and the run's name, because several runs may use a cluster at the same time
TIMED_OUT = "timed out"  # content of the mark of a case that took too long

Outcome = Literal["finished", "dropped", "died", "timed out", "unfit", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What became of a task.

    Attributes:
        outcome: `finished`: the record is on the disk; `dropped`: another run has taken the case
            over; `died`, `timed out`: this run began the case before, and its worker is gone;
            `unfit`: this worker cannot compute for the output folder; `stopped`: nothing more can
            be written; `failed`: a bug of ours.
        worker: address of the worker.
        record: of a case that is finished.
        text: why, for all other outcomes.
    """

    outcome: Outcome
    worker: str
    record: CaseRecord | None = None
    text: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """What a worker needs to know of a run.

    Attributes:
        run: name of the run that holds the claims.
        bundle: arguments of `open_for_cases`. Weights are not sent: each worker reads its own copy,
            and its hash is compared.
        folder: the output folder, absolute.
        start: folder that relative paths of cases start from.
        identity: of the folder's results.
        threads: of each worker; None for as many as Dask was given for the worker.
        case_timeout: seconds that a case may take; None for no limit.
        overwrite: whether files that volseg did not write are replaced.
        predict: segments a prepared case; the model's own `predict` by default.
    """

    run: str
    bundle: Mapping[str, Any]
    folder: Path
    start: Path
    identity: Mapping[str, str]
    threads: int | None = None
    case_timeout: float | None = None
    overwrite: bool = False
    predict: Predict | None = None

    @property
    def plugin(self) -> str:
        """Name under which Dask's workers hold this run's `CasePlugin`."""
        return PLUGIN + self.run


def do_case(plugin: str, task: Task) -> Reply:
    """Do a case in a worker of Dask.

    Args:
        plugin: name of the plugin that does it.
        task: the case.

    Raises:
        OSError: an error of the file system, which another worker may not have.
    """
    do: CasePlugin = get_worker().plugins[plugin]
    return do.case(task)


class CasePlugin(WorkerPlugin):
    """Holds the model in a worker process for as long as a run lasts.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self.name = settings.plugin
        self._worker: CaseWorker | None = None
        self._unfit = ""

    def setup(self, worker: Worker) -> None:
        """Prepare; the model is opened by the first case, because this runs in Dask's event loop.

        Args:
            worker: of Dask.
        """
        self.address = str(worker.address)
        self.threads = self.settings.threads or int(worker.state.nthreads)
        self._one_case = threading.Lock()

    def teardown(self, worker: Worker) -> None:
        """Free the model.

        Args:
            worker: of Dask.
        """
        self._worker = None

    def case(self, task: Task) -> Reply:
        """Do a case, unless it was begun before.

        Raises:
            OSError: an error of the file system, without its causes.
        """
        with self._one_case:
            try:
                return self._case(task)
            except OSError as error:
                passing = OSError(error.errno, error.strerror or str(error), error.filename)
            except RunStoppedError as error:
                return Reply(outcome="stopped", worker=self.address, text=str(error))
            except PipelineError as error:
                self._unfit = str(error)
                return Reply(outcome="unfit", worker=self.address, text=self._unfit)
            except Exception as error:
                return Reply(outcome="failed", worker=self.address, text=describe_error(error))
        raise passing  # outside of the block that caught it: Dask sends causes and contexts

    def _case(self, task: Task) -> Reply:
        if self._unfit:
            return Reply(outcome="unfit", worker=self.address, text=self._unfit)
        torch.set_num_threads(self.threads)  # a setting of the thread that computes
        if self._worker is None:
            self._worker = open_worker(self.settings)
        record = _stored_record(self._worker.out, task)
        if record is not None:  # Dask lost the reply together with the worker that gave it
            return Reply(outcome="finished", worker=self.address, record=record)
        mark = Mark(self._worker.out, self.settings.run, task.name)
        before = mark.begin(self._words())
        if before == TIMED_OUT:
            return Reply(outcome="timed out", worker=self.address)
        if before:
            return Reply(outcome="died", worker=self.address, text=before)
        with _time_limit(self.settings.case_timeout, mark):
            record = _run(self._worker, _with_paths(task, self.settings.start))
        mark.end()
        outcome: Outcome = "dropped" if record is None else "finished"
        return Reply(outcome=outcome, worker=self.address, record=record)

    def _words(self) -> str:
        return f"Dask's worker {self.address} on {socket.gethostname()}, process {os.getpid()}"


def _run(worker: CaseWorker, task: Task) -> CaseRecord | None:
    """Do a task, and return its record; None for a case that another run has taken over."""
    records: list[CaseRecord | None] = []
    worker.run([task], lambda name, record: records.append(record))
    return records[0]


def open_worker(settings: RunSettings) -> CaseWorker:
    """Return what does cases in this process, with the model opened and its network prepared.

    Raises:
        ConfigError: this process cannot compute for the output folder.
    """
    out = _shared_folder(settings)
    model = open_for_cases(**settings.bundle)
    found, wanted = results_identity(model), dict(settings.identity)
    wanted.pop(LABEL_TABLE, None)  # no fact of the model
    if found != wanted:
        keys = [key for key, text in wanted.items() if found.get(key) != text]
        listed = ", ".join(f"{key} {found.get(key)}, not {wanted[key]}" for key in keys)
        raise ConfigError(
            f"{settings.bundle['bundle']}: the bundle that the worker has is another one "
            f"({listed}); give all machines the same"
        )
    worker = CaseWorker(
        model=model,
        out=out,
        identity=settings.identity,
        predict=settings.predict,
        overwrite=settings.overwrite,
        may_publish=partial(holds_claim, out, settings.run),
    )
    worker.prepare_network()
    return worker


def _shared_folder(settings: RunSettings) -> OutputFolder:
    """Return the run's output folder as this machine has it.

    Raises:
        ConfigError: it has another one or none.
    """
    folder = settings.folder
    with suppress(OSError, ConfigError):
        out = OutputFolder(folder, folder.stat().st_ino)
        if read_json(out.identity) == settings.identity:
            return out
    raise ConfigError(
        f"{folder}: the worker does not find the run's output folder there; expected a file system "
        "that all machines share, with the same path"
    )


def _with_paths(task: Task, start: Path) -> Task:
    """Return a task whose files are found from this process's folder."""
    if Path.cwd() == start:
        return task
    images = [_from_folder(start, item) for item in source_list(task.case["image"])]
    # a case that is one image stays one: a list would be channels
    single = not isinstance(task.case["image"], list | tuple)
    image = images[0] if single else images
    case: Case = {**task.case, "image": image}
    return replace(task, case=case)


def _from_folder(start: Path, source: ImageSource) -> ImageSource:
    if isinstance(source, DicomSeries):
        return source.below(start)
    return start / source if isinstance(source, str | Path) else source


def _stored_record(out: OutputFolder, task: Task) -> CaseRecord | None:
    """Return the record of a case, if it was written since the run began."""
    if record_time(out, task.name) in (0, task.record_time):
        return None
    return read_record(out.record(task.name))


@dataclass
class Mark:
    """A file that exists while a worker computes a case of a run.

    Dask gives the tasks of a dead worker to another one, the one that the worker computed and those
    that it only had in its queue alike. The mark tells them apart.

    Args:
        out: the output folder.
        run: name of the run.
        case: name of the case.
    """

    out: OutputFolder
    run: str
    case: str
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        self.path = marks_of_run(self.out, self.run) / case_key(self.case)

    def begin(self, text: str) -> str:
        """Make the mark; where it exists, remove it instead and return its text.

        Args:
            text: who begins.

        Raises:
            OSError: the file system does not allow it.
        """
        for _ in range(2):
            try:
                with open(self.path, "x", encoding="utf-8") as file:
                    file.write(text)
                return ""
            except FileExistsError:
                return self.clear() or "a worker of Dask"
            except FileNotFoundError:
                self.path.parent.mkdir(parents=True, exist_ok=True)
        raise OSError(f"{self.path.parent}: the folder is removed again and again")

    def clear(self) -> str:
        """Remove the mark, and return its text; empty where there is none."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        self.end()
        return text or "a worker of Dask"

    def time_out(self) -> None:
        """Write that the case took too long."""
        self.path.write_text(TIMED_OUT, encoding="utf-8")

    def end(self) -> None:
        """Remove the mark."""
        self.path.unlink(missing_ok=True)


def marks_of_run(out: OutputFolder, run: str) -> Path:
    """Return the folder of the marks of a run."""
    return out.state / "begun" / run


def remove_marks(out: OutputFolder, run: str) -> None:
    """Remove the marks of a run, and those of runs that are gone."""
    shutil.rmtree(marks_of_run(out, run), ignore_errors=True)
    with suppress(OSError):
        for folder in list((out.state / "begun").iterdir()):
            if not (out.runs / f"{folder.name}.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
        (out.state / "begun").rmdir()  # another run may have marks in it


@contextmanager
def _time_limit(seconds: float | None, mark: Mark) -> Iterator[None]:
    """End this process if what is inside takes longer: Dask cannot stop a task that runs.

    The worker's nanny starts a new process.
    """
    if seconds is None:
        yield
        return

    def end() -> None:
        with suppress(OSError):
            mark.time_out()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
