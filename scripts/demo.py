"""Segments a real T1 volume that nilearn ships, the MNI152 template of 1 mm, with the default model, and draws the result."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import nibabel as nib
import numpy as np
from nilearn.datasets import load_mni152_template

mpl.use("Agg")

import pipeline
from pipeline.evaluation import draw_overlay
from pipeline.io import write_atomically

OUT = Path("demo")
TOLD = ("thalamus", "caudate", "putamen", "hippocampus", "amygdala")


def main() -> None:
    """Segments the head and says what was found and where."""
    image, seg, drawn = (OUT / name for name in ("brain.nii", "brain_seg.nii", "brain.png"))
    write_atomically(image, load_mni152_template(resolution=1).to_bytes())
    model = pipeline.load(device="cpu")
    result = pipeline.segment(model, image)
    write_atomically(seg, result.image.to_bytes())
    draw_overlay(nib.load(image), result.labels, model.spec.labels, drawn, title="MNI152", slices=5)
    for name in model.spec.sums:
        print(f"{name}: {result.volumes_mm3[name] / 1000:.0f} mL")
    for name in TOLD:
        for side in ("left", "right"):
            voxels = np.argwhere(result.labels == model.spec.labels[f"{side} {name}"])
            where = (
                nib.affines.apply_affine(result.affine, voxels.mean(axis=0))
                if len(voxels)
                else [np.nan] * 3
            )
            print(f"{side} {name}: {result.volumes_mm3[f'{side} {name}']:.0f} mm³, centre at "
                  + ", ".join(f"{axis} {mm:.0f}" for axis, mm in zip("RAS", where, strict=True)) + " mm (MNI)")  # fmt: skip
    print("\n".join(f"warning: {line}" for line in result.warnings))
    print(f"{sum(result.seconds.values()):.1f} s; {image}, {seg}, {drawn}")


if __name__ == "__main__":
    main()
