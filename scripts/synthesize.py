"""Draws images and their labels from the label maps that a run holds out, as a dataset that `volseg evaluate` scores.

    python scripts/synthesize.py configs/brain_mr_structures_4mm.yaml -o runs/drawn --count 12

The images have voxels of 1 mm and the size of those of the training, whatever its grid, or another one: `--field 180 230 230`
holds whole heads. Which contrasts come up, and how often, is the run's; a seed gives the same dataset again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import nibabel as nib
import numpy as np

from pipeline.config import Intensity, load_spec
from pipeline.errors import ConfigError
from pipeline.io import label_maps, write_atomically, write_json
from pipeline.training import read_run
from pipeline.transforms import IMAGE, LABEL, synthesis_transform


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the dataset."
)
@click.option("--count", default=12, show_default=True, help="Images.")
@click.option("--spacing", default=1.0, show_default=True, help="Of the images, mm.")
@click.option(
    "--field",
    type=float,
    nargs=3,
    metavar="R A S",
    help="Size of the images, mm; the run's own by default.",
)
@click.option("--seed", default=0, show_default=True)
def main(
    config: Path,
    output: Path,
    count: int,
    spacing: float,
    field: tuple[float, float, float] | None,
    seed: int,
) -> None:
    """Draw COUNT images from the maps that CONFIG's run holds out."""
    run, _ = read_run(config)
    if run.synthesis is None or not run.hold_out:
        raise ConfigError(f"{config}: expected a run with synthesis and hold_out")
    spec = load_spec(Path(run.bundle) / "configs" / "spec.yaml")
    mm = field or [
        n * float(one or 1)
        for n, one in zip(run.patch_size or spec.roi_size, spec.spacing, strict=True)
    ]
    size = tuple(round(length / spacing) for length in mm)
    # a network that takes any size; only the grid matters here
    wide = replace(spec, roi_size=size, spacing=(spacing,) * 3, intensity=Intensity(),
                   network=replace(spec.network, features=(1, 1), strides=(1,), deep_supervision=0))  # fmt: skip
    transform = synthesis_transform(wide, run.synthesis).set_random_state(seed)
    maps = [case for case in label_maps(run.dataset) if case["case"] in run.hold_out]
    affine = np.diag([spacing, spacing, spacing, 1.0])
    values = np.array(list(spec.labels.values()), dtype=np.uint16)
    pairs = []
    for number in range(count):
        case = maps[number % len(maps)]
        drawn = transform(dict(case))
        pair = {
            "image": f"images/{case['case']}_{number:03}.nii.gz",
            "label": f"labels/{case['case']}_{number:03}.nii.gz",
        }
        arrays = {
            "image": drawn[IMAGE][0].numpy(),
            "label": values[drawn[LABEL][0].numpy().astype(int)],
        }
        for key, array in arrays.items():
            (output / pair[key]).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), output / pair[key])
        pairs.append(pair)
        click.echo(f"{number + 1} of {count}: {pair['image']}", err=True)
    labels = {str(value): name for name, value in spec.labels.items()}
    write_json(
        output / "dataset.json", {"labels": labels, "modality": {"0": "MR"}, "training": pairs}
    )
    write_atomically(
        output / "README", f"Drawn by scripts/synthesize.py from {config}, seed {seed}.\n".encode()
    )


if __name__ == "__main__":
    main()
