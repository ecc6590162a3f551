"""The commands that plan, train and score; whatever is slow to import is imported inside a command."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.cli.progress import (
    DONE,
    SOME_FAILED,
    case_line,
    epoch_line,
    progress_bar,
    quiet,
    usage_errors,
)

DEVICES = click.Choice(["auto", "cpu", "cuda", "mps"])
PRECISIONS = click.Choice(["auto", "float32", "bfloat16", "int8"])
WORST = 3  # cases that are drawn
SHOWN = ("dice", "nsd", "hd95_mm")


@click.command()
@click.argument("dataset", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="YAML file of the run to write.",
)
@click.option(
    "--minutes",
    type=float,
    default=60.0,
    show_default=True,
    help="That training one fold may take here.",
)
@click.option(
    "--dims",
    type=click.Choice(["2", "3"]),
    default="3",
    show_default=True,
    help="Slices or volumes.",
)
def plan(dataset: tuple[Path, ...], output: Path, minutes: float, dims: str) -> None:
    """Plan a training run for a DATASET: a folder, or one of images and one of labels.

    Looks at every pair and names all that is wrong; takes the data's fingerprint, times a few steps on this machine and writes
    the run (OUTPUT) and a bundle beside it that holds all but the weights, each choice with its reason.
    """
    with usage_errors():
        from contextlib import ExitStack

        from pipeline.training.planning import plan_training, problem_table

        quiet()
        with ExitStack() as stack:
            made = plan_training(
                dataset,
                output,
                minutes=minutes,
                dims=int(dims),
                looked=lambda total: stack.enter_context(progress_bar("looking", total)),
            )
    if made.problems:
        click.echo(
            f"{len(made.problems)} files or cases are left out:\n{problem_table(made.problems)}",
            err=True,
        )
    click.echo(f"{made.cases} cases ({made.layout.kind})")
    for choice in made.choices:
        click.echo(f"{choice.name}: {choice.value}  ({choice.why})")
    click.echo(f"a fold will take about {made.seconds / 60:.1f} minutes: volseg train {output}")


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("changes", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on where a run that was cut off had ended its last whole epoch.",
)
@click.option("--restart", is_flag=True, help="Throw away a run that was cut off, and start anew.")
def train(config: Path, changes: tuple[str, ...], resume: bool, restart: bool) -> None:
    """Train the bundle that a run configuration names, and leave it complete.

    KEY=VALUE changes one setting of the configuration, such as epochs=5 or augment.rotation=30. A run that was killed goes on
    with --resume and ends with the same weights as one that was not.
    """
    with usage_errors():
        from pipeline.training import is_first_process, read_run, train_bundle

        quiet()
        run, content = read_run(config, changes)
        with progress_bar("training", run.epochs) as advance:
            train_bundle(
                run,
                content,
                lambda row: advance(epoch_line(row, run.epochs)),
                resume=resume,
                restart=restart,
            )
    if is_first_process():
        click.echo(f"trained; the weights are in {run.bundle}/models", err=True)


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("changes", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--fold",
    "folds",
    type=int,
    multiple=True,
    help="A fold to train now, once or more often; all by default.",
)
def crossval(config: Path, changes: tuple[str, ...], folds: tuple[int, ...]) -> None:
    """Train every fold of a run, score the cases that each left out, and join them to one ensemble bundle.

    Started again it goes on where it was cut off. Predictions, scores.csv, summary.json and dice.png are in the bundle's
    crossval/, the folds in its folds/.
    """
    with usage_errors():
        from contextlib import ExitStack

        from pipeline.training import cross_validate, read_run

        quiet()
        run, content = read_run(config, changes)
        with ExitStack() as stack:

            def epoch_done(fold: int) -> Any:
                advance = stack.enter_context(progress_bar(f"fold {fold}", run.epochs))
                return lambda row: advance(f"fold {fold}, {epoch_line(row, run.epochs)}")

            summary = cross_validate(run, content, only=folds, epoch_done=epoch_done)
    _print_summary(summary)


@click.command()
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
    "--splits", help="JSON file of folds beside dataset.json; scores every case without it."
)
@click.option(
    "--fold", type=int, default=0, show_default=True, help="Which fold's validation cases to score."
)
@click.option(
    "--tolerance", type=float, default=1.0, show_default=True, help="Of surface Dice (nsd), mm."
)
@click.option(
    "--device", type=DEVICES, default="auto", show_default=True, help="Where the network runs."
)
@click.option(
    "--precision",
    type=PRECISIONS,
    default="auto",
    show_default=True,
    help="Of the network's arithmetic.",
)
@click.option("--overwrite", is_flag=True, help="Segment cases again that are done already.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def evaluate(
    bundle: str,
    dataset: str,
    output: Path,
    splits: str | None,
    fold: int,
    tolerance: float,
    device: str,
    precision: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Segment the labelled cases of a dataset and score them against the labels as read.

    Writes beside what `segment` leaves: scores.csv (one row a case and label), summary.json (means with bootstrap 95 %
    intervals), dice.png and worst.png. A case that failed is scored as one in which nothing was found.
    """
    with usage_errors():
        from pipeline.batch import output_path, segment_cases
        from pipeline.bundle import open_bundle
        from pipeline.evaluation import (
            draw_dice,
            score_case,
            summarise_scores,
        )
        from pipeline.io import fold_cases, write_csv, write_json

        quiet()
        model = open_bundle(bundle, device=device, precision=precision)
        cases = fold_cases(dataset, splits, fold, "val")
        with progress_bar("segmenting", len(cases)) as advance:
            rows = segment_cases(
                model,
                cases,
                output,
                overwrite=overwrite,
                progress=lambda _, row: advance(case_line(row)),
            )
        scores = []
        for case in cases:
            prediction = output_path(output, case["case"])
            scores += score_case(case, prediction, model.spec.labels, tolerance_mm=tolerance)
        summary = summarise_scores(scores)
        write_csv(output / "scores.csv", scores)
        write_json(output / "summary.json", {"tolerance_mm": tolerance, "labels": summary})
        draw_dice(scores, output / "dice.png", title=bundle)
        _draw_worst(cases, scores, output, model.spec.labels)
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        _print_summary(summary)
    sys.exit(SOME_FAILED if any(row["status"] == "failed" for row in rows) else DONE)


