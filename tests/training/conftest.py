"""Fixtures of the training tests."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from phantom import save, smooth

from pipeline.io import write_json


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of four volumes of noise; the label is the brighter half."""
    folder = tmp_path_factory.mktemp("dataset")
    pairs = []
    for i in range(4):
        image = smooth(seed=i)
        label = (image > np.median(image)).astype(np.uint8)
        pair = {"image": f"images/case_{i}.nii.gz", "label": f"labels/case_{i}.nii.gz"}
        save(folder / pair["image"], nib.Nifti1Image(image, np.eye(4)))
        save(folder / pair["label"], nib.Nifti1Image(label, np.eye(4)))
        pairs.append(pair)
    write_json(folder / "dataset.json", {"training": pairs})
    names = [f"case_{i}" for i in range(4)]
    write_json(folder / "splits.json", [{"train": names, "val": names[:2]}])
    return folder
