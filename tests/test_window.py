from __future__ import annotations

from itertools import permutations

import nibabel as nib
import numpy as np
import pytest
import torch
from phantom import model_of, nifti, parse_spec, smooth, turn
from torch import nn

from pipeline.engine import predict_case
from pipeline.errors import ConfigError
from pipeline.window import inferer


class Near(nn.Module):
    """A network that sees one voxel to each side."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        conv = nn.Conv3d if dims == 3 else nn.Conv2d
        self.layer = conv(2, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x))


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("size", [(16, 12, 8), (33, 25, 18), (40, 12, 9)])
def test_windows_give_what_the_whole_volume_gives(overlap: float, size: tuple[int, ...]) -> None:
    """For a network that sees little, away from the windows' faces blending changes nothing."""
    spec = parse_spec(overlap=overlap, roi_size=[16, 12, 8])
    x = torch.randn(1, 2, *size)
    net = Near(3)
    with torch.no_grad():
        windowed, whole = inferer(spec)(x, net), net(x)
    assert windowed.shape == whole.shape
    at_faces = torch.zeros(size, dtype=torch.bool)
    for axis, (n, roi) in enumerate(zip(size, spec.roi_size, strict=True)):
        for start in {*range(0, n - roi, int(roi * (1 - overlap))), n - roi}:
            for face in {start, start + roi - 1} - {0, n - 1}:
                at_faces.select(axis, face).fill_(True)
    differs = ((windowed - whole).abs() > 1e-5).any(dim=1)[0]
    assert not (differs & ~at_faces).any()
    assert not at_faces.all()


@pytest.mark.parametrize("size", [(3, 2, 5), (16, 1, 1), (7, 40, 3)])
@pytest.mark.parametrize("dims", [2, 3])
def test_volumes_smaller_than_the_window_are_padded(size: tuple[int, ...], dims: int) -> None:
    """Any size goes in, and the same size comes out, also for a U-Net whose strides do not divide it."""
    with torch.no_grad():
        assert inferer(parse_spec(dims))(torch.randn(1, 2, *size), Near(dims)).shape == (1, 3, *size)


@pytest.mark.parametrize("slice_axis", "RAS")
@pytest.mark.parametrize("axes", list(permutations("RAS")))
def test_slices_do_not_see_their_neighbours(slice_axis: str, axes: tuple[str, ...]) -> None:
    """A 2D network works across the spec's anatomical axis, and what changes in one slice stays in it."""
    spec = parse_spec(2, slice_axis=slice_axis, orientation="".join(axes), roi_size=[8, 6])
    dim = axes.index(slice_axis)
    x = torch.randn(1, 2, 13, 11, 9)
    changed = x.clone()
    changed.select(dim + 2, 4).normal_()
    with torch.no_grad():
        differs = (inferer(spec)(x, Near(2)) != inferer(spec)(changed, Near(2))).any(dim=1)[0]
    others = [i for i in range(differs.shape[dim]) if i != 4]
    assert differs.select(dim, 4).all()
    assert not differs.index_select(dim, torch.tensor(others)).any()


@pytest.mark.parametrize("slice_axis", "RAS")
@pytest.mark.parametrize("axcodes", ["RAS", "PIL", "SRA", "AIR"])
def test_the_slice_axis_is_anatomical_in_any_file(slice_axis: str, axcodes: str) -> None:
    """A network that tells slices apart by their mean labels whole anatomical slices, however the file is stored."""

    class Slices(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean = x.mean(dim=(2, 3), keepdim=True).expand_as(x)
            return torch.cat([mean * 0 - 9, mean, -mean], dim=1)

    axis = "RAS".index(slice_axis)
    size = [(24, 21), (17, 21), (17, 24)][axis]  # a whole slice a window
    spec = parse_spec(2, slice_axis=slice_axis, roi_size=[n + n % 2 for n in size], spacing=[None] * 3, overlap=0.0)
    array = smooth() + 40 * np.random.default_rng(2).normal(size=(17, 24, 21)).mean(
        axis=tuple(i for i in range(3) if i != axis), keepdims=True
    ).astype(np.float32)
    image = turn(nifti(array), axcodes)
    labels = predict_case(model_of(Slices(), spec), image).labels
    upright = np.asarray(nib.as_closest_canonical(nib.Nifti1Image(labels, image.affine)).dataobj)
    lines = np.moveaxis(upright, axis, 0).reshape(upright.shape[axis], -1)
    assert (lines == lines[:, :1]).all()
    assert len(np.unique(lines)) == 2


@pytest.mark.parametrize("overlap", [-0.1, 1.0, float("nan")])
def test_an_overlap_that_cannot_be_is_refused(overlap: float) -> None:
    """With what was expected."""
    with pytest.raises(ConfigError, match="overlap: expected a fraction, 0 ≤ overlap < 1"):
        inferer(parse_spec(), overlap)


def test_an_overlap_of_ones_own() -> None:
    """Given, it replaces the spec's; not given, it is the spec's."""
    assert inferer(parse_spec(overlap=0.3)).overlap == 0.3
    assert inferer(parse_spec(overlap=0.3), 0.0).overlap == 0.0


def test_batches_of_windows_change_nothing() -> None:
    """sw_batch_size is about speed only."""
    x = torch.randn(1, 2, 33, 25, 18)
    with torch.no_grad():
        one, many = (inferer(parse_spec(roi_size=[16, 12, 8]), sw_batch_size=n)(x, Near(3)) for n in (1, 5))
    torch.testing.assert_close(one, many)
