"""Cuts the regions of both hippocampi out of a real T1 volume that nilearn ships, segments them and draws the result."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import nibabel as nib
import numpy as np
from nilearn.datasets import load_mni152_template

mpl.use("Agg")

import pipeline
from pipeline.picture import overlay
from pipeline.write import write_bytes

OUT = Path("demo")
# mm in MNI space, along R, A, S: boxes as the training crops have them
REGIONS = {"left": ((-46, -10), (-46, 6), (-32, 8)), "right": ((10, 46), (-46, 6), (-32, 8))}


def crop(image: nib.Nifti1Image, box: tuple[tuple[int, int], ...]) -> nib.Nifti1Image:
    """The part of an image between two corners, given in mm."""
    to_voxel = np.linalg.inv(image.affine)
    corners = np.array([nib.affines.apply_affine(to_voxel, corner) for corner in zip(*box, strict=True)])
    low, high = np.rint(corners.min(axis=0)).astype(int), np.rint(corners.max(axis=0)).astype(int)
    cut: nib.Nifti1Image = image.slicer[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    return cut


def main() -> None:
    """Segments both sides and says what was found and where."""
    template = load_mni152_template(resolution=1)
    model = pipeline.load("hippocampus_mr_3d", device="cpu")
    for side, box in REGIONS.items():
        image = crop(template, box)
        write_bytes(OUT / f"{side}.nii", image.to_bytes())
        result = pipeline.segment(model, OUT / f"{side}.nii")
        write_bytes(OUT / f"{side}_seg.nii", result.image.to_bytes())
        overlay(image, result.labels, model.spec.labels, OUT / f"{side}.png", title=f"{side} hippocampus")
        volumes = ", ".join(f"{name} {mm3:.0f} mm³" for name, mm3 in result.volumes_mm3.items())
        centre = nib.affines.apply_affine(result.affine, np.argwhere(result.labels > 0).mean(axis=0))
        print(f"{side}: {volumes}; centre at R {centre[0]:.0f}, A {centre[1]:.0f}, S {centre[2]:.0f} mm (MNI)")
        print(f"  {OUT / f'{side}_seg.nii'}, {OUT / f'{side}.png'}")


if __name__ == "__main__":
    main()
