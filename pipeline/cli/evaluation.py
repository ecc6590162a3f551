"""The commands `evaluate` and `compare`. Slow modules are imported inside the commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.options import (
    DONE,
    SOME_FAILED,
    command,
    device_option,
    json_option,
    precision_option,
    trust_option,
    usage_errors,
)
from pipeline.cli.progress import case_line, progress_bar

if TYPE_CHECKING:
    from pipeline.evaluation import SummaryRow

SHOWN_METRICS = ("dice", "nsd", "hd95_mm")  # summary.json has all metrics


@command()
@click.argument("bundle")
@click.argument("dataset")
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
@trust_option()
@click.option("--overwrite", is_flag=True, help="Segment cases again that are already segmented.")
@json_option("Print the summary as JSON on stdout.")
def evaluate(
    bundle: str,
    dataset: str,
    output: Path,
    splits: str | None,
    fold: int,
    tolerance: float,
    device: str,
    precision: str,
    trust: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Segment the labelled cases of a dataset and score them against their labels.

    Writes the same files as `segment`, and scores.csv (one row per case and label), summary.json
    (means with bootstrap 95 % intervals), dice.png and worst.png. A case that failed is scored as
    one in which nothing was found.
    """
    with usage_errors():
        from pipeline.bundle import open_bundle
        from pipeline.evaluation import evaluate
        from pipeline.io import fold_cases

        model = open_bundle(bundle, device=device, precision=precision, trust=trust)
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

    Prints per label both means over the cases that both folders score, and the p-value of a paired
    Wilcoxon signed-rank test.
    """
    with usage_errors():
        from pipeline.evaluation import compare_scores, read_scores

        our_scores, their_scores = (read_scores(path / "scores.csv") for path in (ours, theirs))
        for row in compare_scores(our_scores, their_scores, metric):
            means = f"{row.ours:.4f} against {row.theirs:.4f}"
            click.echo(
                f"{row.label}: {metric} {means} over {row.cases} cases, p = {row.p_value:.3g}"
            )


def print_summary(summary: Sequence[SummaryRow]) -> None:
    """Print, for each label, the means of `SHOWN_METRICS` over cases with their 95 % intervals."""
    for row in summary:
        parts = []
        for metric in SHOWN_METRICS:
            value = row.metrics[metric]
            parts.append(f"{metric} {value.mean:.4f} [{value.low:.4f}, {value.high:.4f}]")
        click.echo(f"{row.label}: {', '.join(parts)} over {row.cases} cases")
