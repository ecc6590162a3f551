"""The commands on bundles: new, check, info, refresh, import and export."""

from __future__ import annotations

import json
import shlex
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
    from pipeline.bundle import BundleInfo, CheckReport


@click.group("bundle")
def bundle_group() -> None:
    """Make, check, describe and refresh bundles."""


@bundle_group.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--name", help="Title of the bundle. Default: the name of its folder.")
@click.option(
    "--like",
    default="3d",
    show_default=True,
    metavar="3d|2d|brain|BUNDLE",
    help="Where the settings come from: 3d and 2d are general, brain is for whole heads, and "
    "BUNDLE is another bundle of volseg's.",
)
@click.option(
    "--labels",
    metavar="NAME[=VALUE],...",
    help="Structures to segment, separated by commas. Default: those of --like.",
)
@click.option(
    "--channels",
    metavar="NAME,...",
    help="Images of a case, separated by commas, such as T1w,FLAIR. Default: those of --like.",
)
@click.option("--authors", default="", help="Authors, for the card and the licence.")
@click.option(
    "--licence",
    "--license",
    default="Apache-2.0",
    show_default=True,
    metavar="NAME|FILE",
    help="Licence of the weights: Apache-2.0, MIT, CC-BY-4.0, none (no licence yet), or a file "
    "with its text.",
)
def new(
    folder: Path,
    name: str | None,
    like: str,
    labels: str | None,
    channels: str | None,
    authors: str,
    licence: str,
) -> None:
    """Make a bundle without weights in FOLDER, which must be new or empty.

    It passes `volseg bundle check` but for its weights, which `volseg train` writes. To have the
    settings chosen from a dataset instead, use `volseg plan`.
    """
    with usage_errors():
        from pipeline.training.planning import Draft, new_bundle, parse_labels

        draft = Draft(
            title=folder.resolve().name.replace("_", " ") if name is None else name,
            like=like,
            labels={} if labels is None else parse_labels(labels),
            channels=[] if channels is None else [part.strip() for part in channels.split(",")],
            authors=authors.strip(),
            licence=licence,
        )
        written = new_bundle(folder, draft)
    for file in written:
        click.echo(f"written  {folder / file}")
    run = shlex.quote(str(folder / "configs" / "run.yaml"))
    click.echo(f"describe it in {folder / 'configs' / 'card.yaml'}, then train and check it:")
    click.echo(f"  volseg train {run} dataset=FOLDER")
    click.echo(f"  volseg bundle check {shlex.quote(str(folder))}")


@bundle_group.command(cls=Command)
@click.argument("bundle")
@trust_option()
@json_option("Print the results as JSON on stdout.")
def check(bundle: str, trust: bool, as_json: bool) -> None:
    """Check a bundle by the rules of MONAI's model zoo and its weights by its spec, offline.

    BUNDLE is a folder, or the name of a shipped bundle, of volseg's or of MONAI's form. Each
    check has a line, `passed` or `failed`, with what was found, what was expected and what to do.
    The exit status is 1 if a check failed. Lines with `advice` are what the zoo's reviewers ask
    for. Checks that evaluate wiring that volseg did not write do not run without --trust.
    """
    with usage_errors():
        from pipeline.bundle import check_bundle

        report = check_bundle(bundle, trust=trust)
    if as_json:
        content = {
            name: [asdict(finding) for finding in found] for name, found in report.findings.items()
        }
        click.echo(json.dumps(content, indent=2))
    else:
        _print_report(report)
    sys.exit(SOME_FAILED if report.errors else DONE)


def _print_report(report: CheckReport) -> None:
    """Print a line for each check that passed, and one for each finding."""
    states = {"error": "failed", "advice": "advice"}
    for name, found in report.findings.items():
        if name not in report.errors:
            click.echo(f"passed  {name}")
        for finding in found:
            click.echo(f"{states[finding.level]}  {name}: {finding.text}")


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
