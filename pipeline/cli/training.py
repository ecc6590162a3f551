"""The commands `plan`, `train` and `crossval`. Slow modules are imported inside the commands."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import click

from pipeline.cli.evaluation import print_summary
from pipeline.cli.options import command, trust_option, usage_errors
from pipeline.cli.progress import epoch_line, progress_bar, validation_line


@command()
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
    help="Wall time of training one fold on this machine, with its final validation, minutes.",
)
@click.option(
    "--dims",
    type=click.Choice(["2", "3"]),
    default="3",
    show_default=True,
    help="Dimensions of the network: 2 for slices, 3 for volumes.",
)
@click.option(
    "--preset",
    type=click.Choice(["fast", "balanced", "best"]),
    default="balanced",
    show_default=True,
    help="How much of the time is spent on accuracy: fast has a smaller network, best averages "
    "more networks where the time allows.",
)
def plan(
    dataset: tuple[Path, ...],
    output: Path,
    minutes: float,
    dims: str,
    preset: Literal["fast", "balanced", "best"],
) -> None:
    """Plan a training run for a DATASET: one folder, or a folder of images and one of labels.

    All pairs of image and label are read, and each problem is listed. Spec and run are chosen from
    the properties of the data and the time of a few training steps on this machine; each choice is
    printed with its reason. The run is written to OUTPUT, and a bundle without weights next to it.
    """
    with usage_errors():
        from contextlib import ExitStack

        from pipeline.training.planning import plan_training, problem_table

        with ExitStack() as stack:
            made = plan_training(
                dataset,
                output,
                minutes=minutes,
                dims=int(dims),
                preset=preset,
                start_progress=lambda total: stack.enter_context(progress_bar("reading", total)),
            )
    if made.problems:
        click.echo(
            f"{len(made.problems)} files or cases are left out:\n{problem_table(made.problems)}",
            err=True,
        )
    click.echo(f"{made.cases} cases ({made.layout.kind})")
    for choice in made.choices:
        click.echo(f"{choice.name}: {choice.value}  ({choice.explanation})")
    for warning in made.warnings:
        click.echo(f"Warning: {warning}", err=True)
    click.echo(f"a fold will take about {made.seconds / 60:.1f} minutes: volseg train {output}")


@command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("changes", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--resume",
    is_flag=True,
    help="Continue an interrupted run after its last complete epoch.",
)
@click.option("--restart", is_flag=True, help="Discard an interrupted run and start again.")
@trust_option()
def train(config: Path, changes: tuple[str, ...], resume: bool, restart: bool, trust: bool) -> None:
    """Train the bundle that a run configuration names.

    KEY=VALUE changes one setting of the configuration, such as epochs=5 or augment.rotation=30. A
    run that was interrupted continues with --resume; its weights are those of a run without an
    interruption.
    """
    started = time.monotonic()  # the imports take seconds, which count for the time limit
    with usage_errors():
        from pipeline.training import is_first_process, read_run
        from pipeline.training import train as train_run

        run, _ = read_run(config, changes)
        with progress_bar("training", run.epochs) as advance:
            folder = train_run(
                config,
                changes,
                resume=resume,
                restart=restart,
                trust=trust,
                progress=lambda row: advance(epoch_line(row, run.epochs)),
                case_done=validation_line,
                started=started,
            )
    if is_first_process():
        click.echo(f"trained; the weights are in {folder}/models", err=True)


@command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("changes", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--fold",
    "folds",
    type=int,
    multiple=True,
    help="Number of a fold to train; give it several times for several folds. Default: all folds.",
)
def crossval(config: Path, changes: tuple[str, ...], folds: tuple[int, ...]) -> None:
    """Train every fold of a run, score its held-out cases and join the folds to an ensemble.

    Continues where an earlier call was interrupted. The bundle's folder crossval/ has the
    predictions, scores.csv, summary.json and dice.png; folds/ has the bundle of each fold.
    """
    with usage_errors():
        from contextlib import ExitStack

        from pipeline.training import cross_validate, read_run

        run, content = read_run(config, changes)
        with ExitStack() as stack:

            def epoch_done(fold: int) -> Any:
                advance = stack.enter_context(progress_bar(f"fold {fold}", run.epochs))
                return lambda row: advance(f"fold {fold}, {epoch_line(row, run.epochs)}")

            summary = cross_validate(run, content, only=folds, epoch_done=epoch_done)
    print_summary(summary)
