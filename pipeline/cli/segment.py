"""The commands `volseg segment` and `volseg tables`."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.options import (
    DONE,
    RUNTIMES,
    SOME_FAILED,
    command,
    device_option,
    json_option,
    precision_option,
    trust_option,
    usage_errors,
)
from pipeline.cli.progress import case_line, progress_bar
from pipeline.defaults import DEFAULT_BUNDLE

if TYPE_CHECKING:
    from pipeline.batch import BatchSummary, CaseRecord, Forecast
    from pipeline.inference import Model
    from pipeline.types import Case

MIB, GIB = 2**20, 2**30


@command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder that the results are written to; made if it does not exist.",
)
@click.option(
    "-b",
    "--bundle",
    default=DEFAULT_BUNDLE,
    show_default=True,
    help="Bundle to segment with: a folder, or the name of a shipped bundle.",
)
@trust_option()
@device_option()
@click.option(
    "--overlap",
    type=float,
    metavar="FRACTION",
    show_default="the bundle's own",
    help="Overlap of neighbouring windows, 0 to below 1.",
)
@click.option(
    "--runtime",
    type=RUNTIMES,
    default="auto",
    show_default=True,
    help="Runtime of the network; auto takes OpenVINO on a CPU where it agrees with torch.",
)
@precision_option()
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    show_default="by cores and memory",
    help="Number of worker processes.",
)
@click.option(
    "--max-memory",
    metavar="SIZE",
    show_default="no limit",
    help="Memory that all workers together may use, such as 4G; the labels do not depend on it.",
)
@click.option(
    "--case-timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    show_default="no limit",
    help="Time that one case may take; a case that takes longer is stopped and fails.",
)
@click.option(
    "--shard",
    metavar="K/N",
    help="Segment the K-th of N parts of the inputs, K from 1; slurm or kubernetes take the number "
    "of the job array's task or of the indexed job's pod.",
)
@click.option(
    "--dask",
    metavar="ADDRESS",
    help="Segment in workers of Dask: the address of a scheduler such as tcp://node1:8786, or "
    "local for workers on this machine.",
)
@click.option(
    "--uncertainty",
    is_flag=True,
    help="Write <name>_uncertainty.nii.gz as well: the entropy of the scores, 0 to 1.",
)
@click.option(
    "--probabilities",
    is_flag=True,
    help="Write <name>_probabilities.nii.gz as well: a 4D file with the probability of each label.",
)
@click.option(
    "--labels-spacing",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MM",
    show_default="that of each input",
    help="Voxel size of the label maps, mm.",
)
@click.option(
    "--volume",
    type=int,
    metavar="T",
    help="Number of the volume to segment in 4D files, from 0.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Segment cases again that are done already, and remove results of another model.",
)
@click.option(
    "--check-hashes",
    is_flag=True,
    help="Compare the files of cases that are done by hash, not by size and time only.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be done, and do nothing.")
@json_option("Print the rows of cases.csv, or those of --dry-run, as JSON on stdout.")
def segment(
    inputs: tuple[str, ...],
    output: Path,
    dry_run: bool,
    shard: str | None,
    max_memory: str | None,
    as_json: bool,
    jobs: int | None,
    case_timeout: float | None,
    dask: str | None,
    overwrite: bool,
    check_hashes: bool,
    **settings: Any,
) -> None:
    """Segment files, folders, globs and lists of MRI volumes.

    The output folder gets a <name>_seg.nii.gz on each input's own grid, volumes.csv (mm³ per
    structure), cases.csv (one row per input: status, warnings, seconds, memory) and run.json (model
    and versions). A case that fails is named, and the others continue. A run that is started again
    continues where it stopped; several runs into one folder share the work.

    An INPUT that ends in .csv, .tsv or .jsonl lists cases: a column case, and image or one column
    per channel.
    """
    with usage_errors():
        from pipeline.batch import parse_shard
        from pipeline.bundle import open_bundle
        from pipeline.inference import parse_size
        from pipeline.io import find_cases

        part = parse_shard(shard) if shard else None
        limit = parse_size(max_memory) if max_memory else None
        workers = _Workers(
            jobs=jobs, limit=limit, case_timeout=case_timeout, dask=dask, settings=settings
        )
        model = open_bundle(**settings)
        cases = find_cases(inputs, model.spec)
        if part is not None:
            cases = part.of(cases)
        if dry_run:
            sys.exit(_show_forecasts(model, cases, output, as_json=as_json))
        rows: list[CaseRecord] = []
        with progress_bar("segmenting", len(cases)) as advance:

            def progress(record: CaseRecord) -> None:
                skipped = record.status == "skipped"
                advance(case_line(record), worked=not skipped, failed=record.is_failure)
                if as_json:
                    rows.append(record)

            summary = workers.run(
                model,
                cases,
                output,
                progress,
                overwrite=overwrite,
                check_hashes=check_hashes,
            )
    if as_json:
        _print_rows(rows)
    sys.exit(_show_outcome(summary, output))


@command()
@click.argument("output", type=click.Path(path_type=Path, exists=True, file_okay=False))
def tables(output: Path) -> None:
    """Derive cases.csv, volumes.csv and run.json of an output folder again.

    They are derived from the records of the cases, which every run keeps; a table that was edited,
    damaged or lost is written again.
    """
    with usage_errors():
        from pipeline.batch import write_tables

        counts = write_tables(output)
    text = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    click.echo(f"{sum(counts.values())} cases: {text or 'none'}", err=True)


class _Workers:
    """How many processes work, with how many threads and how much memory each."""

    def __init__(
        self,
        *,
        jobs: int | None,
        limit: int | None,
        case_timeout: float | None,
        dask: str | None,
        settings: Mapping[str, Any],
    ) -> None:
        self.jobs, self.limit, self.case_timeout = jobs, limit, case_timeout
        self.dask, self.settings = dask, settings
        if dask in (None, "local"):
            return
        for option, value in {"--jobs": jobs, "--max-memory": limit}.items():
            if value is not None:
                raise click.UsageError(
                    f"{option} is for workers that volseg starts on this machine; with --dask "
                    f"{dask}, number and memory of the workers are the cluster's "
                    "(`dask worker --nworkers --memory-limit`)"
                )

    def run(
        self,
        model: Model,
        cases: Sequence[Case],
        output: Path,
        progress: Callable[[CaseRecord], None],
        *,
        overwrite: bool,
        check_hashes: bool,
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
        model = replace(model, max_memory=limit)
        return run_batch(
            model,
            cases,
            output,
            executor,
            progress=progress,
            overwrite=overwrite,
            check_hashes=check_hashes,
        )


def _print_rows(records: Sequence[CaseRecord]) -> None:
    from pipeline.batch import case_columns
    from pipeline.io import printable

    # sorted as in cases.csv: several processes end in any order
    ordered = sorted(records, key=lambda record: printable(record.case))
    click.echo(json.dumps([case_columns(record) for record in ordered], indent=2))


def _show_outcome(summary: BatchSummary, output: Path) -> int:
    """Print what became of a batch, and return the exit status."""
    total, failed = summary.total, summary.failed
    outcome = f"{total - failed} of {total} cases are in {output}"
    if summary.counts.get("skipped"):
        outcome += f", {summary.counts['skipped']} of them from an earlier run"
    if failed:
        outcome += f", {failed} failed (see cases.csv)"
    click.echo(outcome, err=True)
    return SOME_FAILED if failed else DONE


def _show_forecasts(model: Model, cases: Sequence[Case], output: Path, *, as_json: bool) -> int:
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
    windows = sum(item.windows for item in forecasts)
    read = sum(item.input_bytes for item in forecasts)
    peak = max((item.memory for item in forecasts), default=0)
    click.echo(
        f"{len(rows)} cases, {bad} of them will fail; {read / GIB:.2f} GiB to read; about "
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
        "shape": " ".join(map(str, item.shape)),
        "spacing_mm": " ".join(f"{mm:.4g}" for mm in item.spacing),
        "input_mb": f"{item.input_bytes / MIB:.2f}",
        "windows": str(item.windows),
        "network_s": f"{item.windows * seconds:.2f}",
        "memory_mb": f"{item.memory / MIB:.0f}",
    }
