from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from phantom import SHAPE, nifti, oblique, parse_spec, reorient, save

from pipeline.errors import ConfigError, VolumeError
from pipeline.inference.memory_plan import (
    estimate_memory,
    parse_size,
    ready_bytes,
)
from pipeline.inference.model import Model
from pipeline.inference.predictor import predict_case
from pipeline.io.header import read_header
from pipeline.transforms.network_grid import network_grid_shape
from pipeline.transforms.preprocess import preprocessing


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4G", 4 * 2**30),
        ("1500M", 1500 * 2**20),
        ("2.5GB", 5 * 2**29),
        ("1 GiB", 2**30),
        ("123", 123),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    """As people write them, in powers of 1024."""
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "G", "four", "-1G", "0", "1X"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """With an example of one."""
    with pytest.raises(ConfigError, match="expected a size such as 4G"):
        parse_size(text)


@pytest.mark.parametrize("axcodes", ["RAS", "PSL", "ILA"])
@pytest.mark.parametrize("spacing", [[1.2, 1.1, 1.6], [None, 0.7, None]])
def test_the_grid_is_known_from_the_header(axcodes: str, spacing: list[float | None]) -> None:
    """Its size is that of the preprocessed image."""
    spec = parse_spec(spacing=spacing)
    image = reorient(nifti(affine=oblique((0.8, 1.3, 2.2))), axcodes)
    case: Any = preprocessing(spec)({"image": image})
    assert network_grid_shape(spec, read_header(image)) == tuple(case["image"].shape[1:])


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.mha", "a.nrrd"])
def test_headers_of_files(name: str, tmp_path: Path) -> None:
    """The same shape and affine as the volume that is read."""
    path = tmp_path / name
    if name.endswith(("mha", "nrrd")):
        save(tmp_path / "a.nii")
        sitk.WriteImage(sitk.ReadImage(str(tmp_path / "a.nii")), str(path))
    else:
        save(path)
    found = read_header(path)
    assert found.shape == SHAPE
    np.testing.assert_allclose(found.affine, oblique(), atol=1e-4)
    assert (
        read_header(
            nib.load(tmp_path / "a.nii") if path.suffix != ".gz" and name == "a.nii" else path
        ).bytes_per_voxel
        >= 4
    )


def test_labels_do_not_depend_on_the_limit(model: Model, volume_file: Path) -> None:
    """A limit changes how windows are grouped, not the labels."""
    expected = predict_case(model, str(volume_file)).labels
    around = ready_bytes(model) + 2**28
    for limit in (around, around * 2, None):
        limited = replace(model, max_memory=limit)
        found = predict_case(limited, str(volume_file)).labels
        np.testing.assert_array_equal(found, expected)


def test_a_case_that_cannot_fit_is_refused(model: Model, volume_file: Path) -> None:
    """With what it needs and what is allowed."""
    with pytest.raises(
        VolumeError, match=r"needs about \d+\.\d\d GB of memory, --max-memory allows 0\.00 GB"
    ):
        predict_case(replace(model, max_memory=10_000), str(volume_file))


def test_an_inferer_of_the_users_is_estimated_by_whole_logits(model: Model) -> None:
    """It cannot be told to hold less."""
    spec = replace(model.spec, spacing=(None, None, None))
    small, large = (
        estimate_memory(
            replace(model, spec=spec), [read_header(nifti(np.zeros(s, np.float32)))], 0, 1e9
        )
        for s in (SHAPE, (80, 90, 70))
    )
    assert small.peak < large.peak
