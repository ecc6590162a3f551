"""What a run has to do: for each case what is known before it is read, and whether it is done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipeline.batch.case_worker import Task, case_files
from pipeline.batch.outputs import OutputFolder, case_endings, name_problem, output_name
from pipeline.batch.records import CaseRecord, read_record, record_time
from pipeline.batch.resources import allotted_cores, allotted_memory
from pipeline.batch.resume import why_again
from pipeline.batch.suspects import Suspect, clear_suspect
from pipeline.errors import PipelineError, VolumeError
from pipeline.inference import CaseModel
from pipeline.io import (
    LABELS_ENDING,
    Header,
    channel_headers,
    codes_hash,
    source_list,
    source_path,
)
from pipeline.types import Case, PathOrStr

MEMORY_FRACTION = 0.7  # of the memory at hand that a batch plans to use
SAMPLE_CASES = 50  # cases whose headers are looked at to choose the number of processes
PROCESS_BYTES = 700 * 2**20  # of a process with the libraries and a network ready to run, about

State = Literal["to do", "done", "quarantined", "left out"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedCase:
    """A case as a run finds it.

    Attributes:
        task: what a worker would do.
        state: `to do`, `done` by an earlier run, `quarantined`, or to be `left out`.
        record: of the earlier run, where there is one.
    """

    task: Task
    state: State
    record: CaseRecord | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What is known of a case from its header.

    Attributes:
        case: its name.
        files: its files.
        output: the label map that will be written.
        problem: why it will fail; empty if nothing is known against it.
        left_out: why it is left out; empty if it is not.
        shape: voxels of the first file.
        spacing: of these voxels, mm.
        input_bytes: size of the files.
        windows: of the network that are computed.
        memory: of the process at its highest, bytes.
    """

    case: str
    files: tuple[str, ...]
    output: str
    problem: str = ""
    left_out: str = ""
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    input_bytes: int = 0
    windows: int = 0
    memory: int = 0


def plan_case(
    out: OutputFolder,
    case: Case,
    suspect: Suspect | None,
    *,
    endings: Sequence[str],
    check_hashes: bool,
) -> PlannedCase:
    """Return what is to be done with a case.

    Args:
        out: the output folder.
        case: with its name.
        suspect: the deaths during the case so far, if there were any.
        endings: endings of the files that a case gets; one that lacks any is done again.
        check_hashes: whether files are compared by hash even if size and time are the same.
    """
    path = out.record(case["case"])
    record, time = read_record(path), record_time(out, case["case"])
    if record is not None and record.case != case["case"]:
        record = None
    left_out = "left_out" in case
    if record is None:
        reason = "its record was damaged" if path.exists() else ""
    elif left_out and record.status != "done":
        reason = ""
    elif record.status == "quarantined":
        # another file of that name deserves its own tries
        reason = _again(out, record, case, check_hashes=check_hashes)
        if not reason:
            return PlannedCase(task=Task(case=case), state="quarantined", record=record)
        clear_suspect(out, record.case)
        suspect = None
    elif record.status == "done":
        reason = _missing(record, case, case_endings(case, endings))
        reason = reason or _again(out, record, case, check_hashes=check_hashes)
        if not reason:
            return PlannedCase(task=Task(case=case), state="done", record=record)
    else:
        reason = f"it {'was left out' if record.status == 'left out' else 'failed'} before"
    task = Task(case=case, reason=reason, alone=suspect is not None, record_time=time)
    return PlannedCase(task=task, state="left out" if left_out else "to do", record=record)


def _missing(record: CaseRecord, case: Case, endings: Sequence[str]) -> str:
    written = [state.path for state in record.outputs]
    for ending in endings:
        if output_name(case, ending) not in written:
            return f"it has no {ending.lstrip('_')} yet"
    if "dicom" in case and record.dicom_codes != codes_hash(case.get("dicom_codes", {})):
        return "its DICOM objects have other codes"
    return ""


