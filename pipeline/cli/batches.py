"""What the commands that segment many cases share: options, worker processes, what they print."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.options import (
    DONE,
    RUNTIMES,
    SOME_FAILED,
    Decorator,
    device_option,
    json_option,
    precision_option,
    set_option,
    trust_option,
)
from pipeline.cli.progress import case_line, progress_bar
from pipeline.defaults import DEFAULT_BUNDLE

if TYPE_CHECKING:
    from pipeline.batch import BatchSummary, CaseRecord, Forecast
    from pipeline.inference import CaseModel
    from pipeline.types import Case

MIB, GIB = 2**20, 2**30


def _all_of(*options: Decorator) -> Decorator:
    """Return one decorator for several, which the help lists in this order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def model_options() -> Decorator:
    """Return the options that say which model segments, and how it is computed."""
    return _all_of(
        click.option(
            "-b",
            "--bundle",
            default=DEFAULT_BUNDLE,
            show_default=True,
            help="Bundle to segment with: a folder, or the name of a shipped bundle.",
        ),
        trust_option(),
        device_option(),
        click.option(
            "--overlap",
            type=float,
            metavar="FRACTION",
            show_default="the bundle's own",
            help="Overlap of neighbouring windows, 0 to below 1.",
        ),
        click.option(
            "--runtime",
            type=RUNTIMES,
            default="auto",
            show_default=True,
            help="Runtime of the network; auto takes OpenVINO on a CPU where it agrees with torch, "
            "stock the own inferer of a bundle of MONAI's form.",
        ),
        precision_option(),
        set_option(),
    )


def worker_options() -> Decorator:
    """Return the options that say where and by how many processes cases are segmented."""
    return _all_of(
        click.option(
            "--jobs",
            type=click.IntRange(min=1),
            metavar="N",
            show_default="by cores and memory",
            help="Number of worker processes.",
        ),
        click.option(
            "--max-memory",
            metavar="SIZE",
            show_default="no limit",
            help="Memory that all workers together may use, such as 4G; the labels do not depend "
            "on it.",
        ),
        click.option(
            "--case-timeout",
            type=click.FloatRange(min=0, min_open=True),
            metavar="SECONDS",
            show_default="no limit",
            help="Time that one case may take; a case that takes longer is stopped and fails.",
        ),
        click.option(
            "--shard",
            metavar="K/N",
            help="Segment the K-th of N parts of the inputs, K from 1; slurm or kubernetes take "
            "the number of the job array's task or of the indexed job's pod.",
        ),
        click.option(
            "--dask",
            metavar="ADDRESS",
            help="Segment in workers of Dask: the address of a scheduler such as tcp://node1:8786, "
            "or local for workers on this machine.",
        ),
    )


def repetition_options() -> Decorator:
    """Return the options that say what is done again, or only shown."""
    return _all_of(
        click.option(
            "--overwrite",
            is_flag=True,
            help="Segment cases again that are done already, and remove results of another model.",
        ),
        click.option(
            "--check-hashes",
            is_flag=True,
            help="Compare the files of cases that are done by hash, not by size and time only.",
        ),
        click.option("--dry-run", is_flag=True, help="Show what would be done, and do nothing."),
        json_option("Print the rows of cases.csv, or those of --dry-run, as JSON on stdout."),
    )


