"""Scores a brain model on real scans with a truth, none of which it was trained on, and draws it on those without.

    python scripts/score_brain.py $VOLSEG_DATA/real -o runs/score_brain [--mask deepbet=runs/deepbet/mask.nii.gz] [--slices 5]

Needs: oasis1000 (manual structures), head18 (brain mask, aparc+aseg) and any other volumes named `head*` to draw.
Writes into the output folder what `segment` leaves, scores.csv, and a picture a scan, and prints the table that stands in the
bundle's README. A truth on another grid than its scan is compared on the truth's own grid: each of its voxels asks the nearest
voxel of the prediction. head18 has larger voxels than its truth, so it is also scored as `--labels-spacing 1` writes it, and
resampled to the truth's grid before it is segmented, as tools do that take scans of 1 mm only. With --slices the two scans are
averaged to slices so thick, stacked along each axis in turn, and scored in voxels of 1 mm.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to
from scipy import ndimage

from pipeline.batch import output_path, segment_cases
from pipeline.bundle import open_bundle
from pipeline.cli import case_line, progress_bar, quiet
from pipeline.evaluation import draw_overlay, score_masks
from pipeline.inference import Model
from pipeline.io import Image, find_cases, read, write_csv
from pipeline.types import Array

SCANS = {"oasis1000": "oasis1000_T1w_stripped", "head18": "head18_T1w"}
BOTH = {"white matter": (2, 41), "cortex": (3, 42), "lateral ventricle": (4, 43), "cerebellum white matter": (7, 46),
        "cerebellum cortex": (8, 47), "thalamus": (10, 49), "caudate": (11, 50), "putamen": (12, 51), "pallidum": (13, 52),
        "hippocampus": (17, 53), "amygdala": (18, 54), "accumbens": (26, 58), "ventral DC": (28, 60)}  # fmt: skip
FINE, CONFORMED = (
    "head18, 1 mm",
    "head18, conformed",
)  # the same scan, its labels in finer voxels, or all of it
FINE_MM = 1.0
COLUMNS = {"oasis1000": "`oasis1000`, manual", "head18": "`head18`, FreeSurfer", FINE: "`--labels-spacing 1`",
           CONFORMED: "on its truth's grid"}  # fmt: skip
MIDDLE = {"3rd ventricle": 14, "4th ventricle": 15, "brain-stem": 16}
DEEP = ("thalamus", "caudate", "putamen", "pallidum", "hippocampus", "amygdala")
# The manual protocol's names; its outermost gyri have numbers of their own, odd ones left
OASIS = {"Thalamus Proper": "thalamus", "Caudate": "caudate", "Putamen": "putamen", "Pallidum": "pallidum",
         "Hippocampus": "hippocampus", "Amygdala": "amygdala", "Accumbens Area": "accumbens", "Ventral DC": "ventral DC",
         "Lateral Ventricle": "lateral ventricle", "Cerebellum Exterior": "cerebellum cortex",
         "Cerebellum White Matter": "cerebellum white matter", "Cerebral White Matter": "white matter"}  # fmt: skip
OASIS_MIDDLE = {"3rd Ventricle": 14, "4th Ventricle": 15, "Brain Stem": 16}
PLANES = ("sagittal", "coronal", "axial")  # across the axes R, A and S
OASIS_GYRI = (100, 207)
APARC_CORTEX = {1000: 3, 2000: 42}
CALLOSUM = (251, 255)


def oasis_values(table: Path) -> dict[int, int]:
    """The manual structures' values as FreeSurfer's."""
    found = {}
    for row in csv.DictReader(table.read_text(encoding="utf-8-sig").splitlines()):
        value, name = int(row["Label Number"]), row["Label Name"].strip()
        side, _, rest = name.partition(" ")
        if name in OASIS_MIDDLE:
            found[value] = OASIS_MIDDLE[name]
        elif rest in OASIS:
            found[value] = BOTH[OASIS[rest]][side == "Right"]
        elif OASIS_GYRI[0] <= value <= OASIS_GYRI[1] and side in ("Left", "Right"):
            found[value] = BOTH["cortex"][side == "Right"]
    return found


def aseg(array: Array) -> Array:
    """aparc+aseg in the model's values: gyri as cortex, corpus callosum as white matter of the nearer side."""
    out: Array = np.asarray(array, dtype=np.int32).copy()
    for first, value in APARC_CORTEX.items():
        out[(out >= first) & (out < first + 1000)] = value
    callosum = (out >= CALLOSUM[0]) & (out <= CALLOSUM[1])
    white = np.where(np.isin(out, BOTH["white matter"]), out, 0)
    nearest = ndimage.distance_transform_edt(
        white == 0, return_distances=False, return_indices=True
    )
    out[callosum] = white[tuple(nearest)][callosum]
    return out


