"""The command `volseg segment`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import (
    DONE,
    RUNTIMES,
    SOME_FAILED,
    command,
    device_option,
    json_option,
    precision_option,
    usage_errors,
)
from pipeline.cli.progress import case_line, progress_bar
from pipeline.defaults import DEFAULT_BUNDLE


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
    "--max-memory",
    metavar="SIZE",
    show_default="no limit",
    help="Memory that the process may use, such as 4G; the labels do not depend on it.",
)
@click.option(
    "--uncertainty",
    is_flag=True,
    help="Write <name>_uncertainty.nii.gz as well: the entropy of the scores, 0 to 1.",
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
@click.option("--overwrite", is_flag=True, help="Segment cases again that are done already.")
@json_option("Print the rows of cases.csv as JSON on stdout.")
def segment(
    inputs: tuple[str, ...],
    output: Path,
    max_memory: str | None,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Segment files, folders and globs of MRI volumes.

    The output folder gets a <name>_seg.nii.gz on each input's own grid, volumes.csv (mm³ per
    structure), cases.csv (one row per input: status, warnings, seconds, memory) and run.json (model
    and versions). A case that fails is named, and the others continue. A run that is started again
    continues where it stopped.
    """
    with usage_errors():
        from pipeline.batch import segment_cases
        from pipeline.bundle import open_bundle
        from pipeline.inference import parse_size
        from pipeline.io import find_cases

        limit = parse_size(max_memory) if max_memory else None
        model = open_bundle(**settings, max_memory=limit)
        cases = find_cases(inputs, model.spec)
        with progress_bar("segmenting", len(cases)) as advance:
            rows = segment_cases(
                model,
                cases,
                output,
                overwrite=overwrite,
                progress=lambda row: advance(case_line(row)),
            )
    if as_json:
        click.echo(json.dumps([row.to_table() for row in rows], indent=2))
    failed = sum(row.status == "failed" for row in rows)
    outcome = f"{len(rows) - failed} of {len(rows)} cases are in {output}"
    click.echo(outcome + (f", {failed} failed (see cases.csv)" if failed else ""), err=True)
    sys.exit(SOME_FAILED if failed else DONE)
