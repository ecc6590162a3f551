"""Measure where labels end: inside, at, or outside the border that T1 scans show to white matter.

    python scripts/border_profile.py IMAGES LABELS --value 17 --value 53

IMAGES holds T1 scans, LABELS a label map of each, <name>.nii.gz or <name>_seg.nii.gz. All values
together are one structure. For each case, grey values are averaged in layers of 1 mm inside and
outside the structure, where it faces white matter: 0 is the median deep inside, 1 the white matter
(the 92nd percentile within 6 voxels). Labels that end halfway between the two have about .25 in the
last layer inside and .75 in the first layer outside. Printed are mean and standard deviation over
the cases.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.errors import PipelineError
from pipeline.io import check_label_grid, read, read_label_map

LAYERS_MM = (-1.5, -0.5, 0.5, 1.5, 2.5)  # their middles; negative inside
DEEP_MM = 1.6  # from this depth on, grey values are the structure's own
FAR_MM = (1.9, 3.6)  # outside, where white matter is looked for
WHITE_PERCENTILE, REACH = 92, 6  # of the voxels within so many steps
WHITE = 0.75  # mean grey value of a place that counts as white matter; every voxel has WHITE_LEAST
WHITE_LEAST = 0.5
MIN_VOXELS = 30  # in a layer; fewer give no value


@click.command(help=__doc__)
@click.argument("images", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("labels", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--value", "values", type=int, multiple=True, required=True, help="Repeatable.")
@click.option("--cases", type=click.IntRange(1), help="Number of cases, in order of their names.")
def main(images: Path, labels: Path, values: tuple[int, ...], cases: int | None) -> None:
    """Print the profile of each case's border, averaged."""
    found: list[NDArray[np.float64]] = []
    for path in sorted(images.glob("*.nii.gz")):
        name = path.name.removesuffix(".nii.gz")
        pair = [labels / f"{name}{end}.nii.gz" for end in ("", "_seg")]
        label = next((p for p in pair if p.is_file()), None)
        if label is None or len(found) == cases:
            continue
        try:
            image, label_map = read(str(path)), read_label_map(label)
            check_label_grid(label, label_map, image)
            structure = np.isin(label_map.array, values)
            if not structure.any():
                click.echo(f"{name}: no voxel of the structure", err=True)
                continue
            found.append(profile(image.array, structure, tuple(voxel_sizes(image.affine))))
        except PipelineError as error:
            click.echo(f"{name}: {error}", err=True)
    if not found:
        sys.exit(f"expected images in {images} with their structure in label maps in {labels}")
    stacked = np.stack(found)
    click.echo(f"{len(found)} cases")
    for middle, column in zip(LAYERS_MM, stacked.T, strict=True):
        known = column[np.isfinite(column)]
        side = "inside" if middle < 0 else "outside"
        text = f"{known.mean():.2f} (sd {known.std():.2f})" if len(known) else "no value"
        click.echo(f"{abs(middle) - 0.5:g} to {abs(middle) + 0.5:g} mm {side}: {text}")


def profile(
    grey: NDArray[np.float32], structure: NDArray[np.bool_], spacing: tuple[float, ...]
) -> NDArray[np.float64]:
    """Return the mean grey value in each layer, (len(LAYERS_MM),), from 0 to 1; nan if unknown.

    Args:
        grey: (X, Y, Z) T1 intensities.
        structure: (X, Y, Z) mask.
        spacing: (3,) voxel size, mm.
    """
    half = float(np.mean(spacing)) / 2  # distances are to the middle of the nearest other voxel
    depth, outer = ndimage.distance_transform_edt(structure, spacing, return_indices=True)
    away, inner = ndimage.distance_transform_edt(~structure, spacing, return_indices=True)
    distance = np.where(structure, half - depth, away - half)
    near = ndimage.binary_dilation(structure, iterations=REACH)
    white = np.percentile(grey[near], WHITE_PERCENTILE)
    is_deep = distance < -DEEP_MM
    if not is_deep.any():  # too thin to know its own grey value
        return np.full(len(LAYERS_MM), np.nan)
    own = np.median(grey[is_deep])
    relative = (grey - own) / (white - own)
    # each voxel belongs to the place of the border that it is nearest to
    place = np.ravel_multi_index(inner, structure.shape)
    place = np.where(structure, place.ravel()[np.ravel_multi_index(outer, structure.shape)], place)
    far = ~structure & (distance > FAR_MM[0]) & (distance <= FAR_MM[1])
    count = np.bincount(place[far], minlength=structure.size)
    total = np.bincount(place[far], weights=relative[far], minlength=structure.size)
    least = np.full(structure.size, np.inf)
    np.minimum.at(least, place[far], relative[far])
    is_white = (count > 0) & (total > WHITE * count) & (least > WHITE_LEAST)
    faces_white = is_white[place]
    means = []
    for middle in LAYERS_MM:
        layer = faces_white & (distance > middle - 0.5) & (distance <= middle + 0.5)
        means.append(relative[layer].mean() if layer.sum() >= MIN_VOXELS else np.nan)
    return np.array(means)


if __name__ == "__main__":
    main()
