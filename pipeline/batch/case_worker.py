"""What is done with one case: read it, compute it, write its output and then its record."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.batch.dicom_outputs import dicom_files
from pipeline.batch.failures import failure_class, failure_text
from pipeline.batch.identity import has_label_table, remove_output, settle_runtime
from pipeline.batch.outputs import (
    OutputFolder,
    case_endings,
    name_problem,
    output_name,
)
from pipeline.batch.peak_memory import PeakMemory
from pipeline.batch.records import (
    CaseRecord,
    FileState,
    read_record,
    state_of,
    states_of_inputs,
    write_record,
)
from pipeline.batch.stages import run_stages
from pipeline.errors import (
    PipelineError,
    ReadError,
    RunStoppedError,
    WriteError,
    explicit_causes,
)
from pipeline.inference import CaseModel, Prediction, PreparedCase
from pipeline.io import (
    LABELS_ENDING,
    PROBABILITIES_ENDING,
    RESULT_ENDINGS,
    UNCERTAINTY_ENDING,
    as_nibabel,
    caret_xml,
    codes_hash,
    fractions_as_nibabel,
    is_readable,
    is_written_by_volseg,
    label_table,
    printable,
    probabilities_as_nibabel,
    retry_io,
    source_files,
    source_list,
    source_path,
    write_atomically,
    write_labels,
)
from pipeline.types import Case

Predict = Callable[[Any, PreparedCase], Prediction]
STEPS = ("read", "preprocess", "network", "invert", "write")
PACKAGES = ("volseg", "monai", "torch", "nibabel", "SimpleITK", "pytorch-ignite", "numpy")
CASE_ERRORS = (Exception, SystemExit)  # a reader may even raise SystemExit
DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A case that a worker is to do.

    Attributes:
        case: the case.
        reason: why it is done again; empty the first time.
        alone: whether no other case may be under way in the same process, because a process died
            while this one was.
        record_time: when the record was written that the case had as the run began, nanoseconds;
            0 for none. A later record is another run's work.
    """

    case: Case
    reason: str = ""
    alone: bool = False
    record_time: int = 0

    @property
    def name(self) -> str:
        """The name of the case."""
        return self.case["case"]


@dataclass(kw_only=True, slots=True)
class _Job:
    """A task under way."""

    task: Task
    started: str = ""
    inputs: tuple[FileState, ...] = ()
    prepared: PreparedCase | None = None
    prediction: Prediction | None = None
    error: BaseException | None = None


