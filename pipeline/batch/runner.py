"""Many cases, one after the other; a case that fails is recorded and the next one continues."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from monai.engines import SupervisedEvaluator

from pipeline.batch.case_row import CaseRow
from pipeline.batch.outputs import CASES, VOLUMES, output_path, uncertainty_path
from pipeline.batch.prefetch import prefetch, write_behind
from pipeline.batch.provenance import holds_other_results, write_run
from pipeline.errors import PipelineError, WriteError, describe_error, find_pipeline_error
from pipeline.inference import (
    Model,
    Prediction,
    PreparedCase,
    evaluate_prepared,
    peak_bytes,
    predict_case,
    predict_prepared,
    prepare,
    reset_peak,
)
from pipeline.io import (
    as_nibabel,
    case_name,
    fractions_as_nibabel,
    is_written_by_volseg,
    read_csv,
    write_csv,
    write_labels,
)
from pipeline.types import Case, PathOrStr

Progress = Callable[[CaseRow], None]
Predict = Callable[[Model, PreparedCase], Prediction]


class _NotRead(Enum):
    """Why a case was not read ahead."""

    DONE_BEFORE = "an earlier run has done it"
    MEMORY_LIMIT = "under a memory limit a case is read when its turn comes"


Start = PreparedCase | _NotRead


def segment_cases(
    model: Model,
    cases: Sequence[Case],
    output_dir: PathOrStr,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    predict: Predict | None = None,
) -> list[CaseRow]:
    """Segment each case and write its label map, the tables and `run.json`.

    The next case is read and the last one written while the network computes, unless the model has
    a memory limit. The tables are rewritten after each case, so a killed run loses nothing, and a
    run that is started again continues where it stopped.

    Args:
        model: an opened bundle.
        cases: with `case` and `image`.
        output_dir: where results go; made if it does not exist.
        overwrite: whether cases that are done already are done again.
        progress: called with the row of each case.
        predict: segments a prepared case; `predict_prepared` by default.

    Returns:
        one row per case, in the order of `cases`.

    Raises:
        ConfigError: the folder holds results of another model.
    """
    out = Path(output_dir)
    replaces = holds_other_results(out, model, overwrite=overwrite)
    tables = _Tables.read(out, empty=replaces)
    before = dict(tables.rows)
    write_run(model, out)
    rows: list[CaseRow] = []

    def start(case: Case) -> Start:
        return _start(model, case, out, before.get(case["case"]), overwrite=overwrite)

    def finish(item: tuple[Case, Prediction | CaseRow]) -> None:
        case, result = item
        row = result if isinstance(result, CaseRow) else _write(case, result, out)
        volumes = None
        if isinstance(result, Prediction) and row.status == "done":
            volumes = result.volumes_mm3
        if row.status == "done" and not rows:
            write_run(model, out)  # now the network has computed, and is known to the record
        rows.append(row)
        tables.add(row, volumes)
        if progress is not None:
            progress(row)

    named = [_with_name(case) for case in cases]
    concurrent = model.max_memory is None
    compute = predict or predict_prepared
    started = prefetch(start, named, concurrent=concurrent)

    def results() -> Iterator[tuple[Case, Prediction | CaseRow]]:
        for case, future in started:
            yield case, _predict(model, case, future, before.get(case["case"]), compute)

    write_behind(finish, results(), concurrent=concurrent)
    return rows


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

    rows = segment_cases(model, cases, output_dir, overwrite=True, predict=predict)
    failed = [f"{row.case}: {row.message}" for row in rows if row.status == "failed"]
    if failed:
        raise PipelineError(
            f"{len(failed)} of {len(rows)} cases failed, the others are written:\n"
            + "\n".join(failed)
        )


@dataclass
class _Tables:
    """The rows of `cases.csv` and `volumes.csv`, by case."""

    folder: Path
    rows: dict[str, CaseRow]
    volumes: dict[str, dict[str, object]]

    @classmethod
    def read(cls, folder: Path, *, empty: bool) -> _Tables:
        """Return the tables of a folder; empty ones where there are none, or none that count."""
        if empty:
            return cls(folder, {}, {})
        rows = {row["case"]: CaseRow.from_table(row) for row in read_csv(folder / CASES)}
        volumes: dict[str, dict[str, object]] = {}
        for row in read_csv(folder / VOLUMES):
            volumes[row["case"]] = dict(row)
        return cls(folder, rows, volumes)

    def add(self, row: CaseRow, volumes_mm3: dict[str, float] | None) -> None:
        """Add a case and write both tables; a failed case has no volumes."""
        self.rows[row.case] = row
        if volumes_mm3 is not None:
            self.volumes[row.case] = {"case": row.case, **volumes_mm3}
        elif row.status == "failed":
            self.volumes.pop(row.case, None)
        write_csv(self.folder / CASES, [known.to_table() for known in self.rows.values()])
        write_csv(self.folder / VOLUMES, self.volumes.values())


def _with_name(case: Case) -> Case:
    return {**case, "case": case.get("case") or case_name(case)}


def _start(
    model: Model, case: Case, out: Path, before: CaseRow | None, *, overwrite: bool
) -> Start:
    """Return a case that was read, or a mark that it is done or to be read later.

    Raises:
        PipelineError: it cannot be read, or its output exists and is not ours.
    """
    path = output_path(out, case["case"])
    if not overwrite and path.is_file():
        complete = not model.inversion.uncertainty
        complete = complete or uncertainty_path(out, case["case"]).is_file()
        if complete and before is not None and before.status in ("done", "skipped"):
            return _NotRead.DONE_BEFORE
        if not is_written_by_volseg(path):
            raise WriteError(
                f"{path}: exists and was not written by volseg; move it away, or --overwrite"
            )
    if model.max_memory is not None:
        return _NotRead.MEMORY_LIMIT
    return prepare(model, case["image"])


def _predict(
    model: Model, case: Case, future: Future[Start], before: CaseRow | None, predict: Predict
) -> Prediction | CaseRow:
    """Return the prediction of a case, or the row of one that was done before or that failed."""
    try:
        started = future.result()
        reset_peak()
        if started is _NotRead.DONE_BEFORE:
            return (before or CaseRow(case=case["case"], status="done", input="")).as_skipped()
        if started is _NotRead.MEMORY_LIMIT:
            return predict_case(model, case["image"])
        return predict(model, started)
    except Exception as error:
        return CaseRow.failed(case, _failure(error), peak_bytes())


def _write(case: Case, prediction: Prediction, out: Path) -> CaseRow:
    """Write a case's label map, and its uncertainty if there is one, and return its row."""
    started = time.perf_counter()
    affine, header = prediction.affine, prediction.header
    try:
        if prediction.uncertainty is not None:
            fractions = fractions_as_nibabel(prediction.uncertainty, affine, header)
            write_labels(uncertainty_path(out, case["case"]), fractions)
        labels = as_nibabel(prediction.labels, affine, header)
        write_labels(output_path(out, case["case"]), labels)
    except Exception as error:
        return CaseRow.failed(case, _failure(error), peak_bytes())
    seconds = prediction.seconds | {"write": time.perf_counter() - started}
    return CaseRow.done(case, prediction.warnings, seconds, peak_bytes())


def _failure(error: BaseException) -> str:
    """Return why a case failed, in one message."""
    if find_pipeline_error(error) is not None:
        return describe_error(error)
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    # torch's CPU allocator raises a plain RuntimeError, known by its text only
    out_of_memory = isinstance(cause, MemoryError | torch.OutOfMemoryError)
    if out_of_memory or "can't allocate memory" in str(cause):
        return f"out of memory ({cause}); free some, or use a machine with more"
    return f"unexpected {describe_error(error)} (a bug of volseg: please report it)"
