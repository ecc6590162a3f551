"""Writes the golden files anew, after a bundle was trained: `python tests/golden/make.py`.

For each shipped bundle `<name>.nii.gz` holds its labels of a made-up volume: two blobs of different
brightness in noise.
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

from pipeline.bundle.opening import open_bundle, shipped_bundles
from pipeline.inference.predictor import predict_case
from pipeline.io.writer import as_nibabel, write_labels
from pipeline.types import LabelMap


def volume() -> nib.Nifti1Image:
    """The made-up volume: oblique, of uneven shape and spacing."""
    random = np.random.default_rng(0)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (31, 46, 27)), indexing="ij")
    blob = np.exp(-3 * (x**2 + (y - 0.3) ** 2 + 2 * z**2)) + 0.7 * np.exp(
        -5 * (x**2 + (y + 0.5) ** 2 + 2 * z**2)
    )
    array = (
        100 * blob
        + 10 * gaussian_filter(random.normal(size=x.shape), 1)
        + random.normal(size=x.shape)
    )
    affine = np.array(
        [[1.1, -0.1, 0.05, -17.0], [0.1, 1.0, -0.15, 4.0], [-0.06, 0.14, 1.3, 9.0], [0, 0, 0, 1.0]]
    )
    affine[:3, :3] = (
        np.linalg.svd(affine[:3, :3])[0] @ np.linalg.svd(affine[:3, :3])[2] * (1.1, 1.0, 1.3)
    )
    return nib.Nifti1Image(array.astype(np.float32), affine)


def golden(name: str) -> Path:
    """The golden label map of a bundle."""
    return Path(__file__).parent / f"{name}.nii.gz"


def labels_of(bundle: Path) -> LabelMap:
    """What a bundle says about the made-up volume."""
    return predict_case(open_bundle(bundle, device="cpu"), volume()).labels


if __name__ == "__main__":
    for path in sorted(shipped_bundles().glob("*/configs/spec.yaml")):
        bundle = path.parent.parent
        write_labels(golden(bundle.name), as_nibabel(labels_of(bundle), volume().affine))
