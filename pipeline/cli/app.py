"""The command `volseg`. Printing happens here only; whatever is slow to import is imported inside a command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from pipeline.cli.progress import DONE, SOME_FAILED, case_line, progress_bar, quiet, usage_errors
from pipeline.cli.training import COMMANDS, DEVICES, PRECISIONS
from pipeline.defaults import DEFAULT_BUNDLE

RUNTIMES = click.Choice(["auto", "torch", "openvino"])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="volseg")
def main() -> None:
    """Segment MRI volumes with 2D and 3D U-Nets, as MONAI bundles.

    Exit status: 0 all done, 1 at least one case failed (the others are written), 2 the command or its configuration is wrong.
    """


@main.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the results."
)
@click.option(
    "-b",
    "--bundle",
    default=DEFAULT_BUNDLE,
    show_default=True,
    help="A folder, or the name of a bundle that ships.",
)
@click.option(
    "--device", type=DEVICES, default="auto", show_default=True, help="Where the network runs."
)
@click.option(
    "--overlap",
    type=float,
    help="Of neighbouring windows, a fraction; the bundle's own by default.",
)
@click.option(
    "--runtime", type=RUNTIMES, default="auto", show_default=True, help="What runs the network."
)
@click.option(
    "--precision",
    type=PRECISIONS,
    default="auto",
    show_default=True,
    help="Of the network's arithmetic.",
)
@click.option(
    "--max-memory",
    metavar="SIZE",
    help="Memory that the process may come to hold, such as 4G; the labels are the same.",
)
@click.option(
    "--uncertainty",
    is_flag=True,
    help="Write <name>_uncertainty.nii.gz too: 0 sure, 1 all labels alike.",
)
@click.option(
    "--labels-spacing",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MM",
    help="Voxel size of the label maps; each input's own by default.",
)
@click.option("--volume", type=int, help="Which volume of 4D files to segment, from 0.")
@click.option("--overwrite", is_flag=True, help="Do cases again that are done already.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the rows of cases.csv as JSON on stdout."
)
def segment(
    inputs: tuple[str, ...],
    output: Path,
    max_memory: str | None,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Segment files, folders and globs of MRI volumes.

    Leaves in the output folder a <name>_seg.nii.gz on each input's own grid, volumes.csv (mm³ a structure), cases.csv (one row
    an input: status, warnings, seconds, memory) and run.json. A case that fails is named, and the others go on. Started again,
    it goes on where it stopped.
    """
    with usage_errors():
        from pipeline.batch import segment_cases
        from pipeline.bundle import open_bundle
        from pipeline.inference import parse_size
        from pipeline.io import find_cases

        quiet()
        model = open_bundle(**settings, max_memory=parse_size(max_memory) if max_memory else None)
        cases = find_cases(inputs, model.spec)
        with progress_bar("segmenting", len(cases)) as advance:
            rows = segment_cases(
                model,
                cases,
                output,
                overwrite=overwrite,
                progress=lambda _, row: advance(case_line(row)),
            )
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    failed = sum(row["status"] == "failed" for row in rows)
    click.echo(_outcome(len(rows), failed, output), err=True)
    sys.exit(SOME_FAILED if failed else DONE)


def _outcome(cases: int, failed: int, output: Path) -> str:
    return f"{cases - failed} of {cases} cases are in {output}" + (
        f", {failed} failed (see cases.csv)" if failed else ""
    )


@main.command()
@click.argument("bundle")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON on stdout.")
def check(bundle: str, as_json: bool) -> None:
    """Check a bundle: MONAI's own checks, offline, and the weights against the spec."""
    with usage_errors():
        from pipeline.bundle import check_bundle

        quiet()
        results = check_bundle(bundle)
    if as_json:
        click.echo(json.dumps(results, indent=2))
    else:
        for name, reason in results.items():
            click.echo(
                f"{'failed' if reason else 'passed'}  {name}" + (f": {reason}" if reason else "")
            )
    sys.exit(SOME_FAILED if any(results.values()) else DONE)


@main.command("import")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the bundle to write.",
)
def import_(checkpoint: Path, output: Path) -> None:
    """Make a bundle of a published checkpoint, recognised by its keys.

    Understands the tutorial U-Net and brain-segmentation-pytorch (the PyTorch Hub unet), in 2D and 3D, whatever their size.
    """
    with usage_errors():
        from pipeline.bundle import NAMES, import_checkpoint

        quiet()
        kind = import_checkpoint(checkpoint, output)
    click.echo(f"recognised the {NAMES[kind]}; the bundle is in {output}", err=True)


@main.command()
@click.argument("bundle")
@click.option(
    "--to",
    type=click.Choice(["openvino", "onnx", "torchscript"]),
    required=True,
    help="What is to load it.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "int8"]),
    default="float32",
    show_default=True,
    help="Of its numbers.",
)
@click.option(
    "--calibrate",
    multiple=True,
    metavar="FOLDER",
    help="Real volumes to calibrate int8 on, and to compare on.",
)
def export(bundle: str, to: Any, precision: Any, calibrate: tuple[str, ...]) -> None:
    """Write a bundle's network for another runtime into its models/, with a report of how far it agrees with torch.

    The int8 model is what `segment --precision int8` runs.
    """
    with usage_errors():
        from pipeline.bundle import export_bundle

        quiet()
        report = export_bundle(bundle, to, precision=precision, calibrate=calibrate)
    click.echo(json.dumps(report, indent=2))


for command in COMMANDS:
    main.add_command(command)

if __name__ == "__main__":
    main()
