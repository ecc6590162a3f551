from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Spacingd
from phantom import oblique, parse_spec, smooth
from scipy import ndimage

from pipeline import resample
from pipeline.types import Affine

AFFINES = {
    "finer": np.diag([2.0, 1.9, 2.6, 1.0]),
    "coarser": np.diag([0.5, 0.45, 0.7, 1.0]),
    "mirrored": np.diag([-0.8, 1.3, -2.0, 1.0]),
    "turned": oblique((0.8, 1.4, 2.2)),
    "same": np.diag([1.2, 1.1, 1.6, 1.0]),
}


def case(affine: Affine) -> dict[str, MetaTensor]:
    image = torch.from_numpy(np.stack([smooth(), smooth(seed=1)]))
    return {
        "image": MetaTensor(image, affine=torch.from_numpy(affine)),
        "label": MetaTensor((image[:1] > 100).float(), affine=torch.from_numpy(affine)),
    }


@pytest.mark.parametrize("name", AFFINES)
def test_equals_monais_spacing(name: str) -> None:
    """Image and label, values and affine; and MONAI's inverse undoes it as it undoes its own."""
    ours = resample.spacing(parse_spec(), ("image", "label"))
    theirs = Spacingd(("image", "label"), pixdim=[1.2, 1.1, 1.6], mode=("bilinear", "nearest"))
    found, expected = ours(case(AFFINES[name])), theirs(case(AFFINES[name]))
    for key in ("image", "label"):
        np.testing.assert_allclose(found[key].affine, expected[key].affine, atol=1e-12)
        np.testing.assert_allclose(found[key].numpy(), expected[key].numpy(), rtol=1e-5, atol=1e-3)
    back, again = ours.inverse(found), theirs.inverse(expected)
    np.testing.assert_allclose(back["image"].numpy(), again["image"].numpy(), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(back["image"].affine, AFFINES[name], atol=1e-12)


def test_the_short_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI's resampling of an image is not called where axes run parallel."""
    monkeypatch.setattr("monai.transforms.spatial.array.spatial_resample", None)
    resample.spacing(parse_spec(), ("image", "label"))({"image": case(AFFINES["turned"])["image"]})


@pytest.mark.parametrize("ratio", [1.3, 2.0, 3.7])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_averages_are_a_convolution_with_a_triangle(ratio: float, axis: int) -> None:
    """Against scipy, cut off at the edge; the affine and the mean brightness stay."""
    image = case(AFFINES["turned"])["image"]
    reach = int(ratio)
    kernel = np.array([1 - abs(i) / ratio for i in range(-reach, reach + 1)])
    array = image.numpy().astype(np.float64)
    total = ndimage.correlate1d(array, kernel, axis=axis, mode="constant")
    expected = total / ndimage.correlate1d(np.ones_like(array), kernel, axis=axis, mode="constant")
    found = resample.averaged(image, axis, ratio)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.affine, AFFINES["turned"])  # type: ignore[attr-defined]


def test_only_what_gets_coarser_is_averaged() -> None:
    """Axes that keep their spacing or get finer stay voxel for voxel; a coarse grid misses no voxel."""
    before: dict[Any, Any] = {**case(AFFINES["coarser"])}  # 0.5, 0.45, 0.7 mm
    same = resample.Antialiasd("image", [None, 0.45, 0.3])(dict(before))
    assert torch.equal(same["image"], before["image"])
    spike = torch.zeros(1, 24, 9, 10)
    spike[0, 11, 4, 5] = 1  # between two voxels of the coarse grid
    volume: dict[Any, Any] = {"image": MetaTensor(spike, affine=torch.eye(4))}
    spec = parse_spec(spacing=[2.0, 1.0, 1.0])
    without = resample.spacing(spec, ("image", "label"))(dict(volume))["image"]
    seen = resample.spacing(spec, ("image", "label"))(resample.Antialiasd("image", spec.spacing)(dict(volume)))["image"]
    assert float(without.sum()) == 0
    assert float(seen.sum()) == pytest.approx(0.5)