@dataclass(kw_only=True)
class CaseWorker:
    """Does cases with one model, for one output folder.

    Attributes:
        model: an opened bundle.
        out: the output folder.
        identity: of the folder's results.
        predict: segments a prepared case; the model's own `predict` by default.
        overwrite: whether files that volseg did not write are replaced.
        may_publish: asked for the name of a case before anything of it is written; False drops the
            case, because another run has taken it over.
    """

    model: CaseModel
    out: OutputFolder
    identity: Mapping[str, str]
    predict: Predict | None = None
    overwrite: bool = False
    may_publish: Callable[[str], bool] | None = None
    _peaks: PeakMemory = field(default_factory=PeakMemory)
    _is_prepared: bool = False
    _computed: Mapping[str, Any] | None = None

    def prepare_network(self) -> None:
        """Prepare the network with the runtime and precision of the folder's results.

        Raises:
            PipelineError: this process cannot do so.
        """
        self._computed = settle_runtime(self.out, self.model)
        self._is_prepared = True

    def run(
        self,
        tasks: Iterable[Task],
        emit: Callable[[str, CaseRecord | None], None],
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Do tasks; reading and writing overlap with the network, unless memory is limited.

        The network is prepared first, unless it is already; the first case is read meanwhile, but
        not one that must be alone: if this process dies then, the case is not to blame.

        Args:
            tasks: an iterator that may wait for the next task.
            emit: called with the name and the record of each task, once it is on the disk; without
                a record for a case that another run has taken over.
            ready: called once the network is prepared.

        Raises:
            PipelineError: this process cannot prepare the network.
            RunStoppedError: nothing more can be written.
        """
        concurrent = self.model.max_memory is None

        def write(job: _Job) -> None:
            emit(job.task.name, self._write(job))

        prepared = threading.Event()

        def prepare() -> None:
            if not self._is_prepared:
                self.prepare_network()
            ready()
            prepared.set()

        def read(task: Task) -> _Job:
            if task.alone:
                prepared.wait()
            return self._read(task)

        run_stages(tasks, read, self._compute, write, concurrent=concurrent, prepare=prepare)

    def _read(self, task: Task) -> _Job:
        """Begin a case: check its name and files, read and preprocess it."""
        job = _Job(task=task, started=_now())
        self._peaks.begin(task.name)
        try:
            self._check_start(task)
            job.inputs = retry_io(lambda: states_of_inputs(case_files(task.case)))
            if self.model.max_memory is None:
                job.prepared = retry_io(
                    lambda: self.model.prepare(task.case["image"], self.out.staging)
                )
                self._check_unchanged(job)
        except CASE_ERRORS as error:
            job.error = error
        return job

    def _check_start(self, task: Task) -> None:
        problem = task.case.get("problem", "")
        if problem:
            raise ReadError(problem)
        problem = name_problem(task.name)
        if problem:
            raise WriteError(f"{printable(task.name)}: {problem}")
        for ending in case_endings(task.case, self.model.endings):
            path = self.out.root / output_name(task.case, ending)
            if path.exists() and not self.overwrite and not self._may_replace(path, task.name):
                raise WriteError(
                    f"{printable(path)}: exists and was not written by volseg; move it away, or "
                    "--overwrite"
                )

    def _may_replace(self, path: Path, name: str) -> bool:
        """Return whether volseg wrote a file, or what is left of a file that it wrote."""
        if is_written_by_volseg(path):
            return True
        record = read_record(self.out.record(name))
        written = () if record is None else record.outputs
        shown = path.relative_to(self.out.root).as_posix()
        return any(state.path == shown for state in written) and not is_readable(path)

    def _check_unchanged(self, job: _Job) -> None:
        """Check that the files are still those that were hashed before they were read."""
        for state in job.inputs:
            status = Path(state.path).stat()
            if (status.st_size, status.st_mtime_ns) != (state.size, state.mtime_ns):
                raise ReadError(
                    f"{printable(state.path)}: changed while it was read; start again when it is "
                    "complete"
                )

    def _compute(self, job: _Job) -> _Job:
        """Segment a case that was read."""
        if job.error is not None:
            return job
        try:
            if self._computed is None:  # a model may need a case to decide what computes it
                self._computed = settle_runtime(self.out, self.model, job.task.case["image"])
            if job.prepared is None:
                job.prediction = self.model.predict_case(job.task.case["image"], self.out.staging)
                self._check_unchanged(job)
            elif self.predict is not None:
                job.prediction = self.predict(self.model, job.prepared)
            else:
                job.prediction = self.model.predict(job.prepared)
        except CASE_ERRORS as error:
            job.error = error
        job.prepared = None
        return job

    def _write(self, job: _Job) -> CaseRecord | None:
        """Write a case's output and record; return None for a case that another run took over.

        Raises:
            RunStoppedError: nothing more can be written.
        """
        name = job.task.name
        if self.may_publish is not None and not self.may_publish(name):
            self._peaks.end(name)
            return None
        record = self._outcome(job)
        self.out.check(self.out.record(name))
        try:
            if record.is_failure:
                self._remove_old_outputs(job.task.case)
            write_record(self.out, record)
        except (OSError, WriteError) as error:
            self.out.check(self.out.record(name))  # which may have been removed a moment ago
            raise RunStoppedError(f"{self.out.root}: no record can be written: {error}") from error
        return record

    def _outcome(self, job: _Job) -> CaseRecord:
        """Write the output of a case that was computed, and return the record of any case."""
        record = self._blank(job)
        outputs: tuple[FileState, ...] = ()
        warnings: tuple[str, ...] = ()
        begun = time.perf_counter()
        if job.error is None and job.prediction is not None:
            try:
                files = dicom_files(job.task.case, job.prediction, self.model.labels, self.identity)
                outputs = self._write_outputs(job.task.case, job.prediction)
                outputs += self._write_contents(job.task.case, files.contents)
                warnings = files.warnings
            except RunStoppedError:
                raise
            except CASE_ERRORS as error:
                _stop_if_disk_is_full(error, self.out)
                job.error = error
        record = replace(record, peak_memory=self._peaks.end(job.task.name), ended=_now())
        if job.error is not None or job.prediction is None:
            failure = job.error or RuntimeError("the case was neither computed nor refused")
            return replace(record, error=failure_text(failure), error_class=failure_class(failure))
        seconds = job.prediction.seconds | {"write": time.perf_counter() - begun}
        return replace(
            record,
            status="done",
            warnings=(*job.prediction.warnings, *warnings),
            seconds=seconds,
            volumes_mm3=job.prediction.volumes_mm3,
            **_quality(job.prediction),
            outputs=outputs,
        )

    def _blank(self, job: _Job) -> CaseRecord:
        """Return what the record of a case holds whatever became of it."""
        case = job.task.case
        return CaseRecord(
            case=case["case"],
            status="failed",
            image=tuple(str(path) for path in _paths(case)),
            reason=job.task.reason,
            inputs=job.inputs,
            columns=dict(case.get("columns", {})),
            dicom_codes=codes_hash(case.get("dicom_codes", {})),
            made_by=dict(self.identity),
            computed=self.model.description or self._computed,
            versions=package_versions(),
            host=socket.gethostname(),
            started=job.started,
        )

    def _write_outputs(self, case: Case, prediction: Prediction) -> tuple[FileState, ...]:
        affine, header = prediction.affine, prediction.header
        images = {}
        if prediction.uncertainty is not None:
            image = fractions_as_nibabel(prediction.uncertainty, affine, header)
            images[UNCERTAINTY_ENDING] = image
        if prediction.probabilities is not None:
            image = probabilities_as_nibabel(prediction.probabilities, affine, header)
            images[PROBABILITIES_ENDING] = image
        images[LABELS_ENDING] = as_nibabel(prediction.labels, affine, header, self._label_xml)
        states = []
        for ending, image in images.items():
            path = self.out.root / output_name(case, ending)
            self.out.check(path)
            write_labels(path, image, staging=self.out.staging)
            states.append(state_of(path, path.relative_to(self.out.root).as_posix()))
        return tuple(states)

    def _write_contents(self, case: Case, contents: Mapping[str, bytes]) -> tuple[FileState, ...]:
        """Write the content of each ending."""
        states = []
        for ending, content in contents.items():
            path = self.out.root / output_name(case, ending)
            self.out.check(path)
            write_atomically(path, content, staging=self.out.staging)
            states.append(state_of(path, path.relative_to(self.out.root).as_posix()))
        return tuple(states)

    @cached_property
    def _label_xml(self) -> bytes:
        """Names and colours of the labels for each label map, nothing if they are not wanted."""
        if not has_label_table(self.identity):
            return b""
        return caret_xml(label_table(self.model.labels))

    def _remove_old_outputs(self, case: Case) -> None:
        """Remove the outputs of an earlier run of a case that failed now."""
        if name_problem(case["case"]):
            return
        for ending in RESULT_ENDINGS:  # a file that somebody put in their place stays
            name = output_name(case, ending)
            path = self.out.root / name
            if path.is_file() and self._may_replace(path, case["case"]):
                remove_output(self.out, name)


def _quality(prediction: Prediction) -> dict[str, Any]:
    """Return the fields of a record for the predicted Dice; none where nothing was predicted."""
    fields: dict[str, Any] = {}
    if prediction.predicted_dice is not None:
        fields["predicted_dice"] = prediction.predicted_dice.columns()
    if prediction.quality_features is not None:
        fields["quality_features"] = prediction.quality_features.columns()
    return fields


def failed_record(
    task: Task, identity: Mapping[str, str], error: BaseException, **changes: Any
) -> CaseRecord:
    """Return the record of a case that failed outside a worker.

    Args:
        task: the case.
        identity: of the folder's results.
        error: why it failed.
        changes: fields of the record that differ.
    """
    record = _record_outside(task, identity)
    record = replace(
        record,
        error=failure_text(error),
        error_class=failure_class(error),
        inputs=_inputs_if_readable(task.case),
    )
    return replace(record, **changes)


def left_out_record(task: Task, identity: Mapping[str, str]) -> CaseRecord:
    """Return the record of a case that is not to be segmented.

    Args:
        task: the case, with `left_out`.
        identity: of the folder's results.
    """
    return replace(_record_outside(task, identity), status="left out", error=task.case["left_out"])


def _record_outside(task: Task, identity: Mapping[str, str]) -> CaseRecord:
    """Return what the record of a case that no worker has done holds whatever became of it."""
    return CaseRecord(
        case=task.name,
        status="failed",
        image=tuple(str(path) for path in _paths(task.case)),
        reason=task.reason,
        columns=dict(task.case.get("columns", {})),
        made_by=dict(identity),
        versions=package_versions(),
        host=socket.gethostname(),
        started=_now(),
        ended=_now(),
    )


def _inputs_if_readable(case: Case) -> tuple[FileState, ...]:
    """Return the state of a case's files, by which a later run sees whether they are the same."""
    try:
        return states_of_inputs(case_files(case))
    except (OSError, PipelineError):
        return ()


@cache
def package_versions() -> dict[str, str]:
    """Return the versions of the packages that the voxels of results may depend on."""
    return {name: version(name) for name in PACKAGES}


def case_files(case: Case) -> list[Path]:
    """Return all files that a case consists of; images in memory have none."""
    sources = source_list(case.get("image", []))
    on_disk = [source for source in sources if source_path(source) is not None]
    return [file for source in on_disk for file in source_files(source)]


def _paths(case: Case) -> list[Path]:
    """Return the files that were given for a case; images in memory have none."""
    paths = map(source_path, source_list(case.get("image", [])))
    return [path for path in paths if path is not None]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _stop_if_disk_is_full(error: BaseException, out: OutputFolder) -> None:
    for cause in explicit_causes(error):
        if isinstance(cause, OSError) and cause.errno in DISK_IS_FULL:
            raise RunStoppedError(
                f"{out.root}: {cause.strerror}; free some space and start the same command again: "
                "it continues with the cases that are not done"
            ) from error
