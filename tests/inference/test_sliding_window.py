from __future__ import annotations

from itertools import permutations
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.inferers import SliceInferer, sliding_window_inference
from phantom import OneVoxelNetwork, make_model, nifti, parse_spec, reorient, smooth
from torch import nn

from pipeline.errors import ConfigError, ShapeError
from pipeline.inference.predictor import predict_case
from pipeline.inference.sliding_window import WindowInferer, build_inferer
from pipeline.inference.test_time_augmentation import Mirroring


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("size", [(16, 12, 8), (33, 25, 18), (40, 12, 9)])
def test_windows_give_what_the_whole_volume_gives(overlap: float, size: tuple[int, ...]) -> None:
    """For a network that sees little, away from the windows' faces blending changes nothing."""
    spec = parse_spec(overlap=overlap, roi_size=[16, 12, 8])
    x = torch.randn(1, 2, *size)
    net = OneVoxelNetwork(3)
    with torch.no_grad():
        windowed, whole = build_inferer(spec)(x, net), net(x)
    assert windowed.shape == whole.shape
    at_faces = torch.zeros(size, dtype=torch.bool)
    for axis, (n, roi) in enumerate(zip(size, spec.roi_size, strict=True)):
        for start in build_inferer(spec).windows(size, 3).starts[axis]:
            for face in {start, start + roi - 1} - {0, n - 1}:
                at_faces.select(axis, face).fill_(True)
    differs = ((windowed - whole).abs() > 1e-5).any(dim=1)[0]
    assert not (differs & ~at_faces).any()
    assert not at_faces.all()


@pytest.mark.parametrize("size", [(3, 2, 5), (16, 1, 1), (7, 40, 3)])
@pytest.mark.parametrize("dims", [2, 3])
def test_volumes_smaller_than_the_window_are_padded(size: tuple[int, ...], dims: int) -> None:
    """Any size goes in, and the same size comes out, also for a U-Net whose strides do not divide
    it.
    """
    with torch.no_grad():
        assert build_inferer(parse_spec(dims))(
            torch.randn(1, 2, *size), OneVoxelNetwork(dims)
        ).shape == (
            1,
            3,
            *size,
        )


@pytest.mark.parametrize("slice_axis", "RAS")
@pytest.mark.parametrize("axes", list(permutations("RAS")))
def test_slices_do_not_see_their_neighbours(slice_axis: str, axes: tuple[str, ...]) -> None:
    """A 2D network works across the spec's anatomical axis, and what changes in one slice stays in
    it.
    """
    spec = parse_spec(2, slice_axis=slice_axis, orientation="".join(axes), roi_size=[8, 6])
    dim = axes.index(slice_axis)
    x = torch.randn(1, 2, 13, 11, 9)
    changed = x.clone()
    changed.select(dim + 2, 4).normal_()
    with torch.no_grad():
        differs = (
            build_inferer(spec)(x, OneVoxelNetwork(2))
            != build_inferer(spec)(changed, OneVoxelNetwork(2))
        ).any(dim=1)[0]
    others = [i for i in range(differs.shape[dim]) if i != 4]
    assert differs.select(dim, 4).all()
    assert not differs.index_select(dim, torch.tensor(others)).any()


