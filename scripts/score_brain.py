"""Score a brain model on real scans that have a reference, and draw its labels on all scans.

    python scripts/score_brain.py $VOLSEG_DATA/real -o runs/score_brain --slices 5

The folder holds oasis1000 (with manual structures), head18 (with a brain mask and aparc+aseg) and
any other scans, which are only drawn. The output folder gets the files of `volseg segment`,
scores.csv and a picture per scan; the table of the bundle's README is printed.

A reference on another grid than its scan is compared on its own grid, with the label of the nearest
voxel of the prediction. head18 has larger voxels than its reference. Therefore it is also scored
with the labels of `--labels-spacing 1`, and resampled to the reference's grid before segmentation,
as tools do that only accept scans of 1 mm. With --slices the two scans are also averaged to thick
slices along each axis in turn and scored with labels of 1 mm.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to
from scipy import ndimage

from pipeline.batch import output_path, segment_cases
from pipeline.bundle import open_bundle
from pipeline.cli import case_line, progress_bar, show_log
from pipeline.evaluation import draw_overlay, score_masks
from pipeline.inference import Model
from pipeline.io import Image, find_cases, read, write_csv
from pipeline.types import Array

SCANS = {"oasis1000": "oasis1000_T1w_stripped", "head18": "head18_T1w"}
SCAN_NAME = re.compile(r"_(T1w|T1w_stripped|FLAIR)\.nii\.gz$")
SIDES = ("left", "right")
# FreeSurfer's values of the structure on the left and on the right.
PAIRED = {
    "white matter": (2, 41),
    "cortex": (3, 42),
    "lateral ventricle": (4, 43),
    "inferior lateral ventricle": (5, 44),
    "cerebellum white matter": (7, 46),
    "cerebellum cortex": (8, 47),
    "thalamus": (10, 49),
    "caudate": (11, 50),
    "putamen": (12, 51),
    "pallidum": (13, 52),
    "hippocampus": (17, 53),
    "amygdala": (18, 54),
    "accumbens": (26, 58),
    "ventral DC": (28, 60),
}
UNPAIRED = {"3rd ventricle": 14, "4th ventricle": 15, "brain-stem": 16}
# head18 with labels in voxels of 1 mm, and resampled to the reference's grid before segmentation.
FINE, CONFORMED = "head18, 1 mm", "head18, conformed"
FINE_MM = 1.0
COLUMNS = {
    "oasis1000": "`oasis1000`, manual",
    "head18": "`head18`, FreeSurfer",
    FINE: "`--labels-spacing 1`",
    CONFORMED: "on the reference's grid",
}
DEEP = ("thalamus", "caudate", "putamen", "pallidum", "hippocampus", "amygdala")
# Names of the manual protocol of oasis1000.
OASIS = {
    "Thalamus Proper": "thalamus",
    "Caudate": "caudate",
    "Putamen": "putamen",
    "Pallidum": "pallidum",
    "Hippocampus": "hippocampus",
    "Amygdala": "amygdala",
    "Accumbens Area": "accumbens",
    "Ventral DC": "ventral DC",
    "Lateral Ventricle": "lateral ventricle",
    "Inf Lat Vent": "inferior lateral ventricle",
    "Cerebellum Exterior": "cerebellum cortex",
    "Cerebellum White Matter": "cerebellum white matter",
    "Cerebral White Matter": "white matter",
}
OASIS_UNPAIRED = {"3rd Ventricle": 14, "4th Ventricle": 15, "Brain Stem": 16}
OASIS_GYRI = (100, 207)  # first and last value of the protocol's cortical gyri
PLANES = ("sagittal", "coronal", "axial")  # slices across the axes R, A and S
# aparc+aseg: the cortical regions of a side have 1,000 values from these on.
APARC_CORTEX = {1000: 3, 2000: 42}
CALLOSUM = (251, 255)  # first and last value of the corpus callosum


def oasis_values(table: Path) -> dict[int, int]:
    """Return the manual protocol's values and FreeSurfer's value of each."""
    found = {}
    for row in csv.DictReader(table.read_text(encoding="utf-8-sig").splitlines()):
        value, name = int(row["Label Number"]), row["Label Name"].strip()
        side, _, rest = name.partition(" ")
        if name in OASIS_UNPAIRED:
            found[value] = OASIS_UNPAIRED[name]
        elif rest in OASIS:
            found[value] = PAIRED[OASIS[rest]][side == "Right"]
        elif OASIS_GYRI[0] <= value <= OASIS_GYRI[1] and side in ("Left", "Right"):
            found[value] = PAIRED["cortex"][side == "Right"]
    return found


def aseg(array: Array) -> Array:
    """Return aparc+aseg in the model's values.

    Cortical regions become cortex. The model has no corpus callosum: its voxels become the white
    matter of the nearer side.
    """
    out: Array = np.asarray(array, dtype=np.int32).copy()
    for first, value in APARC_CORTEX.items():
        out[(out >= first) & (out < first + 1000)] = value
    callosum = (out >= CALLOSUM[0]) & (out <= CALLOSUM[1])
    white = np.where(np.isin(out, PAIRED["white matter"]), out, 0)
    nearest = ndimage.distance_transform_edt(
        white == 0, return_distances=False, return_indices=True
    )
    out[callosum] = white[tuple(nearest)][callosum]
    return out


def on_grid_of(grid: Image, labels: Image) -> Array:
    """Return the label of the nearest voxel at each voxel of another grid; 0 outside."""
    matrix = np.linalg.inv(labels.affine) @ grid.affine
    found: Array = ndimage.affine_transform(
        np.asarray(labels.array),
        matrix[:3, :3],
        matrix[:3, 3],
        output_shape=grid.array.shape,
        order=0,
    )
    return found


def rows_of(
    scan: str,
    labels: Array,
    reference: Array,
    spacing: Iterable[float],
    values: Mapping[str, int],
) -> list[dict[str, Any]]:
    """Return one row of scores per structure that the reference has."""
    mm = [float(s) for s in spacing]
    return [
        {
            "scan": scan,
            "structure": name,
            **asdict(score_masks(labels == value, reference == value, mm)),
        }
        for name, value in values.items()
        if (reference == value).any()
    ]


def structures() -> dict[str, int]:
    """Return the value of each structure; paired ones have their side in front of the name."""
    found = {}
    for name, values in PAIRED.items():
        for side, value in zip(SIDES, values, strict=True):
            found[f"{side} {name}"] = value
    return found | UNPAIRED


def mask_scores(folder: Path, files: Mapping[tuple[str, str], Path]) -> list[dict[str, Any]]:
    """Score label maps as brain masks: everything but the background counts as brain.

    Args:
        folder: the scans and references; the reference is head18's brain mask.
        files: label map of each scan and name of a mask.

    Returns:
        One row per file.
    """
    reference = read(folder / "head18_brainmask.nii.gz")
    brain = (np.asarray(reference.array) > 0).astype(np.uint8)
    mm = np.linalg.norm(reference.affine[:3, :3], axis=0)
    rows = []
    for (scan, name), path in files.items():
        mask = (on_grid_of(reference, read(path)) > 0).astype(np.uint8)
        rows += rows_of(scan, mask, brain, mm, {name: 1})
    return rows


def score_all(
    fine: Model, folder: Path, out: Path, others: Mapping[str, Path]
) -> list[dict[str, Any]]:
    """Score the scans with a reference, head18 also at 1 mm in two ways, and other tools' masks.

    Args:
        fine: the model with labels of 1 mm.
        folder: the scans and references.
        out: the label maps that the model made of the scans.
        others: name of a tool → its brain mask of head18.
    """
    head, conformed = folder / f"{SCANS['head18']}.nii.gz", out / "fine" / "conformed.nii.gz"
    reference = nib.load(folder / "head18_aparc+aseg.mgz")
    conformed.parent.mkdir(parents=True, exist_ok=True)
    scan = nib.Nifti1Image.from_image(nib.load(head))
    nib.save(resample_from_to(scan, (reference.shape, reference.affine), order=1), conformed)
    segment_scans(fine, [head, conformed], out / "fine")
    files = {name: output_path(out, stem) for name, stem in SCANS.items()}
    files |= {
        FINE: output_path(out / "fine", SCANS["head18"]),
        CONFORMED: output_path(out / "fine", "conformed"),
    }
    masks = {(name, "brain mask"): files[name] for name in ("head18", FINE, CONFORMED)}
    masks |= {("head18", f"brain mask, {name}"): path for name, path in others.items()}
    return mask_scores(folder, masks) + score_scans(folder, files)


def references(folder: Path) -> dict[str, Image]:
    """Return the reference label map of each scan that has one, in the model's values."""
    manual = read(folder / "oasis1000_manual_structures.nii.gz")
    segmented = read(folder / "head18_aparc+aseg.mgz")
    values = np.asarray(manual.array, dtype=np.int64)
    lookup = np.zeros(int(values.max()) + 1, dtype=np.int32)
    for value, target in oasis_values(folder / "oasis_structures.csv").items():
        if value < len(lookup):
            lookup[value] = target
    return {
        "oasis1000": Image(array=lookup[values], affine=manual.affine),
        "head18": Image(array=aseg(segmented.array), affine=segmented.affine),
    }


