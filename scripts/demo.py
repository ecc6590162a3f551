"""Segment the MNI152 template of 1 mm, which nilearn ships, with the default model, and draw it."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from nilearn.datasets import load_mni152_template

mpl.use("Agg")

import pipeline
from pipeline.evaluation import draw_overlay
from pipeline.io import write_atomically
from pipeline.types import Affine, Array

OUT = Path("demo")
PRINTED = ("thalamus", "caudate", "putamen", "hippocampus", "amygdala")


def main() -> None:
    """Segment the template, print volumes and positions, and write the files."""
    image, seg, picture = (OUT / name for name in ("brain.nii", "brain_seg.nii", "brain.png"))
    write_atomically(image, load_mni152_template(resolution=1).to_bytes())
    model = pipeline.load(device="cpu")
    result = pipeline.segment(model, image)
    write_atomically(seg, result.image.to_bytes())
    labels = model.labels
    draw_overlay(nib.load(image), result.labels, labels, picture, title="MNI152", slices=5)
    for name in (name for name in result.volumes_mm3 if name not in labels):  # sums
        print(f"{name}: {result.volumes_mm3[name] / 1000:.0f} mL")
    for name in PRINTED:
        for side in ("left", "right"):
            structure = f"{side} {name}"
            mask = result.labels == labels[structure]
            volume = result.volumes_mm3[structure]
            print(
                f"{structure}: {volume:.0f} mm³, centre at {describe_centre(mask, result.affine)}"
            )
    for line in result.warnings:
        print(f"warning: {line}")
    print(f"{sum(result.seconds.values()):.1f} s; {image}, {seg}, {picture}")


def describe_centre(mask: Array, affine: Affine) -> str:
    """Return the centre of a mask in world coordinates, which are those of MNI space here."""
    voxels = np.argwhere(mask)
    if not len(voxels):
        return "nowhere: it was not found"
    centre = apply_affine(affine, voxels.mean(axis=0))
    coordinates = [f"{axis} {mm:.0f}" for axis, mm in zip("RAS", centre, strict=True)]
    return f"{', '.join(coordinates)} mm (MNI)"


if __name__ == "__main__":
    main()
