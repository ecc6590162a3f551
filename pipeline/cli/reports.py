"""The commands `volseg report` and `volseg view`. Slow modules are imported inside the commands."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.options import command, usage_errors
from pipeline.cli.progress import progress_bar

if TYPE_CHECKING:
    from pipeline.report import Choice, ReportOptions

CHOICES = click.Choice(["all", "flagged", "none"])


@command()
@click.argument("output", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "-o",
    "--to",
    type=click.Path(path_type=Path),
    show_default="report in the output folder",
    help="Folder of the report; made if it does not exist.",
)
@click.option(
    "--mosaics",
    type=CHOICES,
    default="all",
    show_default=True,
    help="Cases that get a picture of slices in three planes.",
)
@click.option(
    "--viewer",
    type=CHOICES,
    default="flagged",
    show_default=True,
    help="Cases that can be opened in the viewer, at up to 3 MB each; flagged cases have a "
    "warning, an outlier or the mark fail.",
)
@click.option(
    "--whole-head",
    is_flag=True,
    help="Show the whole scan, the face included; otherwise only what is near a label.",
)
@click.option(
    "--marks",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Marks of a rater that an earlier report has exported, as TSV.",
)
def report(
    output: Path,
    to: Path | None,
    mosaics: Choice,
    viewer: Choice,
    whole_head: bool,
    marks: Path | None,
) -> None:
    """Write the report of an output folder: a page to look through all cases, offline.

    The page OUTPUT/report/index.html has a table of all cases, slices of each with outlines of the
    labels, the volumes of the batch with outliers marked, the reasons of failures, and what
    produced the results. A rater marks cases by key and exports the marks.
    """
    with usage_errors():
        from pipeline.report import ReportOptions, read_marks

        options = ReportOptions(
            mosaics=mosaics,
            viewer=viewer,
            whole_head=whole_head,
            marks=read_marks(marks) if marks is not None else None,
        )
        show_report(output, to, options)


def show_report(output: Path, to: Path | None = None, options: ReportOptions | None = None) -> None:
    """Write the report of an output folder, and print where its page is.

    Raises:
        ConfigError: the folder holds no results.
        WriteError: the report cannot be written.
    """
    from pipeline.batch import count_records, is_complete
    from pipeline.report import write_batch_report

    with progress_bar("drawing", count_records(output)) as advance:
        page = write_batch_report(
            output, to, options, progress=lambda case: advance(f"added    {case}")
        )
    if not is_complete(output):
        click.echo(
            "warning: a run is under way in the folder, or was killed: cases that it has not "
            "finished are not in the report",
            err=True,
        )
    click.echo(f"the report is {page}", err=True)


@command()
@click.argument("scan", type=click.Path(path_type=Path))
@click.argument("labels", type=click.Path(path_type=Path), required=False)
@click.option(
    "--volume",
    type=click.IntRange(min=0),
    metavar="T",
    help="Number of the volume of a 4D file, from 0.",
)
@click.option("--open", "open_browser", is_flag=True, help="Open the page in the browser.")
def view(scan: Path, labels: Path | None, volume: int | None, open_browser: bool) -> None:
    """Show a scan, and a label map over it, in the browser of this machine.

    Prints the address of the page, which only this machine can open, and serves it until Ctrl-C.
    The formats are those that segment reads; the two files need not have the same grid.
    """
    with usage_errors():
        from pipeline.report import view_files

        server = view_files(scan, labels, volume=volume)
    click.echo(f"{server.url}  (Ctrl-C ends)")
    if open_browser:
        webbrowser.open(server.url)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        click.echo("ended", err=True)
    finally:
        server.server_close()
