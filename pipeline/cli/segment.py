"""The commands `volseg segment` and `volseg tables`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.batches import (
    BatchOptions,
    label_table_option,
    model_options,
    repetition_options,
    segment_batch,
    worker_options,
)
from pipeline.cli.options import command, usage_errors
from pipeline.cli.reports import show_report
from pipeline.defaults import INTRACRANIAL, STATISTICS
from pipeline.processes import importing

if TYPE_CHECKING:
    from pipeline.inference import CaseModel
    from pipeline.io import StructureCode
    from pipeline.types import Case


@command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder that the results are written to; made if it does not exist.",
)
@model_options()
@worker_options()
@click.option(
    "--uncertainty",
    is_flag=True,
    help="Write <name>_uncertainty.nii.gz as well: the entropy of the scores, 0 to 1.",
)
@click.option(
    "--probabilities",
    is_flag=True,
    help="Write <name>_probabilities.nii.gz as well: a 4D file with the probability of each label.",
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
@click.option(
    "--modality",
    "modalities",
    multiple=True,
    default=["MR"],
    show_default=True,
    metavar="CODE",
    help="Modality of the DICOM series to segment; may be given several times.",
)
@click.option(
    "--dicom-seg",
    type=click.Choice(["binary", "labelmap"]),
    is_flag=False,
    flag_value="binary",
    help="Write a DICOM segmentation of each DICOM series as well, <name>_seg.dcm, or "
    "<name>_labelmap.dcm as a label map, which few viewers read; binary without a value.",
)
@click.option(
    "--dicom-sr",
    is_flag=True,
    help="Write <name>_sr.dcm as well: the volumes as a DICOM report; takes --dicom-seg.",
)
@click.option(
    "--dicom-codes",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="TABLE",
    show_default="the bundle's configs/dicom_codes.csv, if it has one",
    help="CSV table with the codes of the bundle's labels for --dicom-seg: columns structure, "
    "scheme, code and meaning.",
)
@label_table_option()
@click.option(
    "--report",
    is_flag=True,
    help="Write the report of the output folder as well, as volseg report does.",
)
@repetition_options()
def segment(
    inputs: tuple[str, ...],
    output: Path,
    report: bool,
    modalities: tuple[str, ...],
    dicom_seg: str | None,
    dicom_sr: bool,
    dicom_codes: Path | None,
    **given: Any,
) -> None:
    """Segment files, folders, globs and lists of MRI volumes, DICOM series among them.

    The output folder gets a <name>_seg.nii.gz on each input's own grid, volumes.csv (mm³ per
    structure), cases.csv (one row per input: status, warnings, seconds, memory) and run.json (model
    and versions). A case that fails is named, and the others continue. A run that is started again
    continues where it stopped; several runs into one folder share the work.

    An INPUT that ends in .csv, .tsv or .jsonl lists cases: a column case, and image or one column
    per channel.
    """
    with usage_errors():
        with importing():
            from pipeline.batch import with_dicom_outputs
            from pipeline.io import find_cases

        if dicom_seg and given["labels_spacing"]:
            raise click.UsageError(
                "--dicom-seg is on the frames of the series: no --labels-spacing"
            )

        if dicom_codes and not dicom_seg:
            raise click.UsageError("--dicom-codes is for --dicom-seg")

        def find(model: CaseModel) -> list[Case]:
            cases = find_cases(inputs, model, [code.upper() for code in modalities])
            codes = _codes(model, dicom_codes) if dicom_seg else {}
            return with_dicom_outputs(cases, dicom_seg, report=dicom_sr, codes=codes)

        options, settings = BatchOptions.split(given)
        status = segment_batch(find, output, options, settings)
        if report and not options.dry_run:
            show_report(output)
    sys.exit(status)


def _codes(model: CaseModel, table: Path | None) -> dict[str, StructureCode]:
    """Return name of a label → its code, from a table or from that of the bundle."""
    from pipeline.config import BundlePaths
    from pipeline.io import read_structure_codes

    path = table or BundlePaths(model.root).dicom_codes
    if table is None and not path.exists():
        return {}
    return read_structure_codes(path, [name for name, value in model.labels.items() if value])


@command()
@click.argument("output", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--stats",
    "kinds",
    multiple=True,
    type=click.Choice([*STATISTICS, "all"]),
    help="Write statistics as well; may be given several times. ml: volumes_ml.csv, in mL; icv: "
    "volumes_icv.csv, fractions of the intracranial volume; asymmetry: asymmetry.csv, "
    "(left - right) / (left + right); long: volumes_long.tsv, a row per case and structure; aseg: "
    "freesurfer/<case>/stats/aseg.stats, for scripts that read FreeSurfer's.",
)
@click.option(
    "--icv",
    default=INTRACRANIAL,
    show_default=True,
    metavar="NAME",
    help="Structure or sum in volumes.csv that is the intracranial volume.",
)
def tables(output: Path, kinds: tuple[str, ...], icv: str) -> None:
    """Derive cases.csv, volumes.csv and run.json of an output folder again.

    They are derived from the records of the cases, which every run keeps; a table that was edited,
    damaged or lost is written again. So are the lists of labels with their colours: labels.tsv
    (BIDS), labels_itksnap.txt, labels.ctbl (3D Slicer) and labels_freesurfer.txt (FreeView).
    """
    with usage_errors():
        from pipeline.batch import write_statistics, write_tables

        counts = write_tables(output)
        wanted = STATISTICS if "all" in kinds else kinds
        written = write_statistics(output, wanted, icv=icv) if wanted else []
    text = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    click.echo(f"{sum(counts.values())} cases: {text or 'none'}", err=True)
    for path in written:
        click.echo(f"wrote {path}", err=True)