def _again(out: OutputFolder, record: CaseRecord, case: Case, *, check_hashes: bool) -> str:
    if case.get("problem"):
        return "its input cannot be used any more"
    if any(source_path(source) is None for source in source_list(case["image"])):
        return "its image is in memory, where it cannot be compared"
    try:
        files = case_files(case)
    except PipelineError as error:
        return f"its input cannot be used any more: {error}"
    return why_again(out, record, files, check_hashes=check_hashes)


def forecast_cases(
    model: CaseModel, cases: Sequence[Case], output_dir: PathOrStr
) -> tuple[list[Forecast], float]:
    """Return what the headers of cases say about their cost, and the seconds of one window.

    The network runs once, on noise, to be timed.

    Args:
        model: an opened bundle.
        cases: with `case` and `image`.
        output_dir: where results would go.
    """
    base = model.ready_bytes()  # prepares the network, so that the second run is timed
    begun = time.perf_counter()
    model.ready_bytes()
    seconds = time.perf_counter() - begun
    return [_forecast(model, case, Path(output_dir), base) for case in cases], seconds


def _forecast(model: CaseModel, case: Case, out: Path, base: int) -> Forecast:
    sources = source_list(case.get("image", []))
    files = tuple(str(source_path(source) or "") for source in sources)
    known = Forecast(
        case=case["case"], files=files, output=str(out / output_name(case, LABELS_ENDING))
    )
    if case.get("left_out"):
        return replace(known, output="", left_out=case["left_out"])
    problem = case.get("problem", "") or name_problem(case["case"])
    if problem:
        return replace(known, problem=problem)
    try:
        headers = channel_headers(sources, len(model.channels))
        _check_same_shape(headers)
        memory = model.peak_bytes(headers, base)
    except (PipelineError, ValueError) as error:
        return replace(known, problem=str(error))
    return _with_header(known, model, headers, memory)


def choose_jobs(
    model: CaseModel, cases: Sequence[Case], jobs: int | None, limit: int | None
) -> tuple[int, int]:
    """Return how many processes work on a batch, and with how many threads each.

    Args:
        model: an opened bundle.
        cases: of the batch.
        jobs: as the user wants them; None to choose.
        limit: bytes that all processes together may use; None for what the machine has.
    """
    cores = allotted_cores()
    if jobs is None:
        jobs = _best_jobs(model, cases, cores, limit)
    return jobs, max(1, cores // jobs)


def _best_jobs(model: CaseModel, cases: Sequence[Case], cores: int, limit: int | None) -> int:
    if model.device.type != "cpu" or limit is not None:
        return 1
    cases = [case for case in cases if "left_out" not in case]
    sizes = _sample_memory(model, cases)
    memory = allotted_memory() * MEMORY_FRACTION
    fitting = int(memory // max(sizes)) if sizes else 1
    return max(1, min(cores, fitting, len(cases)))


def _sample_memory(model: CaseModel, cases: Sequence[Case]) -> list[int]:
    """Return the memory that a process needs for some of the cases, bytes."""
    sizes = []
    for case in cases[:: max(1, len(cases) // SAMPLE_CASES)]:
        with suppress(PipelineError, ValueError, KeyError):
            headers = channel_headers(case["image"], len(model.channels))
            sizes.append(model.peak_bytes(headers, PROCESS_BYTES))
    return sizes


def _with_header(
    known: Forecast, model: CaseModel, headers: Sequence[Header], memory: int
) -> Forecast:
    first = headers[0]
    columns = first.affine[:3, :3].T
    spacing = tuple(float((column @ column) ** 0.5) for column in columns)
    return replace(
        known,
        shape=tuple(first.shape),
        spacing=spacing,
        input_bytes=sum({id(header): header.file_bytes for header in headers}.values()),
        windows=model.window_count(first),
        memory=memory,
    )


def _check_same_shape(headers: Sequence[Header]) -> None:
    shapes = {header.shape for header in headers}
    if len(shapes) > 1:
        raise VolumeError(f"its channels have different shapes: {', '.join(map(str, shapes))}")
