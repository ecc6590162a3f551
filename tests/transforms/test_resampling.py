from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Spacingd
from phantom import oblique, parse_spec, smooth
from torch.nn import functional

from pipeline.transforms.resampling import (
    axis_samplings,
    sample_axes,
    spacing_transform,
    with_averaging,
)
from pipeline.types import Affine

AFFINES = {
    "finer": np.diag([2.0, 1.9, 2.6, 1.0]),
    "mirrored": np.diag([-1.4, 1.3, -2.0, 1.0]),
    "turned": oblique((1.3, 1.4, 2.2)),
    "same": np.diag([1.2, 1.1, 1.6, 1.0]),
}
COARSER = np.diag([0.5, 0.45, 0.7, 1.0])


def case(affine: Affine) -> dict[str, MetaTensor]:
    image = torch.from_numpy(np.stack([smooth(), smooth(seed=1)]))
    return {
        "image": MetaTensor(image, affine=torch.from_numpy(affine)),
        "label": MetaTensor((image[:1] > 100).float(), affine=torch.from_numpy(affine)),
    }


@pytest.mark.parametrize("name", AFFINES)
def test_equals_monais_spacing(name: str) -> None:
    """Values and affines of image and label are equal, and so are their inverses."""
    ours = spacing_transform(parse_spec(), ("image", "label"))
    theirs = Spacingd(("image", "label"), pixdim=[1.2, 1.1, 1.6], mode=("bilinear", "nearest"))
    found, expected = ours(case(AFFINES[name])), theirs(case(AFFINES[name]))
    for key in ("image", "label"):
        np.testing.assert_allclose(found[key].affine, expected[key].affine, atol=1e-12)
        np.testing.assert_allclose(found[key].numpy(), expected[key].numpy(), rtol=1e-5, atol=1e-3)
    back, again = ours.inverse(found), theirs.inverse(expected)
    np.testing.assert_allclose(back["image"].numpy(), again["image"].numpy(), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(back["image"].affine, AFFINES[name], atol=1e-12)


def test_monais_resampling_is_not_used_on_parallel_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacing it by None changes nothing."""
    monkeypatch.setattr("monai.transforms.spatial.array.spatial_resample", None)
    spacing_transform(parse_spec(), ("image", "label"))({"image": case(AFFINES["turned"])["image"]})


def test_the_inverse_of_an_average_is_monais() -> None:
    """The grids are the same, and the inverse interpolates linearly."""
    ours = spacing_transform(parse_spec(), ("image", "label"))
    theirs = Spacingd(("image", "label"), pixdim=[1.2, 1.1, 1.6], mode=("bilinear", "nearest"))
    found, expected = ours(case(COARSER)), theirs(case(COARSER))
    for key in ("image", "label"):
        np.testing.assert_allclose(found[key].affine, expected[key].affine, atol=1e-12)
    assert torch.equal(found["label"], expected["label"])
    expected["image"].copy_(found["image"])
    np.testing.assert_allclose(
        ours.inverse(found)["image"], theirs.inverse(expected)["image"], rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize("size", [17, 9, 5])
def test_averages_are_those_of_torchs_antialiasing(size: int) -> None:
    """Planes of 23 × 24 voxels, which is all that torch supports, averaged along both axes."""
    plane = torch.from_numpy(smooth((23, 24, 3)))[..., 0]
    target = (size, size - 2)
    expected = functional.interpolate(plane[None, None], target, mode="bilinear", antialias=True)[
        0, 0
    ]
    ratio = [n / m for n, m in zip(plane.shape, target, strict=True)]
    matrix = np.diag([*ratio, 1.0, 1.0])
    matrix[:2, 3] = [(r - 1) / 2 for r in ratio]
    whole = axis_samplings(matrix, [0, 1, 2], (*target, 1), (23, 24, 1), snap=0)
    along = [with_averaging(line, r) for line, r in zip(whole, (*ratio, 1.0), strict=True)]
    np.testing.assert_allclose(sample_axes(plane[..., None], along)[..., 0], expected, rtol=1e-5)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_only_what_gets_coarser_is_averaged(axis: int) -> None:
    """A spike stays a spike along other axes; the coarse grid loses none of its intensity."""
    spike = torch.zeros(1, 25, 29, 27)
    spike[0, 11, 13, 15] = 1  # between two voxels of the coarse grid
    mm = [2.0 if i + 1 == axis else 1.0 for i in range(3)]
    volume = {"image": MetaTensor(spike, affine=torch.eye(4))}
    assert float(
        Spacingd("image", pixdim=mm, mode="bilinear")(dict(volume))["image"].sum()
    ) == pytest.approx(0, abs=1e-6)
    seen = spacing_transform(parse_spec(spacing=mm), ("image", "label"))(dict(volume))["image"]
    assert float(seen.sum()) == pytest.approx(0.5)
    across = [dim for dim in range(1, 4) if dim != axis]
    assert (seen.amax(dim=axis)[0] > 0).sum() == 1
    assert all(seen.shape[dim] == spike.shape[dim] for dim in across)


def test_a_slightly_coarser_grid_is_not_blurred_twice() -> None:
    """From 1.8 to 2 mm, a point spreads like a triangle of 2 mm for any offset of the grids."""
    spread = []
    for place in range(20, 29):
        spike = torch.zeros(1, 49, 4, 4)
        spike[0, place] = 1
        found = spacing_transform(parse_spec(spacing=[2.0, 1.8, 1.8]), ("image", "label"))(
            {"image": MetaTensor(spike, affine=torch.from_numpy(np.diag([1.8, 1.8, 1.8, 1.0])))}
        )["image"]
        along = found[0, :, 0, 0].numpy()
        mm = 2.0 * np.arange(len(along)) + float(found.affine[0, 3])
        mean = (along * mm).sum() / along.sum()
        spread.append((along * (mm - mean) ** 2).sum() / along.sum())
    assert np.mean(spread) == pytest.approx(2.0**2 / 6, rel=0.1)
