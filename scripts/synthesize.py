"""Synthesise images from the label maps that a run holds out, as a dataset for `volseg evaluate`.

    python scripts/synthesize.py configs/brain_mr_structures_4mm.yaml -o runs/drawn --count 12

The images have voxels of 1 mm by default and the field of view of the run's training patches, or
the one of `--field`: `--field 180 230 230` holds whole heads. The run's `synthesis` gives the
distribution of contrasts; KEY=VALUE changes it, such as synthesis.t1_chance=1. The same seed gives
the same dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import nibabel as nib
import numpy as np

from pipeline.config import Intensity, Run, Spec, load_spec
from pipeline.errors import ConfigError
from pipeline.inference import keep_freed_memory
from pipeline.io import label_maps, write_atomically, write_json
from pipeline.training import read_run
from pipeline.transforms import IMAGE, LABEL, synthesis_transform
from pipeline.types import Affine, Array


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("changes", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the dataset."
)
@click.option("--count", default=12, show_default=True, help="Number of images.")
@click.option("--spacing", default=1.0, show_default=True, help="Voxel size of the images, mm.")
@click.option(
    "--field",
    type=float,
    nargs=3,
    metavar="R A S",
    help="Field of view of the images, mm; that of the run's patches by default.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the random numbers.")
def main(
    config: Path,
    changes: tuple[str, ...],
    output: Path,
    count: int,
    spacing: float,
    field: tuple[float, float, float] | None,
    seed: int,
) -> None:
    """Synthesise images from the label maps that the run of CONFIG holds out."""
    keep_freed_memory()
    run, _ = read_run(config, changes)
    if run.synthesis is None or not run.hold_out:
        raise ConfigError(f"{config}: expected a run with synthesis and hold_out")
    spec = load_spec(Path(run.bundle) / "configs" / "spec.yaml")
    size = image_size(field or training_field(run, spec), spacing)
    # Only the grid matters here, and a network without pooling accepts any size.
    any_size = replace(spec.network, features=(1, 1), strides=(1,), deep_supervision=0)
    grid = replace(
        spec, roi_size=size, spacing=(spacing,) * 3, intensity=Intensity(), network=any_size
    )
    transform = synthesis_transform(grid, run.synthesis).set_random_state(seed)
    maps = [case for case in label_maps(run.dataset) if case["case"] in run.hold_out]
    affine = np.diag([spacing, spacing, spacing, 1.0])
    values = np.array(list(spec.labels.values()), dtype=np.uint16)
    pairs = []
    for number in range(count):
        case = maps[number % len(maps)]
        sample = transform(dict(case))
        image = f"images/{case['case']}_{number:03}.nii.gz"
        label = f"labels/{case['case']}_{number:03}.nii.gz"
        save(output / image, sample[IMAGE][0].numpy(), affine)
        save(output / label, values[sample[LABEL][0].numpy().astype(int)], affine)
        pairs.append({"image": image, "label": label})
        click.echo(f"{number + 1} of {count}: {image}", err=True)
    labels = {str(value): name for name, value in spec.labels.items()}
    dataset = {"labels": labels, "modality": {"0": "MR"}, "training": pairs}
    write_json(output / "dataset.json", dataset)
    settings = " ".join([str(config), *changes])
    origin = f"Made by scripts/synthesize.py from {settings}, seed {seed}.\n"
    write_atomically(output / "README", origin.encode())


def training_field(run: Run, spec: Spec) -> list[float]:
    """Return the extent of the run's training patches, mm."""
    voxels = run.patch_size or spec.roi_size
    # A spacing that the spec leaves open counts as 1 mm.
    spacing = [float(mm or 1) for mm in spec.spacing]
    return [n * mm for n, mm in zip(voxels, spacing, strict=True)]


def image_size(field: Sequence[float], spacing: float) -> tuple[int, ...]:
    """Return the size in voxels of an image with this extent and spacing, mm."""
    return tuple(round(length / spacing) for length in field)


def save(path: Path, array: Array, affine: Affine) -> None:
    """Write one image, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


if __name__ == "__main__":
    main()
