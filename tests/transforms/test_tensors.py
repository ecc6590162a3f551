"""Images in memory, as MONAI Label and MONAI Deploy hand them over, give what their files give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from pipeline.errors import VolumeError
from pipeline.io import warnings_of
from pipeline.transforms import LoadVolumed

AFFINE = np.array([[0, -1.5, 0, 10], [1.2, 0, 0.1, -20], [0, 0.1, 2, 30], [0, 0, 0, 1.0]])
VOLUME = np.random.default_rng(0).normal(size=(7, 8, 9)).astype(np.float32)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def loaded(image: Any, channels: int = 1) -> MetaTensor:
    tensor: MetaTensor = LoadVolumed("image", channels=channels)({"image": image})["image"]
    return tensor


@pytest.mark.parametrize(
    ("array", "meta"),
    [
        (VOLUME, {"original_channel_dim": "no_channel"}),
        (VOLUME[None], {"spatial_shape": np.array(VOLUME.shape)}),
        (VOLUME[..., None], {"spatial_shape": np.array(VOLUME.shape)}),
        (VOLUME[None], {}),
        (VOLUME[..., None], {}),
    ],
)
def test_a_tensor_gives_what_its_file_gives(
    array: np.ndarray[Any, Any], meta: dict[str, Any], tmp_path: Path
) -> None:
    nib.save(nib.Nifti1Image(VOLUME, AFFINE), tmp_path / "image.nii")
    expected = loaded(str(tmp_path / "image.nii"))
    tensor = loaded(MetaTensor(torch.from_numpy(array.copy()), affine=AFFINE, meta=meta))
    assert torch.equal(tensor.as_tensor(), expected.as_tensor())
    np.testing.assert_allclose(tensor.affine, expected.affine, atol=1e-6)
    assert not warnings_of(tensor.meta)


def test_world_coordinates_of_itk_become_those_of_nifti() -> None:
    tensor = MetaTensor(torch.from_numpy(VOLUME), affine=LPS @ AFFINE, meta={"space": "LPS"})
    np.testing.assert_allclose(loaded(tensor).affine, AFFINE)


def test_an_array_without_an_affine_gets_a_warning() -> None:
    [warning] = warnings_of(loaded(VOLUME).meta)
    assert "no orientation" in warning


def test_an_array_whose_channels_are_unknown_is_refused() -> None:
    with pytest.raises(VolumeError, match=r"shape \(7, 8, 9, 3\), expected"):
        loaded(np.zeros((7, 8, 9, 3)), channels=2)