def score_scans(folder: Path, files: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Score the structures of label maps.

    Args:
        folder: the scans and references.
        files: name of a scan, which may have a comma and a variant behind it → its label map.

    Returns:
        One row per file and structure.
    """
    rows, known = [], references(folder)
    for name, path in files.items():
        reference = known[name.split(",")[0]]
        mm = np.linalg.norm(reference.affine[:3, :3], axis=0)
        labels = on_grid_of(reference, read(path))
        rows += rows_of(name, labels, reference.array, mm, structures())
    return rows


def average_to_slices(image: nib.Nifti1Image, axis: int, mm: float) -> nib.Nifti1Image:
    """Average neighbouring voxels along one axis to slices of about `mm`.

    Args:
        image: in any orientation; the result is in RAS+.
        axis: 0 right, 1 anterior, 2 superior.
        mm: thickness of the slices.
    """
    image = nib.as_closest_canonical(image)
    array = np.moveaxis(np.asarray(image.dataobj, dtype=np.float32), axis, 0)
    count = max(1, round(mm / float(image.header.get_zooms()[axis])))
    whole = array[: len(array) // count * count]
    thick = whole.reshape(-1, count, *array.shape[1:]).mean(axis=1)
    affine = image.affine.copy()
    # The centre of a slice is the mean of the centres of its voxels.
    affine[:3, 3] += affine[:3, axis] * (count - 1) / 2
    affine[:3, axis] *= count
    return nib.Nifti1Image(np.moveaxis(thick, 0, axis), affine)


def score_slices(model: Model, folder: Path, out: Path, mm: float) -> list[dict[str, Any]]:
    """Score the scans with a reference as stacks of thick slices along each axis."""
    out.mkdir(parents=True, exist_ok=True)
    stacks = {f"{scan}, {plane}": f"{scan}_{plane}" for scan in SCANS for plane in PLANES}
    for name, stem in stacks.items():
        scan, plane = name.split(", ")
        image = nib.load(folder / f"{SCANS[scan]}.nii.gz")
        nib.save(average_to_slices(image, PLANES.index(plane), mm), out / f"{stem}.nii.gz")
    segment_scans(model, [out / f"{stem}.nii.gz" for stem in stacks.values()], out)
    files = {name: output_path(out, stem) for name, stem in stacks.items()}
    masks = {
        (name, "brain mask"): path for name, path in files.items() if name.startswith("head18")
    }
    return mask_scores(folder, masks) + score_scans(folder, files)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the Dice table of the bundle's README: a row per structure, a column per scan."""
    dice = dice_by_structure(rows)
    lines = table_head(["structure (left / right)", *COLUMNS.values()])
    for name in dict.fromkeys(name for _, name in dice if name.startswith("brain mask")):
        lines.append(table_row(name, [[dice.get((scan, name))] for scan in COLUMNS], digits=4))
    means = [[mean_dice(dice, scan, DEEP)] for scan in COLUMNS]
    lines.append(table_row(f"mean of {', '.join(DEEP)}", means, digits=4))
    for name in PAIRED:
        pairs = [[dice.get((scan, f"{side} {name}")) for side in SIDES] for scan in COLUMNS]
        lines.append(table_row(name, pairs, digits=3))
    for name in UNPAIRED:
        lines.append(table_row(name, [[dice.get((scan, name))] for scan in COLUMNS], digits=3))
    return "\n".join(lines)


def slices_table(rows: list[dict[str, Any]], mm: float) -> str:
    """Return mean Dice of groups of structures as a table, with a row per stack of slices."""
    dice = dice_by_structure(rows)
    groups = {"deep structures": DEEP, "cortex": ("cortex",), "white matter": ("white matter",)}
    lines = table_head([f"slices of {mm:g} mm", "brain mask", *groups])
    for scan in dict.fromkeys(row["scan"] for row in rows):
        means = [[mean_dice(dice, scan, names)] for names in groups.values()]
        lines.append(table_row(scan, [[dice.get((scan, "brain mask"))], *means], digits=3))
    return "\n".join(lines)


def dice_by_structure(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Return the Dice of each scan and structure."""
    return {(row["scan"], row["structure"]): float(row["dice"]) for row in rows}


def mean_dice(dice: Mapping[tuple[str, str], float], scan: str, names: Iterable[str]) -> float:
    """Return the mean Dice of paired structures in one scan, over both sides."""
    return fmean(dice[scan, f"{side} {name}"] for name in names for side in SIDES)


def table_head(titles: list[str]) -> list[str]:
    """Return the first two lines of a Markdown table."""
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]


def table_row(name: str, cells: Iterable[Iterable[float | None]], *, digits: int) -> str:
    """Return one row of a Markdown table; a cell holds several values, None is left out."""
    texts = [name]
    for cell in cells:
        texts.append(" / ".join(f"{value:.{digits}f}" for value in cell if value is not None))
    return f"| {' | '.join(texts)} |"


def segment_scans(model: Model, scans: list[Path], out: Path) -> None:
    """Segment scans into a folder, with a progress bar."""
    cases = find_cases([str(path) for path in scans], model.spec)
    with progress_bar("segmenting", len(cases)) as advance:
        segment_cases(
            model, cases, out, overwrite=True, progress=lambda row: advance(case_line(row))
        )


def parse_masks(options: Iterable[str]) -> dict[str, Path]:
    """Return the files of `--mask NAME=FILE` by name."""
    masks = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not equals or not Path(path).is_file():
            raise click.BadParameter(
                f"expected NAME=FILE with an existing file, got {option}", param_hint="--mask"
            )
        masks[name] = Path(path)
    return masks


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option(
    "-b", "--bundle", default="brain_mr_structures", show_default=True, help="Model to score."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for all results."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")
@click.option("--score/--no-score", default=True, help="Score the scans, or only draw them.")
@click.option(
    "--mask",
    "masks",
    multiple=True,
    metavar="NAME=FILE",
    help="Also score the brain mask of head18 that another tool made.",
)
@click.option(
    "--slices",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MM",
    help="Also score the scans averaged to slices of this thickness, mm.",
)
def main(
    folder: Path,
    bundle: str,
    output: Path,
    device: str,
    score: bool,
    masks: tuple[str, ...],
    slices: float | None,
) -> None:
    """Score BUNDLE on the real scans in FOLDER."""
    others = parse_masks(masks)
    show_log()
    model = open_bundle(bundle, device=device)
    scans = [path for path in sorted(folder.iterdir()) if SCAN_NAME.search(path.name)]
    segment_scans(model, scans, output)
    for path in scans:
        stem = path.name.removesuffix(".nii.gz")
        labels = np.asarray(nib.load(output_path(output, stem)).dataobj)
        draw_overlay(
            nib.load(path), labels, model.spec.labels, output / f"{stem}.png", title=stem, slices=5
        )
    if not (score or slices):
        return
    fine = open_bundle(bundle, device=device, labels_spacing=FINE_MM)
    if score:
        rows = score_all(fine, folder, output, others)
        write_csv(output / "scores.csv", rows)
        click.echo(table(rows))
    if slices:
        rows = score_slices(fine, folder, output / "slices", slices)
        write_csv(output / "slices.csv", rows)
        click.echo(slices_table(rows, slices))


if __name__ == "__main__":
    main()