@click.command()
@click.argument("ours", type=click.Path(path_type=Path))
@click.argument("theirs", type=click.Path(path_type=Path))
@click.option("--metric", default="dice", show_default=True, help="A column of scores.csv.")
def compare(ours: Path, theirs: Path, metric: str) -> None:
    """Compare two folders that `evaluate` left, case by case, by a paired Wilcoxon signed-rank test."""
    with usage_errors():
        from pipeline.evaluation import compare_scores
        from pipeline.io import read_csv

        for row in compare_scores(
            read_csv(ours / "scores.csv"), read_csv(theirs / "scores.csv"), metric
        ):
            means = f"{row['ours']:.4f} against {row['theirs']:.4f}"
            click.echo(
                f"{row['label']}: {metric} {means} over {row['cases']} cases, p = {row['p_value']:.3g}"
            )


def _draw_worst(
    cases: Sequence[Any], scores: Sequence[Any], output: Path, names: Mapping[str, int]
) -> None:
    """worst.png: the cases with the lowest Dice that were segmented at all, beside their labels."""
    from pipeline.batch import output_path
    from pipeline.evaluation import (
        draw_worst_cases,
        worst_cases,
    )
    from pipeline.io import read

    by_name = {case["case"]: case for case in cases if output_path(output, case["case"]).is_file()}
    drawn = []
    for name in worst_cases([row for row in scores if row["case"] in by_name], WORST):
        image, label = by_name[name]["image"], by_name[name]["label"]
        first = image[0] if isinstance(image, list | tuple) else image
        drawn.append((name, read(first), read(output_path(output, name)), read(label)))
    if drawn:
        draw_worst_cases(drawn, names, output / "worst.png")


def _print_summary(summary: Sequence[dict[str, Any]]) -> None:
    """The means that a reader looks for first, with their 95 % intervals."""
    for row in summary:
        parts = [
            f"{metric} {row[metric]:.4f} [{row[metric + '_low']:.4f}, {row[metric + '_high']:.4f}]"
            for metric in SHOWN
        ]
        click.echo(f"{row['label']}: {', '.join(parts)} over {row['cases']} cases")


COMMANDS = (plan, train, crossval, evaluate, compare)
