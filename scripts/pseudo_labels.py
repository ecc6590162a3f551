"""Segment scans several times, changed a little each time, and vote on their labels.

    python scripts/pseudo_labels.py SCANS OUTPUT

SCANS is a folder that is searched for NIfTI files of skull-stripped heads. Each is resampled to
voxels of 1 mm and cropped to its non-zero voxels. The brain bundle segments seven copies of it:
copies differ in gamma, in noise and blur, in the position of the voxels' grid, and some are mirror
images. OUTPUT gets `scans/<name>.nii.gz`, uint8, and `label_maps/<name>.nii.gz`, the labels that
most copies have. In a label map, parts of a structure that are smaller than a tenth of its largest
part get the label with the next most votes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import click
import nibabel as nib
import numpy as np
from nibabel.processing import resample_to_output
from numpy.typing import NDArray
from scipy import ndimage

import pipeline
from pipeline.config import load_spec
from pipeline.evaluation import dice
from pipeline.inference import CaseModel, other_side

MARGIN = 4  # voxels around the head
BRIGHTEST = 99.9  # percentile of the head's intensities that becomes 255
SMALL_PART = 0.1  # of the largest part of a structure
BRAIN_BUNDLE = Path(__file__).parents[1] / "bundles" / "brain_mr_structures"


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """How a copy differs from its scan.

    Attributes:
        gamma: exponent of the intensities.
        mirrored: whether the copy is a mirror image, left to right.
        padding: number of empty voxels before the first one, which moves the network's grid.
        blur: standard deviation of the blur, voxels.
        noise: standard deviation of the noise, as a fraction of the intensity range.
    """

    gamma: float = 1.0
    mirrored: bool = False
    padding: int = 0
    blur: float = 0.0
    noise: float = 0.0


CHANGES = (
    Change(),
    Change(mirrored=True, padding=1),
    Change(gamma=0.7, padding=1),
    Change(gamma=0.75, mirrored=True),
    Change(gamma=1.35),
    Change(gamma=1.3, mirrored=True, padding=1),
    Change(blur=0.6, noise=0.02),
)


@click.command(help=__doc__)
@click.argument("scans", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
def main(scans: Path, output: Path) -> None:
    """Write the scans and their label maps."""
    paths = sorted(scans.rglob("*.nii.gz"))
    if not paths:
        sys.exit(f"{scans}: expected scans *.nii.gz")
    model = pipeline.load(str(BRAIN_BUNDLE))
    other = mirrored_values(load_spec(BRAIN_BUNDLE / "configs" / "spec.yaml").labels)
    for folder in ("scans", "label_maps"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for path in paths:
        scan = cropped_head(nib.load(path))
        if scan is None:
            click.echo(f"{path}: no voxel above 0; left out", err=True)
            continue
        votes = [copy_labels(model, scan, change, other) for change in CHANGES]
        labels = voted(np.stack(votes))
        agreement = fmean(mean_dice(copy, labels) for copy in votes)
        nib.save(scan, output / "scans" / path.name)
        nib.save(nib.Nifti1Image(labels, scan.affine), output / "label_maps" / path.name)
        click.echo(f"{path.name}: mean Dice of the copies with their vote {agreement:.4f}")


def mirrored_values(labels: Mapping[str, int]) -> NDArray[np.uint8]:
    """Return the value of the other side's structure for each value of a label map, (256,)."""
    other = np.arange(256, dtype=np.uint8)
    for name, value in labels.items():
        other[value] = labels[other_side(name)]
    return other


def cropped_head(image: nib.Nifti1Image) -> nib.Nifti1Image | None:
    """Return a scan in RAS+ voxels of 1 mm, cropped to those above 0, as uint8; else None."""
    resampled = resample_to_output(image, 1.0, order=1)
    voxels = np.asarray(resampled.dataobj, dtype=np.float32)
    where = np.argwhere(voxels > 0)
    if not len(where):
        return None
    first = np.maximum(where.min(axis=0) - MARGIN, 0)
    box = tuple(slice(a, b) for a, b in zip(first, where.max(axis=0) + MARGIN + 1, strict=True))
    voxels = voxels[box].clip(min=0)
    scaled = (voxels / np.percentile(voxels[voxels > 0], BRIGHTEST) * 255).clip(max=255)
    return nib.Nifti1Image(scaled.round().astype(np.uint8), resampled.slicer[box].affine)


def copy_labels(
    model: CaseModel, scan: nib.Nifti1Image, change: Change, other: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Return the labels of a changed copy of a scan, on the scan's voxels."""
    voxels = np.asarray(scan.dataobj, dtype=np.float32) / 255
    head = voxels > 0
    voxels = voxels**change.gamma
    if change.blur:
        voxels = ndimage.gaussian_filter(voxels, change.blur) * head
    if change.noise:
        draw = np.random.default_rng(0).normal(size=voxels.shape).astype(np.float32)
        voxels = (voxels + change.noise * draw).clip(min=0) * head
    if change.mirrored:
        voxels = voxels[::-1]
    voxels = np.pad(voxels, [(change.padding, 0)] * 3)
    # the affine is the scan's: the network takes a mirror image for a head with its sides swapped
    copy = nib.Nifti1Image(np.ascontiguousarray(voxels, dtype=np.float32), scan.affine)
    found = np.asarray(pipeline.segment(model, copy).image.dataobj).astype(np.uint8)
    found = found[(slice(change.padding, None),) * 3]
    return other[found[::-1]] if change.mirrored else found


def voted(votes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the labels with most votes, without small parts.

    Args:
        votes: (copies, X, Y, Z) label maps.
    """
    values = np.unique(votes)
    counts = np.zeros((len(values), *votes.shape[1:]), dtype=np.uint8)
    for count, value in zip(counts, values, strict=True):
        count[:] = (votes == value).sum(axis=0)
    labels = values[counts.argmax(axis=0)]
    for row, value in enumerate(values):
        parts, number = ndimage.label(labels == value)
        sizes = np.bincount(parts.ravel())[1:]
        if value == 0 or number < 2:
            continue
        small = np.isin(parts, np.flatnonzero(sizes < SMALL_PART * sizes.max()) + 1)
        counts[row][small] = 0
    voted_labels: NDArray[np.uint8] = values[counts.argmax(axis=0)]
    return voted_labels


def mean_dice(labels: NDArray[np.uint8], vote: NDArray[np.uint8]) -> float:
    """Return the mean Dice of all structures that one of two label maps has."""
    found = set(np.unique(labels)) | set(np.unique(vote))
    return fmean(dice(labels == value, vote == value) for value in found - {0})


if __name__ == "__main__":
    main()
