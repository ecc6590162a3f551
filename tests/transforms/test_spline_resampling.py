"""Resampling by splines against SciPy; the grid, the crop and the axes that go with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from phantom import parse_spec
from scipy import ndimage

from pipeline.config import Intensity, SplineResampling
from pipeline.transforms.intensity import NormalizeEachChanneld, foreground_mask
from pipeline.transforms.spline_resampling import (
    CropToNonzerod,
    FileAxesd,
    SplineResampled,
    axis_orders,
    resample_volume,
    resampled_size,
    separate_axis,
)

SHAPE = (7, 12, 9)
AFFINE = np.array([[0, 1.2, 0, 3], [-0.8, 0, 0, 5], [0, 0, 2.5, -4], [0, 0, 0, 1.0]])


def volume(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, *SHAPE)).astype(np.float32)


def image(values: np.ndarray) -> MetaTensor:
    return MetaTensor(torch.from_numpy(values), affine=torch.from_numpy(AFFINE))


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize("size", [(10, 8, 17), (7, 19, 4)])
def test_values_are_those_of_scipy(order: int, size: tuple[int, ...]) -> None:
    values = volume()
    found = resample_volume(values, size, (order,) * 3, None)
    zoom = np.array(size) / SHAPE
    for channel, given in zip(found, values, strict=True):
        exact = ndimage.zoom(
            given.astype(np.float64), zoom, order=order, mode="nearest", grid_mode=True
        )
        np.testing.assert_allclose(channel, exact.clip(given.min(), given.max()), atol=1e-5)


def test_slices_are_resampled_on_their_own() -> None:
    values, size = volume(), (7, 20, 5)
    found = resample_volume(values, (11, *size[1:]), axis_orders(3, 0, 0), 0)
    stack = []
    for given in values[1]:
        exact = ndimage.zoom(
            given.astype(np.float64), (20 / 12, 5 / 9), order=3, mode="nearest", grid_mode=True
        )
        stack.append(exact.clip(given.min(), given.max()))
    nearest = np.floor((np.arange(11) + 0.5) * 7 / 11).astype(int)
    np.testing.assert_allclose(found[1], np.stack(stack)[nearest], atol=1e-5)


@pytest.mark.parametrize(
    ("source", "target", "separate", "axis"),
    [
        ((1.0, 1.1, 0.9), (1.0, 1.0, 1.0), None, None),
        ((1.0, 1.1, 4.0), (1.0, 1.0, 1.0), None, 2),
        ((1.0, 1.1, 0.9), (5.0, 1.0, 1.0), None, 0),
        ((1.0, 4.0, 0.9), (5.0, 1.0, 1.0), None, 1),  # the source counts first
        ((0.2, 1.2, 1.2), (1.0, 1.0, 1.0), None, None),  # no slices
        ((1.0, 1.1, 4.0), (1.0, 1.0, 1.0), False, None),
        ((1.0, 1.1, 0.9), (1.0, 1.0, 1.0), True, 1),
        ((3.0, 1.0, 1.0), (1.0, 1.0, 1.0), None, None),  # three times is not over three times
    ],
)
def test_the_axis_of_thick_slices(
    source: tuple[float, ...], target: tuple[float, ...], separate: bool | None, axis: int | None
) -> None:
    assert separate_axis(source, target, separate) == axis


def test_the_edges_of_the_volume_stay() -> None:
    spec = parse_spec(spacing=[1.0, 2.0, None], resampling={"order": 1})
    found = SplineResampled(["image"], spec)({"image": image(volume())})["image"]
    size = resampled_size(SHAPE, (0.8, 1.2, 2.5), (1.0, 2.0, 2.5))
    assert tuple(found.shape[1:]) == size == (6, 7, 9)
    for corner in (0.0, 1.0):
        old = AFFINE @ [*(np.array(SHAPE) * corner - 0.5), 1]
        new = found.affine.numpy() @ [*(np.array(size) * corner - 0.5), 1]
        np.testing.assert_allclose(new, old, atol=1e-9)


@pytest.mark.parametrize("order", ["kji", "ijk", "jki"])
def test_every_voxel_keeps_its_place_when_axes_are_ordered(order: str) -> None:
    values = volume()
    found = FileAxesd(["image"], order)({"image": image(values)})["image"]
    letters = {letter: axis for axis, letter in enumerate("ijk")}
    voxel = np.array([4, 10, 6])
    ordered = [voxel[letters[letter]] for letter in order]
    assert found[1][tuple(ordered)] == values[1][tuple(voxel)]
    np.testing.assert_allclose(found.affine.numpy() @ [*ordered, 1], AFFINE @ [*voxel, 1])


def test_the_crop_keeps_voxels_of_any_channel() -> None:
    values = np.zeros((2, *SHAPE), dtype=np.float32)
    values[0, 2, 3:5, 4], values[1, 4, 8, 5:7] = 5, -2
    found = CropToNonzerod(["image"])({"image": image(values)})["image"]
    assert tuple(found.shape) == (2, 3, 6, 3)
    np.testing.assert_allclose(found.affine.numpy() @ [0, 0, 0, 1], AFFINE @ [2, 3, 4, 1])
    empty = image(np.zeros((2, *SHAPE), dtype=np.float32))
    assert CropToNonzerod(["image"])({"image": empty})["image"].shape == empty.shape


def test_the_foreground_includes_what_it_encloses() -> None:
    """By SciPy's own filling, which takes minutes for a large volume."""
    values = (np.random.default_rng(1).random((2, 30, 21, 17)) < 0.55).astype(np.float32)
    expected = ndimage.binary_fill_holes((values != 0).any(axis=0))
    np.testing.assert_array_equal(foreground_mask(values), expected)


def test_the_z_score_of_the_foreground() -> None:
    values = np.zeros((1, 9, 8, 7), dtype=np.float32)
    values[0, 2:7, 2:6, 1:5] = np.random.default_rng(2).normal(50, 9, size=(5, 4, 4))
    values[0, 4, 3, 2] = 0  # enclosed: it counts
    intensity = Intensity(method="zscore", foreground=True)
    found = NormalizeEachChanneld("image", intensity)({"image": image(values)})["image"].numpy()
    inside = found[0, 2:7, 2:6, 1:5]
    assert abs(inside.mean()) < 1e-5
    assert abs(inside.std() - 1) < 1e-5
    assert inside[2, 1, 1] < -3
    assert not found[0, 7:].any()


def test_values_can_stay_as_they_are() -> None:
    values = volume()
    transform = NormalizeEachChanneld("image", Intensity(method="none"))
    np.testing.assert_array_equal(transform({"image": image(values)})["image"].numpy(), values)


def test_resampling_needs_settings() -> None:
    assert SplineResampling().order == 3
    with pytest.raises(ValueError, match="expected a spec with resampling"):
        SplineResampled(["image"], parse_spec())
