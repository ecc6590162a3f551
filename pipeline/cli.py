"""The command `volseg`. Printing happens here only; whatever is slow to import is imported inside a command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from pipeline.errors import PipelineError
from pipeline.progress import epoch_line, line, progress, quiet

DONE, SOME_FAILED, WRONG = 0, 1, 2
DEVICES = click.Choice(["auto", "cpu", "cuda", "mps"])
RUNTIMES = click.Choice(["auto", "torch", "openvino"])
PRECISIONS = click.Choice(["auto", "float32", "bfloat16", "int8"])
SHOWN = ("dice", "nsd", "hd95_mm")


class Refusal(click.ClickException):
    """A PipelineError as the command line shows it: one line on stderr, exit status 2."""

    exit_code = WRONG


@contextmanager
def refusals() -> Iterator[None]:
    """Turns errors that the user can mend into messages without a traceback."""
    try:
        yield
    except PipelineError as error:
        raise Refusal(str(error)) from error


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="volseg")
def main() -> None:
    """Segment MRI volumes with 2D and 3D U-Nets, as MONAI bundles.

    Exit status: 0 all done, 1 at least one case failed (the others are written), 2 the command or its configuration is wrong.
    """


@main.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@click.option("-b", "--bundle", required=True, help="Bundle to use: a folder, or the name of one that ships.")
@click.option("--device", type=DEVICES, default="auto", show_default=True, help="Where the network runs.")
@click.option("--overlap", type=float, help="Of neighbouring windows, a fraction; the bundle's own by default.")
@click.option("--runtime", type=RUNTIMES, default="auto", show_default=True, help="What runs the network.")
@click.option("--precision", type=PRECISIONS, default="auto", show_default=True, help="Of the network's arithmetic.")
@click.option(
    "--max-memory", metavar="SIZE", help="Memory that the process may come to hold, such as 4G; the labels are the same."
)
@click.option("--uncertainty", is_flag=True, help="Write <name>_uncertainty.nii.gz too: 0 sure, 1 all labels alike.")
@click.option("--volume", type=int, help="Which volume of 4D files to segment, from 0.")
@click.option("--overwrite", is_flag=True, help="Do cases again that are done already.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows of cases.csv as JSON on stdout.")
def segment(
    inputs: tuple[str, ...],
    output: Path,
    bundle: str,
    device: str,
    overlap: float | None,
    runtime: str,
    precision: str,
    max_memory: str | None,
    uncertainty: bool,
    volume: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Segment files, folders and globs of MRI volumes.

    Leaves in the output folder a <name>_seg.nii.gz on each input's own grid, volumes.csv (mm³ a structure), cases.csv (one row
    an input: status, warnings, seconds, memory) and run.json. A case that fails is named, and the others go on. Started again,
    it goes on where it stopped.
    """
    with refusals():
        from pipeline import batch
        from pipeline.bundle import open_model
        from pipeline.cases import find_cases
        from pipeline.memory import parse_size

        quiet()
        model = open_model(
            bundle,
            device=device,
            overlap=overlap,
            volume=volume,
            runtime=runtime,
            precision=precision,
            max_memory=parse_size(max_memory) if max_memory else None,
            uncertainty=uncertainty,
        )
        cases = find_cases(inputs, model.spec)
        with progress("segmenting", len(cases)) as advance:
            rows = batch.segment(model, cases, output, overwrite=overwrite, progress=lambda _, row: advance(line(row)))
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    failed = sum(row["status"] == "failed" for row in rows)
    click.echo(_outcome(len(rows), failed, output), err=True)
    sys.exit(SOME_FAILED if failed else DONE)


def _outcome(cases: int, failed: int, output: Path) -> str:
    return f"{cases - failed} of {cases} cases are in {output}" + (f", {failed} failed (see cases.csv)" if failed else "")


@main.command()
@click.argument("bundle")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON on stdout.")
def check(bundle: str, as_json: bool) -> None:
    """Check a bundle: MONAI's own checks, offline, and the weights against the spec."""
    with refusals():
        from pipeline.verify import check as check_bundle

        quiet()
        results = check_bundle(bundle)
    if as_json:
        click.echo(json.dumps(results, indent=2))
    else:
        for name, reason in results.items():
            click.echo(f"{'failed' if reason else 'passed'}  {name}" + (f": {reason}" if reason else ""))
    sys.exit(SOME_FAILED if any(results.values()) else DONE)


@main.command("import")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the bundle to write.")
def import_(checkpoint: Path, output: Path) -> None:
    """Make a bundle of a published checkpoint, recognised by its keys.

    Understands the tutorial U-Net and brain-segmentation-pytorch (the PyTorch Hub unet), in 2D and 3D, whatever their size.
    """
    with refusals():
        from pipeline.adopt import NAMES, import_checkpoint

        quiet()
        kind = import_checkpoint(checkpoint, output)
    click.echo(f"recognised the {NAMES[kind]}; the bundle is in {output}", err=True)


@main.command()
@click.argument("bundle")
@click.option("--to", type=click.Choice(["openvino", "onnx", "torchscript"]), required=True, help="What is to load it.")
@click.option(
    "--precision", type=click.Choice(["float32", "int8"]), default="float32", show_default=True, help="Of its numbers."
)
@click.option("--calibrate", multiple=True, metavar="FOLDER", help="Real volumes to calibrate int8 on, and to compare on.")
def export(bundle: str, to: Any, precision: Any, calibrate: tuple[str, ...]) -> None:
    """Write a bundle's network for another runtime into its models/, with a report of how far it agrees with torch.

    The int8 model is what `segment --precision int8` runs.
    """
    with refusals():
        from pipeline.export import export as export_bundle

        quiet()
        report = export_bundle(bundle, to, precision=precision, calibrate=calibrate)
    click.echo(json.dumps(report, indent=2))


