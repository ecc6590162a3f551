"""Make a folder of label maps to draw training images from: whole heads, and segmented brains.

    python scripts/anatomies.py HEADS BRAINS OUTPUT --copies 2 --hold-out head_19

HEADS holds label maps of whole heads, BRAINS the folder `label_maps` of scripts/pseudo_labels.py.
Labels of a segmentation need not be right for an image that is drawn from them to fit them: what
counts is another anatomy. Each head appears --copies times, so that whole heads are drawn more
often than brains without a skull.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import click


@click.command(help=__doc__)
@click.argument("heads", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("brains", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option("--copies", type=click.IntRange(1), default=1, show_default=True)
@click.option("--hold-out", multiple=True, help="Name of a label map that is left out; repeatable.")
def main(heads: Path, brains: Path, output: Path, copies: int, hold_out: tuple[str, ...]) -> None:
    """Write the folder."""
    copies_of = dict.fromkeys(sorted(heads.glob("*.nii.gz")), copies)
    copies_of |= dict.fromkeys(sorted(brains.glob("*.nii.gz")), 1)
    name_of = {path: path.name.removesuffix(".nii.gz") for path in copies_of}
    unknown = set(hold_out) - set(name_of.values())
    if unknown:
        sys.exit(f"{heads}, {brains}: expected the held-out {', '.join(sorted(unknown))}")
    if len({path.parent for path in copies_of}) < 2:
        sys.exit(f"expected label maps *.nii.gz in {heads} and in {brains}")
    output.mkdir(parents=True, exist_ok=True)
    for path, number in copies_of.items():
        for copy in range(0 if name_of[path] in hold_out else number):
            # a brain keeps its name, by which its scan is found
            suffix = f"_{copy + 1}" if path.parent == heads else ""
            shutil.copyfile(path, output / f"{name_of[path]}{suffix}.nii.gz")
    click.echo(f"{output}: {len(list(output.iterdir()))} label maps")


if __name__ == "__main__":
    main()
