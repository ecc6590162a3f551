from __future__ import annotations

from itertools import permutations
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from phantom import nifti, oblique, reorient, smooth, spec_content
from scipy.ndimage import map_coordinates

from pipeline.config.parser import parse_config
from pipeline.config.spec import Spec
from pipeline.transforms.preprocess import IMAGE, SCAN, preprocessing


def parse(dims: int = 3, **changes: Any) -> Spec:
    return parse_config(Spec, spec_content(dims, **changes), "spec")


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SAR", "PIR"])
@pytest.mark.parametrize("spacing", [[1.2, 1.1, 1.6], [None, 1.1, None], [None, None, None]])
def test_the_grid_is_the_one_the_spec_names(orientation: str, spacing: list[float | None]) -> None:
    """Orientation and spacing are the spec's; null keeps the file's spacing on that axis."""
    source = reorient(nifti(), "SLA")
    image = preprocessing(parse(orientation=orientation, spacing=spacing))({"image": source})[
        "image"
    ]
    own = dict(zip("RAS", (0.9, 1.3, 2.1), strict=True)) | dict(
        zip("LPI", (0.9, 1.3, 2.1), strict=True)
    )
    expected = [
        own[axis] if mm is None else mm for axis, mm in zip(orientation, spacing, strict=True)
    ]
    affine = np.asarray(image.affine)
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), expected, rtol=1e-5)
    assert "".join(nib.aff2axcodes(affine)) == orientation


def test_resampling_is_linear_at_the_places_that_the_affine_says() -> None:
    """Each voxel is scipy's linear interpolation of the file at the same point of the world.

    The file's first axis gets coarser (0.9 to 1.2 mm): there it is the mean under a triangle of
    the new width.
    """
    spec = parse(intensity={"method": "percentiles", "lower": 0, "upper": 100})
    image = preprocessing(spec)({"image": nifti()})["image"]
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in image.shape[1:]), indexing="ij"), axis=-1)
    back = np.linalg.inv(oblique()) @ np.asarray(image.affine, dtype=np.float64)
    position = np.moveaxis(voxels @ back[:3, :3].T + back[:3, 3], -1, 0)
    file = smooth().astype(np.float64)
    first = position[0].clip(0, len(file) - 1)
    weights = [np.maximum(0, 1 - np.abs(first - i) * 0.9 / 1.2) for i in range(len(file))]
    planes = [map_coordinates(plane, position[1:], order=1, mode="nearest") for plane in file]
    expected = np.sum(
        [w * plane for w, plane in zip(weights, planes, strict=True)], axis=0
    ) / np.sum(weights, axis=0)
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(np.asarray(image[0]), expected, atol=1e-4)


@pytest.mark.parametrize("nonzero", [False, True])
def test_zscore_is_of_each_channels_own_volume(nonzero: bool) -> None:
    """Each channel has mean 0 and deviation 1; with nonzero, zeros stay 0 and do not count."""
    arrays = [smooth(seed=1), 1000 + 50 * smooth(seed=2)]
    for array in arrays:
        array[:5] = 0
    spec = parse(
        channels=["a", "b"], spacing=[None] * 3, intensity={"method": "zscore", "nonzero": nonzero}
    )
    image = np.asarray(preprocessing(spec)({"image": [nifti(array) for array in arrays]})["image"])
    assert image.shape[0] == 2
    for channel, array in zip(image, arrays, strict=True):
        counted = array != 0 if nonzero else np.ones_like(array, dtype=bool)
        values = array[counted].astype(np.float64)
        np.testing.assert_allclose(
            channel[counted], (values - values.mean()) / values.std(), atol=1e-4
        )
        assert (channel[~counted] == 0).all()


def test_percentiles_become_0_and_1() -> None:
    """Values below and above are clipped."""
    spec = parse(spacing=[None] * 3, intensity={"method": "percentiles", "lower": 5, "upper": 90})
    image = np.asarray(preprocessing(spec)({"image": nifti()})["image"][0])
    low, high = np.percentile(smooth(), [5, 90])
    np.testing.assert_allclose(image, ((smooth() - low) / (high - low)).clip(0, 1), atol=1e-4)


@pytest.mark.parametrize("axcodes", ["".join(axes) for axes in permutations("LAI")])
def test_the_label_goes_with_the_image(axcodes: str) -> None:
    """Both are resampled to one grid, and a label map keeps its values."""
    label = (smooth() > 120).astype(np.uint8) * 7
    case = preprocessing(parse())(
        {"image": reorient(nifti(), axcodes), "label": reorient(nifti(label), axcodes)}
    )
    assert case["label"].shape == case["image"].shape
    torch.testing.assert_close(case["label"].affine, case["image"].affine)
    assert set(np.unique(case["label"])) == {0, 7}
    inside, outside = (
        np.asarray(case["image"])[np.asarray(case["label"]) == value] for value in (7, 0)
    )
    assert inside.mean() > outside.mean() + 1


def test_a_label_is_not_needed() -> None:
    """Inference has no label, and gets the same image."""
    with_label = preprocessing(parse())(
        {"image": nifti(), "label": nifti((smooth() > 100).astype(np.uint8))}
    )
    without = preprocessing(parse())({"image": nifti()})
    assert "label" not in without
    assert torch.equal(with_label["image"], without["image"])


def test_the_two_parts_give_the_result_of_the_whole() -> None:
    """Loading keeps the file's grid; the rest brings the case to the network's grid."""
    transform = preprocessing(parse(), labels_spacing=1.5)
    assert transform.reader is transform.transforms[0]
    assert (transform.reader.volume, transform.reader.labels_spacing) == (None, 1.5)
    loaded = transform.load({"image": nifti()})
    np.testing.assert_array_equal(loaded["image"][0], smooth())
    prepared = transform.to_network_grid(loaded)
    whole = transform({"image": nifti()})
    assert torch.equal(prepared["image"], whole["image"])
    torch.testing.assert_close(prepared["image"].affine, whole["image"].affine)


@pytest.mark.parametrize(
    ("kind", "change", "kept"),
    [
        ("int16", 0.0, torch.int16),
        ("uint16", 40_000.0, torch.float32),  # beyond int16
        ("float32", 0.25, torch.float32),
        ("float32", 3e9, torch.float32),
        ("int32", -40_000.0, torch.float32),
    ],
)
def test_the_scan_is_kept_without_loss(kind: str, change: float, kept: torch.dtype) -> None:
    """A scan of small integers takes half the memory; every other one stays as it was read."""
    voxels = np.random.default_rng(0).integers(0, 4000, (21, 17, 13)).astype("float32")
    voxels[3, 4, 5] += change
    affine = oblique((1.0, 2.0, 1.5))
    content = spec_content(3, labels={"background": 0, "a": 1, "b": 2}, refine=[["a", "b"]])
    spec = parse_config(Spec, content, "spec")
    case = preprocessing(spec)({IMAGE: nib.Nifti1Image(voxels.astype(kind), affine)})
    scan = case[SCAN]
    assert scan.dtype == kept
    np.testing.assert_array_equal(scan.numpy()[0], voxels.astype(kind).astype("float32"))
    np.testing.assert_allclose(scan.affine, affine)