def label_table_option() -> Decorator:
    """Return the option that says whether label maps hold names and colours."""
    return click.option(
        "--label-table/--no-label-table",
        default=None,
        show_default="as in the output folder, on in a new one",
        help="Write names and colours of the labels into the header of each label map.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchOptions:
    """Values of `worker_options`, `repetition_options` and `label_table_option`.

    Attributes:
        jobs: number of worker processes; None to choose.
        max_memory: memory of all workers together, such as 4G; None for no limit.
        case_timeout: seconds that a case may take; None for no limit.
        shard: part of the cases, such as 1/8; None for all.
        dask: address of a scheduler, or `local`; None for worker processes of this command.
        overwrite: whether cases that are done are segmented again.
        check_hashes: whether files are compared by hash.
        dry_run: whether the cases are only shown.
        as_json: whether rows are printed as JSON.
        label_table: whether label maps hold names and colours; None as in the output folder.
    """

    jobs: int | None
    max_memory: str | None
    case_timeout: float | None
    shard: str | None
    dask: str | None
    overwrite: bool
    check_hashes: bool
    dry_run: bool
    as_json: bool
    label_table: bool | None = None

    @classmethod
    def split(cls, given: Mapping[str, Any]) -> tuple[BatchOptions, dict[str, Any]]:
        """Return the options of a batch among those of a command, and all others."""
        names = {item.name for item in fields(cls)}
        others = {name: value for name, value in given.items() if name not in names}
        return cls(**{name: given[name] for name in names & set(given)}), others


def segment_batch(
    find: Callable[[CaseModel], Sequence[Case]],
    output: Path,
    options: BatchOptions,
    settings: Mapping[str, Any],
    *,
    on_record: Callable[[CaseRecord], None] | None = None,
) -> int:
    """Segment cases and show what becomes of them, and return the exit status.

    Args:
        find: returns the cases for a model.
        output: folder of the results.
        options: of the batch.
        settings: arguments of `open_for_cases`.
        on_record: called with the record of each case.
    """
    from pipeline.batch import parse_shard
    from pipeline.bundle import open_for_cases

    part = parse_shard(options.shard) if options.shard else None
    workers = _Workers(options, settings)
    model = open_for_cases(**settings)
    cases = find(model)
    if part is not None:
        cases = part.of(cases)
    if options.dry_run:
        return _show_forecasts(model, cases, output, as_json=options.as_json)
    rows: list[CaseRecord] = []
    with progress_bar("segmenting", len(cases)) as advance:

        def progress(record: CaseRecord) -> None:
            skipped = record.status == "skipped"
            advance(case_line(record), worked=not skipped, failed=record.is_failure)
            if options.as_json:
                rows.append(record)
            if on_record is not None:
                on_record(record)

        summary = workers.run(
            model,
            cases,
            output,
            progress,
            overwrite=options.overwrite,
            check_hashes=options.check_hashes,
            label_table=options.label_table,
        )
    if options.as_json:
        _print_rows(rows)
    return _show_outcome(summary, output)


class _Workers:
    """How many processes work, with how many threads and how much memory each."""

    def __init__(self, options: BatchOptions, settings: Mapping[str, Any]) -> None:
        from pipeline.inference import parse_size

        self.jobs, self.case_timeout = options.jobs, options.case_timeout
        self.limit = parse_size(options.max_memory) if options.max_memory else None
        self.dask, self.settings = options.dask, settings
        if self.dask in (None, "local"):
            return
        for option, value in {"--jobs": self.jobs, "--max-memory": self.limit}.items():
            if value is not None:
                raise click.UsageError(
                    f"{option} is for workers that volseg starts on this machine; with --dask "
                    f"{self.dask}, number and memory of the workers are the cluster's "
                    "(`dask worker --nworkers --memory-limit`)"
                )

    def run(
        self,
        model: CaseModel,
        cases: Sequence[Case],
        output: Path,
        progress: Callable[[CaseRecord], None],
        *,
        overwrite: bool,
        check_hashes: bool,
        label_table: bool | None,
    ) -> BatchSummary:
        """Segment cases in worker processes."""
        from pipeline.batch import choose_jobs, dask_executor, pool_executor, run_batch

        jobs, threads = choose_jobs(model, cases, self.jobs, self.limit)
        limit = None if self.limit is None else self.limit // jobs
        workers: dict[str, Any] = {
            "jobs": jobs,
            "threads": threads,
            "case_timeout": self.case_timeout,
        }
        executor = (
            pool_executor(**workers)
            if self.dask is None
            else dask_executor(self.dask, {**self.settings, "max_memory": limit}, **workers)
        )
        return run_batch(
            model.limited(limit),
            cases,
            output,
            executor,
            progress=progress,
            overwrite=overwrite,
            check_hashes=check_hashes,
            label_table=label_table,
        )


def _print_rows(records: Sequence[CaseRecord]) -> None:
    from pipeline.batch import case_columns
    from pipeline.io import printable

    # sorted as in cases.csv: several processes end in any order
    ordered = sorted(records, key=lambda record: printable(record.case))
    click.echo(json.dumps([case_columns(record) for record in ordered], indent=2))


def _show_outcome(summary: BatchSummary, output: Path) -> int:
    """Print what became of a batch, and return the exit status."""
    total, failed = summary.total - summary.left_out, summary.failed
    outcome = f"{total - failed} of {total} cases are in {output}"
    if summary.counts.get("skipped"):
        outcome += f", {summary.counts['skipped']} of them from an earlier run"
    if summary.left_out:
        outcome += f", {summary.left_out} DICOM series were left out (see cases.csv)"
    if failed:
        outcome += f", {failed} failed (see cases.csv)"
    click.echo(outcome, err=True)
    return SOME_FAILED if failed else DONE


def _show_forecasts(model: CaseModel, cases: Sequence[Case], output: Path, *, as_json: bool) -> int:
    """Print what would be done, and return the exit status."""
    from pipeline.batch import forecast_cases

    forecasts, seconds = forecast_cases(model, cases, output)
    rows = [_forecast_row(item, seconds) for item in forecasts]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        names = list(rows[0]) if rows else []  # a shard may have no case
        writer = csv.DictWriter(sys.stdout, fieldnames=names, dialect="excel-tab")
        writer.writeheader()
        writer.writerows(rows)
    bad = sum(bool(item.problem) for item in forecasts)
    left_out = sum(bool(item.left_out) for item in forecasts)
    windows = sum(item.windows for item in forecasts)
    read = sum(item.input_bytes for item in forecasts)
    peak = max((item.memory for item in forecasts), default=0)
    others = f"{left_out} DICOM series are left out; " if left_out else ""
    click.echo(
        f"{len(rows) - left_out} cases, {bad} of them will fail; {others}{read / GIB:.2f} GiB to "
        "read; about "
        f"{windows * seconds / 60:.1f} minutes of the network on this machine with one process, "
        f"up to {peak / GIB:.2f} GiB of memory",
        err=True,
    )
    return SOME_FAILED if bad else DONE


def _forecast_row(item: Forecast, seconds: float) -> dict[str, str]:
    from pipeline.io import printable

    return {
        "case": printable(item.case),
        "files": ";".join(map(printable, item.files)),
        "output": printable(item.output),
        "problem": item.problem,
        "left_out": item.left_out,
        "shape": " ".join(map(str, item.shape)),
        "spacing_mm": " ".join(f"{mm:.4g}" for mm in item.spacing),
        "input_mb": f"{item.input_bytes / MIB:.2f}",
        "windows": str(item.windows),
        "network_s": f"{item.windows * seconds:.2f}",
        "memory_mb": f"{item.memory / MIB:.0f}",
    }
