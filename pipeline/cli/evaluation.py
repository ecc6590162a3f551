"""The commands `evaluate` and `compare`. Slow modules are imported inside the commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.options import (
    DONE,
    SOME_FAILED,
    command,
    device_option,
    json_option,
    precision_option,
    set_option,
    trust_option,
    usage_errors,
)
from pipeline.cli.progress import case_line, progress_bar
from pipeline.processes import importing

if TYPE_CHECKING:
    from pipeline.evaluation import SummaryRow


@command()
@click.argument("bundle")
@click.argument("dataset", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for predictions and scores.",
)
@click.option(
    "--splits",
    help="JSON file of folds, in the dataset's folder or elsewhere. "
    "Without it every case is scored.",
)
@click.option(
    "--fold",
    type=int,
    default=0,
    show_default=True,
    help="Number of the fold whose validation cases are scored.",
)
@click.option(
    "--tolerance",
    type=float,
    default=1.0,
    show_default=True,
    metavar="MM",
    help="Tolerance of surface Dice (nsd), mm.",
)
@device_option()
@precision_option()
@set_option()
@trust_option()
@click.option("--overwrite", is_flag=True, help="Segment cases again that are already segmented.")
@json_option("Print the summary as JSON on stdout.")
def evaluate(
    bundle: str,
    dataset: tuple[str, ...],
    output: Path,
    splits: str | None,
    fold: int,
    tolerance: float,
    device: str,
    precision: str,
    overrides: dict[str, Any],
    trust: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Segment the labelled cases of a DATASET and score them against their labels.

    DATASET is one folder, a folder of images and one of labels, or a CSV with the columns case, one
    per channel, and label.

    Writes the same files as `segment`, and scores.csv (one row per case and label), summary.csv and
    summary.json (means with bootstrap 95 % intervals, medians, counts of misses), dice.png and
    worst.png. A case that could not be segmented is scored as one in which nothing was found; one
    whose label map cannot be used is listed and not scored. Either gives the exit status 1.
    """
    with usage_errors():
        with importing():
            from pipeline.bundle import open_for_cases
            from pipeline.evaluation import evaluate
            from pipeline.io import fold_cases

        model = open_for_cases(
            bundle, device=device, precision=precision, trust=trust, overrides=overrides
        )
        cases = fold_cases(dataset, splits, fold, "val")
        with progress_bar("segmenting", len(cases)) as advance:
            evaluation = evaluate(
                model,
                cases,
                output,
                tolerance_mm=tolerance,
                overwrite=overwrite,
                progress=lambda row: advance(case_line(row)),
            )
    if as_json:
        click.echo(json.dumps([row.columns() for row in evaluation.summary], indent=2))
    else:
        print_summary(evaluation.summary)
    for case, reason in evaluation.failed.items():
        click.echo(f"failed: {case}: {reason}", err=True)
    sys.exit(SOME_FAILED if evaluation.failed else DONE)


@command()
@click.argument("ours", type=click.Path(path_type=Path))
@click.argument("theirs", type=click.Path(path_type=Path))
@click.option(
    "--metric",
    default="dice",
    show_default=True,
    help="Metric to compare: the name of a column of scores.csv.",
)
def compare(ours: Path, theirs: Path, metric: str) -> None:
    """Compare two folders with results of `evaluate`, case by case.

    Prints per label both means over the cases that both folders score, the mean difference with its
    95 % bootstrap interval, and the p-value of a paired Wilcoxon signed-rank test.
    """
    with usage_errors():
        from pipeline.evaluation import compare_scores, read_scores

        our_scores, their_scores = (read_scores(path / "scores.csv") for path in (ours, theirs))
        compared = compare_scores(our_scores, their_scores, metric)
    for row in compared:
        means = f"{row.ours:.4f} against {row.theirs:.4f}"
        difference = f"{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}]"
        left_out = f" ({row.left_out} left out: infinite)" if row.left_out else ""
        click.echo(
            f"{row.label}: {metric} {means}, difference {difference} "
            f"over {row.cases} cases{left_out}, p = {row.p_value:.3g}"
        )


def print_summary(summary: Sequence[SummaryRow]) -> None:
    """Print a table with one line per label: means with 95 % intervals, medians and misses."""
    header = ["label", "cases", "dice [95 %]", "median", "nsd", "hd95_mm", "median", "missed"]
    lines = [[*header, "invented"], *(_summary_cells(row) for row in summary)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        # the first column is text, the others are numbers
        cells = [f"{line[0]:<{widths[0]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)]
        click.echo("  ".join(cells).rstrip())
    if any(row.metrics["hd95_mm"].infinite for row in summary):
        click.echo("hd95_mm: mean over finite values, with the number of infinite ones")


def _summary_cells(row: SummaryRow) -> list[str]:
    dice, distance = row.metrics["dice"], row.metrics["hd95_mm"]
    infinite = f" (+{distance.infinite} inf)" if distance.infinite else ""
    return [
        row.label,
        str(row.cases),
        f"{dice.mean:.4f} [{dice.low:.4f}, {dice.high:.4f}]",
        f"{dice.median:.4f}",
        f"{row.metrics['nsd'].mean:.4f}",
        f"{distance.mean:.2f}{infinite}",
        f"{distance.median:.2f}",
        str(row.missed),
        str(row.invented),
    ]