@pytest.mark.parametrize("slice_axis", "RAS")
@pytest.mark.parametrize("axcodes", ["RAS", "PIL", "SRA", "AIR"])
def test_the_slice_axis_is_anatomical_in_any_file(slice_axis: str, axcodes: str) -> None:
    """A network that tells slices apart by their mean labels whole anatomical slices, however the
    file is stored.
    """

    class Slices(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean = x.mean(dim=(2, 3), keepdim=True).expand_as(x)
            return torch.cat([mean * 0 - 9, mean, -mean], dim=1)

    axis = "RAS".index(slice_axis)
    size = [(24, 21), (17, 21), (17, 24)][axis]  # a whole slice a window
    spec = parse_spec(
        2,
        slice_axis=slice_axis,
        roi_size=[n + n % 2 for n in size],
        spacing=[None] * 3,
        overlap=0.0,
    )
    array = smooth() + 40 * np.random.default_rng(2).normal(size=(17, 24, 21)).mean(
        axis=tuple(i for i in range(3) if i != axis), keepdims=True
    ).astype(np.float32)
    image = reorient(nifti(array), axcodes)
    labels = predict_case(make_model(Slices(), spec), image).labels
    upright = np.asarray(nib.as_closest_canonical(nib.Nifti1Image(labels, image.affine)).dataobj)
    lines = np.moveaxis(upright, axis, 0).reshape(upright.shape[axis], -1)
    assert (lines == lines[:, :1]).all()
    assert len(np.unique(lines)) == 2


@pytest.mark.parametrize("overlap", [-0.1, 1.0, float("nan")])
def test_an_overlap_that_cannot_be_is_refused(overlap: float) -> None:
    """With what was expected."""
    with pytest.raises(ConfigError, match="overlap: expected a fraction, 0 ≤ overlap < 1"):
        build_inferer(parse_spec(), overlap)


def test_an_overlap_of_ones_own() -> None:
    """Given, it replaces the spec's; not given, it is the spec's."""
    assert build_inferer(parse_spec(overlap=0.3)).overlap == 0.3
    assert build_inferer(parse_spec(overlap=0.3), 0.0).overlap == 0.0


def test_batches_of_windows_change_nothing() -> None:
    """sw_batch_size is about speed only."""
    x = torch.randn(1, 2, 33, 25, 18)
    with torch.no_grad():
        one, many = (
            build_inferer(parse_spec(roi_size=[16, 12, 8]), sw_batch_size=n)(x, OneVoxelNetwork(3))
            for n in (1, 5)
        )
    torch.testing.assert_close(one, many)


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("size", [(16, 12, 8), (33, 25, 18), (9, 30, 5)])
@pytest.mark.parametrize("mode", ["gaussian", "constant"])
def test_equals_monais_sliding_window(overlap: float, size: tuple[int, ...], mode: str) -> None:
    """With MONAI's placement of windows, to 1e-5, however little is held at a time."""
    x = torch.randn(2, 2, *size)
    with torch.no_grad():
        expected = sliding_window_inference(
            x, (16, 12, 8), 1, OneVoxelNetwork(3), overlap, mode=mode
        )
        for held in (2**30, 1e5, 0):
            ours = WindowInferer(
                (16, 12, 8), overlap, placement="monai", mode=mode, buffer_bytes=held
            )
            torch.testing.assert_close(ours(x, OneVoxelNetwork(3)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("slice_dim", [0, 1, 2])
def test_equals_monais_slice_inferer(slice_dim: int) -> None:
    """Slice by slice along any axis."""
    x = torch.randn(1, 2, 13, 21, 17)
    theirs = SliceInferer(
        spatial_dim=slice_dim, roi_size=(8, 6), sw_batch_size=4, overlap=0.5, mode="gaussian"
    )
    ours = WindowInferer((8, 6), 0.5, slice_dim=slice_dim, sw_batch_size=16, placement="monai")
    with torch.no_grad():
        torch.testing.assert_close(
            ours(x, OneVoxelNetwork(2)), theirs(x, OneVoxelNetwork(2)), rtol=0, atol=1e-5
        )


def test_images_of_two_dimensions() -> None:
    """A 2D network over 2D images."""
    x = torch.randn(2, 2, 31, 17)
    with torch.no_grad():
        expected = sliding_window_inference(x, (8, 6), 1, OneVoxelNetwork(2), 0.5, mode="gaussian")
        ours = WindowInferer((8, 6), 0.5, placement="monai")(x, OneVoxelNetwork(2))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_whole_numbers_go_in() -> None:
    """As floats would."""
    x = torch.randint(0, 200, (1, 2, 20, 14, 9), dtype=torch.uint8)
    how = WindowInferer((16, 12, 8))
    with torch.no_grad():
        assert torch.equal(how(x, OneVoxelNetwork(3)), how(x.float(), OneVoxelNetwork(3)))


def test_a_bad_voxel_spoils_nothing() -> None:
    """NaN and infinity count as the smallest value, and the input stays as it was."""
    x = torch.randn(1, 2, 20, 14, 9)
    bad, low = x.clone(), x.clone()
    bad[0, 0, 4, 4, 4], bad[0, 1, 5, 5, 5] = float("nan"), float("inf")
    low[0, 0, 4, 4, 4] = low[0, 1, 5, 5, 5] = bad[torch.isfinite(bad)].min()
    before = bad.clone()
    with torch.no_grad():
        assert torch.equal(
            WindowInferer((16, 12, 8))(bad, OneVoxelNetwork(3)),
            WindowInferer((16, 12, 8))(low, OneVoxelNetwork(3)),
        )
    assert torch.equal(bad.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("order", [("low", "full"), ("full", "low")])
def test_networks_of_several_outputs(order: tuple[str, str]) -> None:
    """A mapping comes back as a mapping, an output of half the resolution at half the size."""

    class Two(OneVoxelNetwork):
        def forward(self, x: torch.Tensor) -> Any:
            full = super().forward(x)
            both = {"full": full, "low": nn.functional.avg_pool3d(full, 2)}
            return {name: both[name] for name in order}

    x = torch.randn(1, 2, 32, 24, 16)
    with torch.no_grad():
        found = WindowInferer((16, 12, 8), 0.5)(x, Two(3))
        expected = WindowInferer((16, 12, 8), 0.5)(x, OneVoxelNetwork(3))
        pair = WindowInferer((16, 12, 8), 0.5)(
            x, lambda patch: (OneVoxelNetwork(3)(patch), OneVoxelNetwork(3)(patch) * 2)
        )
    assert list(found) == list(order)
    torch.testing.assert_close(found["full"], expected)
    assert found["low"].shape == (1, 3, 16, 12, 8)
    torch.testing.assert_close(pair[1], 2 * expected)


def test_mirror_images_are_averaged() -> None:
    """A network averaged over both directions cannot tell left from right."""
    x = torch.randn(1, 2, 20, 14, 9)
    how = WindowInferer((16, 12, 8), 0.5, mirroring=Mirroring(axes=(0, 2)), mode="constant")
    with torch.no_grad():
        there, back = how(x, OneVoxelNetwork(3)), how(x.flip(2, 4), OneVoxelNetwork(3)).flip(2, 4)
        assert not torch.allclose(there, WindowInferer((16, 12, 8), 0.5)(x, OneVoxelNetwork(3)))
    torch.testing.assert_close(there, back, rtol=0, atol=1e-5)


def test_air_is_not_looked_at_when_asked() -> None:
    """Windows that lie below a level become background without the network."""
    x = torch.full((1, 2, 64, 12, 8), -1.0)
    x[:, :, :20] = 1
    seen = []

    def network(patch: torch.Tensor) -> torch.Tensor:
        seen.append(patch)
        return torch.cat([-patch, patch], 1)

    labels = WindowInferer((16, 12, 8), 0.0, foreground_threshold=0.5)(x, network).argmax(1)
    assert len(seen) == 2
    assert not labels[:, 32:].any()


class TooSmall(OneVoxelNetwork):
    """A network on a device that has room for a few windows at a time."""

    def __init__(self, room: int) -> None:
        super().__init__(3)
        self.room, self.sizes = room, list[int]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("made up")
        return super().forward(x)


def test_a_device_that_is_too_small_gets_fewer_windows_at_once() -> None:
    """Until they fit, with the same result; where one does not, the error goes on."""
    x = torch.randn(1, 2, 40, 30, 9)
    small = TooSmall(2)
    with torch.no_grad():
        found = WindowInferer((16, 12, 8), 0.5, sw_batch_size=8)(x, small)
        torch.testing.assert_close(
            found, WindowInferer((16, 12, 8), 0.5, sw_batch_size=2)(x, OneVoxelNetwork(3))
        )
    assert small.sizes[1:4] == [7, 4, 2]  # the first window went alone
    with pytest.raises(torch.OutOfMemoryError):
        WindowInferer((16, 12, 8))(x, TooSmall(0))


def test_inputs_of_another_rank_are_refused() -> None:
    """With the shape that was expected."""
    with pytest.raises(ShapeError, match=r"expected \(B, C, \*spatial\) with 3 spatial axes"):
        WindowInferer((16, 12, 8))(torch.zeros(1, 2, 30, 30), OneVoxelNetwork(3))