def on_grid_of(grid: Image, labels: Image) -> Array:
    """A label map's values at the voxels of another grid, the nearest one's each; 0 outside."""
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
    scan: str, ours: Array, truth: Array, spacing: Iterable[float], values: Mapping[str, int]
) -> list[dict[str, Any]]:
    """One row a structure."""
    mm = [float(s) for s in spacing]
    return [
        {"scan": scan, "structure": name, **asdict(score_masks(ours == value, truth == value, mm))}
        for name, value in values.items()
        if (truth == value).any()
    ]


def structures() -> dict[str, int]:
    """Each structure's name, with its side, and value."""
    sided = {
        f"{side} {name}": values[i]
        for name, values in BOTH.items()
        for i, side in enumerate(("left", "right"))
    }
    return sided | MIDDLE


def mask_scores(folder: Path, files: Mapping[tuple[str, str], Path]) -> list[dict[str, Any]]:
    """All that is not background against the brain mask of head18; files by scan and by the name of the mask."""
    truth = read(folder / "head18_brainmask.nii.gz")
    brain = (np.asarray(truth.array) > 0).astype(np.uint8)
    mm = np.linalg.norm(truth.affine[:3, :3], axis=0)
    found = {
        names: (on_grid_of(truth, read(path)) > 0).astype(np.uint8) for names, path in files.items()
    }
    return [
        row
        for (scan, name), mask in found.items()
        for row in rows_of(scan, mask, brain, mm, {name: 1})
    ]


def score_all(
    fine: Model, folder: Path, out: Path, others: Mapping[str, Path]
) -> list[dict[str, Any]]:
    """The scans as `out` has them, head18 in voxels of 1 mm in two ways, and masks that other tools made of head18."""
    whole, conformed = folder / f"{SCANS['head18']}.nii.gz", out / "fine" / "conformed.nii.gz"
    truth = nib.load(folder / "head18_aparc+aseg.mgz")
    conformed.parent.mkdir(parents=True, exist_ok=True)
    nib.save(
        resample_from_to(
            nib.Nifti1Image.from_image(nib.load(whole)), (truth.shape, truth.affine), order=1
        ),
        conformed,
    )
    _segment(fine, [whole, conformed], out / "fine")
    files = {name: output_path(out, stem) for name, stem in SCANS.items()}
    files |= {
        FINE: output_path(out / "fine", SCANS["head18"]),
        CONFORMED: output_path(out / "fine", "conformed"),
    }
    masks = {(name, "brain mask"): files[name] for name in ("head18", FINE, CONFORMED)}
    masks |= {("head18", f"brain mask, {name}"): path for name, path in others.items()}
    return mask_scores(folder, masks) + score_scans(folder, files)


def truths(folder: Path) -> dict[str, Image]:
    """The structures of each scan that has a truth, in the model's values."""
    manual, segmented = (
        read(folder / "oasis1000_manual_structures.nii.gz"),
        read(folder / "head18_aparc+aseg.mgz"),
    )
    table = oasis_values(folder / "oasis_structures.csv")
    there = np.zeros(int(np.asarray(manual.array).max()) + 1, dtype=np.int32)
    for value, target in table.items():
        if value < len(there):
            there[value] = target
    return {
        "oasis1000": Image(
            array=there[np.asarray(manual.array, dtype=np.int64)], affine=manual.affine
        ),
        "head18": Image(array=aseg(segmented.array), affine=segmented.affine),
    }


def score_scans(folder: Path, files: Mapping[str, Path]) -> list[dict[str, Any]]:
    """All structures of label maps, by the name of the scan, which may go on after a comma, that the folder has a truth for."""
    rows, known = [], truths(folder)
    for name, path in files.items():
        truth = known[name.split(",")[0]]
        mm = np.linalg.norm(truth.affine[:3, :3], axis=0)
        rows += rows_of(name, on_grid_of(truth, read(path)), truth.array, mm, structures())
    return rows