@main.command()
@click.argument("dataset", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="YAML file of the run to write.")
@click.option("--minutes", type=float, default=60.0, show_default=True, help="That training one fold may take here.")
@click.option("--dims", type=click.Choice(["2", "3"]), default="3", show_default=True, help="Slices or volumes.")
def plan(dataset: tuple[Path, ...], output: Path, minutes: float, dims: str) -> None:
    """Plan a training run for a DATASET: a folder, or one of images and one of labels.

    Looks at every pair and names all that is wrong; takes the data's fingerprint, times a few steps on this machine and writes
    the run (OUTPUT) and a bundle beside it that holds all but the weights, each choice with its reason.
    """
    with refusals():
        from contextlib import ExitStack

        from pipeline.draft import draft, table

        quiet()
        with ExitStack() as stack:
            made = draft(
                dataset,
                output,
                minutes=minutes,
                dims=int(dims),
                looked=lambda total: stack.enter_context(progress("looking", total)),
            )
    if made.problems:
        click.echo(f"{len(made.problems)} files or cases are left out:\n{table(made.problems)}", err=True)
    click.echo(f"{made.cases} cases ({made.layout.kind})")
    for choice in made.choices:
        click.echo(f"{choice.name}: {choice.value}  ({choice.why})")
    click.echo(f"a fold will take about {made.seconds / 60:.1f} minutes: volseg train {output}")


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("changes", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--resume", is_flag=True, help="Go on where a run that was cut off had ended its last whole epoch.")
@click.option("--restart", is_flag=True, help="Throw away a run that was cut off, and start anew.")
def train(config: Path, changes: tuple[str, ...], resume: bool, restart: bool) -> None:
    """Train the bundle that a run configuration names, and leave it complete.

    KEY=VALUE changes one setting of the configuration, such as epochs=5 or augment.rotation=30. A run that was killed goes on
    with --resume and ends with the same weights as one that was not.
    """
    with refusals():
        from pipeline.training import read_run, train_bundle

        quiet()
        run, content = read_run(config, changes)
        with progress("training", run.epochs) as advance:
            train_bundle(run, content, lambda row: advance(epoch_line(row, run.epochs)), resume=resume, restart=restart)
    click.echo(f"trained; the weights are in {run.bundle}/models", err=True)


@main.command()
@click.argument("bundle")
@click.argument("dataset")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for predictions and scores.")
@click.option("--splits", help="JSON file of folds beside dataset.json; scores every case without it.")
@click.option("--fold", type=int, default=0, show_default=True, help="Which fold's validation cases to score.")
@click.option("--tolerance", type=float, default=1.0, show_default=True, help="Of surface Dice (nsd), mm.")
@click.option("--device", type=DEVICES, default="auto", show_default=True, help="Where the network runs.")
@click.option("--precision", type=PRECISIONS, default="auto", show_default=True, help="Of the network's arithmetic.")
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
    intervals) and dice.png. A case that failed is scored as one in which nothing was found.
    """
    with refusals():
        from pipeline import batch, score
        from pipeline.bundle import open_model
        from pipeline.dataset import fold_cases
        from pipeline.picture import dice_bars
        from pipeline.report import write_csv, write_json

        quiet()
        model = open_model(bundle, device=device, precision=precision)
        cases = fold_cases(dataset, splits, fold, "val")
        with progress("segmenting", len(cases)) as advance:
            rows = batch.segment(model, cases, output, overwrite=overwrite, progress=lambda _, row: advance(line(row)))
        scores = []
        for case in cases:
            prediction = batch.output_path(output, case["case"])
            scores += score.score_case(case, prediction, model.spec.labels, tolerance_mm=tolerance)
        summary = score.summary(scores)
        write_csv(output / "scores.csv", scores)
        write_json(output / "summary.json", {"tolerance_mm": tolerance, "labels": summary})
        dice_bars(scores, output / "dice.png", title=bundle)
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        _print_summary(summary)
    sys.exit(SOME_FAILED if any(row["status"] == "failed" for row in rows) else DONE)


@main.command()
@click.argument("ours", type=click.Path(path_type=Path))
@click.argument("theirs", type=click.Path(path_type=Path))
@click.option("--metric", default="dice", show_default=True, help="A column of scores.csv.")
def compare(ours: Path, theirs: Path, metric: str) -> None:
    """Compare two folders that `evaluate` left, case by case, by a paired Wilcoxon signed-rank test."""
    with refusals():
        from pipeline import score
        from pipeline.report import read_csv

        for row in score.compare(read_csv(ours / "scores.csv"), read_csv(theirs / "scores.csv"), metric):
            means = f"{row['ours']:.4f} against {row['theirs']:.4f}"
            click.echo(f"{row['label']}: {metric} {means} over {row['cases']} cases, p = {row['p_value']:.3g}")


def _print_summary(summary: Sequence[dict[str, Any]]) -> None:
    """The means that a reader looks for first, with their 95 % intervals."""
    for row in summary:
        parts = [f"{metric} {row[metric]:.4f} [{row[metric + '_low']:.4f}, {row[metric + '_high']:.4f}]" for metric in SHOWN]
        click.echo(f"{row['label']}: {', '.join(parts)} over {row['cases']} cases")


if __name__ == "__main__":
    main()
