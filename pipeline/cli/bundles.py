"""The commands on bundles: check, info, refresh, import and export."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.options import (
    DONE,
    SOME_FAILED,
    Command,
    command,
    json_option,
    trust_option,
    usage_errors,
)

if TYPE_CHECKING:
    from pipeline.bundle import BundleInfo


@click.group("bundle")
def bundle_group() -> None:
    """Check, describe and refresh bundles."""


@bundle_group.command(cls=Command)
@click.argument("bundle")
@trust_option()
@json_option("Print the results as JSON on stdout.")
def check(bundle: str, trust: bool, as_json: bool) -> None:
    """Check a bundle by MONAI's own checks, offline, and its weights against its spec.

    BUNDLE is a folder, or the name of a shipped bundle. Exit status 1 when a check fails. Checks
    that evaluate wiring that volseg did not write fail without --trust; nothing of it runs.
    """
    with usage_errors():
        from pipeline.bundle import check_bundle

        results = check_bundle(bundle, trust=trust)
    if as_json:
        click.echo(json.dumps(results, indent=2))
    else:
        for name, reason in results.items():
            outcome = f"failed  {name}: {reason}" if reason else f"passed  {name}"
            click.echo(outcome)
    sys.exit(SOME_FAILED if any(results.values()) else DONE)


@bundle_group.command(cls=Command)
@click.argument("bundle")
@json_option("Print the description as JSON on stdout.")
def info(bundle: str, as_json: bool) -> None:
    """Describe a bundle without running anything in it.

    BUNDLE is a folder, or the name of a shipped bundle. Shows who wrote its wiring, whether it
    needs --trust, and the hashes of its code, its spec and its weights; of a bundle of MONAI's form
    also which files a case consists of and what it gives.
    """
    with usage_errors():
        from pipeline.bundle import bundle_info

        found = bundle_info(bundle)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
    else:
        _print_info(found)


def _print_info(found: BundleInfo) -> None:
    """Print one line per fact of a bundle."""
    needs = "yes: look at its files first" if found.needs_trust else "no"
    lines = {
        "folder": found.folder,
        "name": found.name or "none",
        "version": found.version or "none",
        "channels": ", ".join(found.channels) or "none",
        "labels": ", ".join(f"{value}: {name}" for name, value in found.labels.items()) or "none",
        "wiring": ", ".join(f"{name} {origin}" for name, origin in found.wiring.items()),
        "needs --trust": needs,
        "files not volseg's": ", ".join(found.foreign_files) or "none",
        "SHA-256 of code": found.code_sha256,
        "SHA-256 of spec": found.spec_sha256 or "none",
        "SHA-256 of weights": found.weights_sha256 or "none",
    }
    width = max(map(len, lines))
    for name, value in lines.items():
        click.echo(f"{name:{width}}  {value}")
    for note in found.notes:
        click.echo(f"{'note':{width}}  {note}")


@bundle_group.command(cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace wiring (inference.yaml, train.yaml) that was edited, too.",
)
def refresh(bundle: Path, overwrite: bool) -> None:
    """Rewrite the generated files of a bundle as this version of volseg writes them.

    These are its wiring and metadata.json; keys of the spec that an earlier version named otherwise
    are renamed. Wiring that was edited stays, unless --overwrite is given.
    """
    with usage_errors():
        from pipeline.bundle import refresh_bundle

        refreshed = refresh_bundle(bundle, overwrite=overwrite)
    for name in refreshed.written:
        click.echo(f"written  configs/{name}")
    for name in refreshed.kept:
        click.echo(f"kept     configs/{name} (it was edited; --overwrite replaces it)")


@command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the bundle to write; it must not hold a bundle.",
)
@click.option(
    "--fold",
    "folds",
    multiple=True,
    metavar="FOLD",
    help="Fold of nnU-Net, its number or all; may be repeated. Default: every finished fold.",
)
@click.option(
    "--best", is_flag=True, help="Take nnU-Net's checkpoint_best.pth, not its checkpoint_final.pth."
)
@click.option(
    "--mirror",
    is_flag=True,
    help="Average mirror images, as nnUNetv2_predict does without --disable_tta.",
)
def import_command(
    source: Path, output: Path, folds: tuple[str, ...], best: bool, mirror: bool
) -> None:
    """Make a bundle from a trained model of nnU-Net or a published checkpoint.

    SOURCE is the folder of a model of nnU-Net 2, with plans.json, dataset.json and fold_0 …, or a
    bundle that MONAI made of one; several folds become an ensemble. Or it is a file of a U-Net that
    is recognised by its keys: the tutorial U-Net and brain-segmentation-pytorch (the unet of
    PyTorch Hub), in 2D and 3D and of any size.
    """
    with usage_errors():
        from pipeline.bundle import import_checkpoint, import_nnunet, is_nnunet_folder

        if not is_nnunet_folder(source):
            _refuse_nnunet_options(folds, best=best, mirror=mirror)
            network = import_checkpoint(source, output)
            click.echo(f"recognised the {network.name}; the bundle is in {output}", err=True)
            return
        model = import_nnunet(source, output, folds=folds, best=best, mirror=mirror)
    files = ", ".join(f"{name}/{path.name}" for name, path in model.checkpoints.items())
    click.echo(
        f"recognised nnU-Net's {model.name}, {model.configuration}, {files}; the bundle is in "
        f"{output}",
        err=True,
    )


def _refuse_nnunet_options(folds: tuple[str, ...], *, best: bool, mirror: bool) -> None:
    """Raise UsageError if an option was given that only models of nnU-Net have."""
    if folds or best or mirror:
        raise click.UsageError(
            "--fold, --best and --mirror are for the folder of a model of nnU-Net; SOURCE is a file"
        )


@command()
@click.argument("bundle")
@click.option(
    "--to",
    type=click.Choice(["openvino", "onnx", "torchscript"]),
    required=True,
    help="Runtime that is to load the network.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "int8"]),
    default="float32",
    show_default=True,
    help="Precision of the exported network; int8 needs --to openvino and --calibrate.",
)
@click.option(
    "--calibrate",
    multiple=True,
    metavar="FOLDER",
    help="File or folder of real volumes, to calibrate int8 on and to compare on; may be repeated.",
)
def export(bundle: str, to: Any, precision: Any, calibrate: tuple[str, ...]) -> None:
    """Write a bundle's network for another runtime into its models/ folder.

    A report of how far it agrees with torch is printed and written next to it. The int8 model is
    what `segment --precision int8` runs.
    """
    with usage_errors():
        from pipeline.bundle import export_bundle

        report = export_bundle(bundle, to, precision=precision, calibrate=calibrate)
    click.echo(json.dumps(report, indent=2))