def sliced(image: nib.Nifti1Image, axis: int, mm: float) -> nib.Nifti1Image:
    """The mean of as many neighbours along one axis (0 right, 1 anterior, 2 superior) as make a slice of about `mm`."""
    image = nib.as_closest_canonical(image)
    array = np.moveaxis(np.asarray(image.dataobj, dtype=np.float32), axis, 0)
    together = max(1, round(mm / float(image.header.get_zooms()[axis])))
    whole = array[: len(array) // together * together]
    thick = whole.reshape(-1, together, *array.shape[1:]).mean(axis=1)
    affine = image.affine.copy()
    affine[:3, 3] += affine[:3, axis] * (together - 1) / 2
    affine[:3, axis] *= together
    return nib.Nifti1Image(np.moveaxis(thick, 0, axis), affine)


def score_slices(model: Model, folder: Path, out: Path, mm: float) -> list[dict[str, Any]]:
    """The scans with a truth as stacks of thick slices along each axis."""
    out.mkdir(parents=True, exist_ok=True)
    stacks = {f"{scan}, {plane}": f"{scan}_{plane}" for scan in SCANS for plane in PLANES}
    for name, stem in stacks.items():
        scan, plane = name.split(", ")
        image = nib.load(folder / f"{SCANS[scan]}.nii.gz")
        nib.save(sliced(image, PLANES.index(plane), mm), out / f"{stem}.nii.gz")
    _segment(model, [out / f"{stem}.nii.gz" for stem in stacks.values()], out)
    files = {name: output_path(out, stem) for name, stem in stacks.items()}
    masks = {
        (name, "brain mask"): path for name, path in files.items() if name.startswith("head18")
    }
    return mask_scores(folder, masks) + score_scans(folder, files)


def table(rows: list[dict[str, Any]]) -> str:
    """Dice as it stands in the bundle's README: a line a structure, a column a scan."""
    dice = {(row["scan"], row["structure"]): float(row["dice"]) for row in rows}
    masks = dict.fromkeys(name for _, name in dice if name.startswith("brain mask"))
    deep = [f"{side} {name}" for name in DEEP for side in ("left", "right")]
    lines = [
        f"| structure (left / right) | {' | '.join(COLUMNS.values())} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    lines += [_line(name, [[dice.get((scan, name))] for scan in COLUMNS], 4) for name in masks]
    lines.append(
        _line(
            f"mean of {', '.join(DEEP)}",
            [[float(np.mean([dice[scan, k] for k in deep]))] for scan in COLUMNS],
            4,
        )
    )
    for name in BOTH:
        lines.append(
            _line(
                name,
                [
                    [dice.get((scan, f"{side} {name}")) for side in ("left", "right")]
                    for scan in COLUMNS
                ],
                3,
            )
        )
    return "\n".join(
        lines + [_line(name, [[dice.get((scan, name))] for scan in COLUMNS], 3) for name in MIDDLE]
    )


def slices_table(rows: list[dict[str, Any]], mm: float) -> str:
    """Mean Dice of some structures, a line a stack."""
    dice = {(row["scan"], row["structure"]): float(row["dice"]) for row in rows}
    groups = {"deep structures": DEEP, "cortex": ("cortex",), "white matter": ("white matter",)}
    lines = [
        f"| slices of {mm:g} mm | brain mask | {' | '.join(groups)} |",
        "|---" * (len(groups) + 2) + "|",
    ]
    for scan in dict.fromkeys(row["scan"] for row in rows):
        cells = [[dice.get((scan, "brain mask"))]]
        for names in groups.values():
            cells.append(
                [
                    float(
                        np.mean(
                            [
                                dice[scan, f"{side} {name}"]
                                for name in names
                                for side in ("left", "right")
                            ]
                        )
                    )
                ]
            )
        lines.append(_line(scan, cells, 3))
    return "\n".join(lines)


def _line(name: str, cells: list[list[float | None]], digits: int) -> str:
    texts = [
        " / ".join(f"{value:.{digits}f}" for value in cell if value is not None) for cell in cells
    ]
    return f"| {name} | " + " | ".join(texts) + " |"


def _segment(model: Model, scans: list[Path], out: Path) -> None:
    cases = find_cases([str(path) for path in scans], model.spec)
    with progress_bar("segmenting", len(cases)) as advance:
        segment_cases(
            model, cases, out, overwrite=True, progress=lambda _, row: advance(case_line(row))
        )


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("-b", "--bundle", default="brain_mr_structures", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--truth/--no-truth", default=True, help="Whether to score, or only to draw.")
@click.option(
    "--mask", "masks", multiple=True, metavar="NAME=FILE", help="Another tool's mask of head18."
)
@click.option(
    "--slices",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MM",
    help="Also score slices so thick.",
)
def main(
    folder: Path,
    bundle: str,
    output: Path,
    device: str,
    truth: bool,
    masks: tuple[str, ...],
    slices: float | None,
) -> None:
    """Score BUNDLE on the real scans in FOLDER."""
    wrong = [mask for mask in masks if "=" not in mask or not Path(mask.split("=", 1)[1]).is_file()]
    if wrong:
        raise click.BadParameter(
            f"expected NAME=FILE with a file that is there, got {', '.join(wrong)}",
            param_hint="--mask",
        )
    quiet()
    model = open_bundle(bundle, device=device)
    scans = [
        path
        for path in sorted(folder.iterdir())
        if re.search(r"_(T1w|T1w_stripped|FLAIR)\.nii\.gz$", path.name)
    ]
    _segment(model, scans, output)
    for path in scans:
        stem = path.name.removesuffix(".nii.gz")
        labels = np.asarray(nib.load(output_path(output, stem)).dataobj)
        draw_overlay(
            nib.load(path), labels, model.spec.labels, output / f"{stem}.png", title=stem, slices=5
        )
    if not (truth or slices):
        return
    fine = open_bundle(bundle, device=device, labels_spacing=FINE_MM)
    if truth:
        others = {name: Path(path) for name, path in (mask.split("=", 1) for mask in masks)}
        rows = score_all(fine, folder, output, others)
        write_csv(output / "scores.csv", rows)
        click.echo(table(rows))
    if slices:
        rows = score_slices(fine, folder, output / "slices", slices)
        write_csv(output / "slices.csv", rows)
        click.echo(slices_table(rows, slices))


if __name__ == "__main__":
    main()
