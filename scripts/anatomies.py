"""Make a folder of label maps to draw training images from: whole heads, and segmented brains.

    python scripts/anatomies.py HEADS SEGMENTED OUTPUT --copies 4 --hold-out head_19

HEADS holds label maps of whole heads, SEGMENTED the label maps that `volseg segment` wrote
(<case>_seg.nii.gz), which are cropped to their structures. Labels of a segmentation need not be
right for an image that is drawn from them to fit them: what counts is another anatomy. Each head
appears --copies times, so that whole heads are drawn more often than brains without a skull.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import click
import nibabel as nib
import numpy as np

MARGIN = 4  # voxels around the structures of a segmentation


@click.command(help=__doc__)
@click.argument("heads", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("segmented", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option("--copies", type=click.IntRange(1), default=1, show_default=True)
@click.option("--hold-out", multiple=True, help="Name of a head that is left out; repeatable.")
def main(
    heads: Path, segmented: Path, output: Path, copies: int, hold_out: tuple[str, ...]
) -> None:
    """Write the folder."""
    named = {path.name.removesuffix(".nii.gz"): path for path in sorted(heads.glob("*.nii.gz"))}
    unknown = set(hold_out) - named.keys()
    if unknown:
        sys.exit(f"{heads}: expected the held-out {', '.join(sorted(unknown))}")
    brains = sorted(segmented.rglob("*_seg.nii.gz"))
    if not named or not brains:
        sys.exit(f"expected label maps in {heads} and files *_seg.nii.gz in {segmented}")
    output.mkdir(parents=True, exist_ok=True)
    for name, path in named.items():
        for copy in range(0 if name in hold_out else copies):
            shutil.copyfile(path, output / f"{name}_{copy + 1}.nii.gz")
    for path in brains:
        nib.save(cropped(nib.load(path)), output / path.name.replace("_seg", ""))
    click.echo(f"{output}: {len(list(output.iterdir()))} label maps")


def cropped(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """Return a label map cut to its structures and a margin, as uint8, in the same place."""
    labels = np.asarray(image.dataobj).astype(np.uint8)
    where = np.argwhere(labels)
    first = np.maximum(where.min(axis=0) - MARGIN, 0)
    last = where.max(axis=0) + MARGIN + 1
    box = tuple(slice(start, stop) for start, stop in zip(first, last, strict=True))
    return image.__class__(labels[box], image.slicer[box].affine)


if __name__ == "__main__":
    main()
