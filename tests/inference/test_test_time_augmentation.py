"""Averages over mirror images and rotations.

A mirrored scan gives mirrored labels, with left and right exchanged.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from phantom import make_bundle, parse_spec, smooth

from pipeline.bundle.opening import open_bundle
from pipeline.config.spec import NetworkSpec, Spec
from pipeline.errors import ConfigError
from pipeline.inference.predictor import predict_case
from pipeline.inference.sliding_window import build_inferer
from pipeline.inference.test_time_augmentation import (
    Mirroring,
    average_mirrored,
    counterparts,
    mirroring_of,
    rotate_plane,
)

SIDED = {"background": 0, "left thing": 5, "right thing": 3, "middle": 9}


def rotated_spec(roi: tuple[int, ...], rotations: int) -> Spec:
    """Return the spec of a small network of three classes; of coronal slices in 2D."""
    return Spec(
        labels={"background": 0, "one": 1, "two": 2},
        channels=("T1w",),
        spacing=(1.0, 1.0, 1.0),
        roi_size=roi,
        slice_axis="A" if len(roi) == 2 else None,
        overlap=0.5,
        network=NetworkSpec(features=(4, 6, 8), strides=(2, 2)),
        tta_rotations=rotations,
    )


def conv(dims: int, classes: int) -> torch.nn.Module:
    torch.manual_seed(1)
    kind = torch.nn.Conv3d if dims == 3 else torch.nn.Conv2d
    return kind(1, classes, 3, padding=1)


def test_sides_are_known_by_name() -> None:
    """The word counts wherever it stands, but not within another word."""
    assert counterparts(["b", "left x", "y", "right x"]) == (0, 3, 2, 1)
    assert counterparts(
        ["Left-Caudate", "ctx_right_a", "Right-Caudate", "ctx_left_a", "cleft"]
    ) == (2, 3, 0, 1, 4)
    with pytest.raises(ConfigError, match="got only right y"):
        counterparts(["left x", "right x", "right y"])


@pytest.mark.parametrize(
    ("orientation", "directions", "axes", "sides"),
    [("RAS", ("R",), (0,), 0), ("SLP", ("R", "A"), (1, 2), 1), ("PIR", ("S",), (1,), None)],
)
def test_directions_are_anatomical(
    orientation: str, directions: tuple[str, ...], axes: tuple[int, ...], sides: int
) -> None:
    mirror = mirroring_of(
        parse_spec(labels=SIDED, orientation=orientation, tta_mirror=list(directions))
    )
    assert mirror is not None
    assert (mirror.axes, mirror.sides, mirror.order) == (
        axes,
        sides,
        (0, 2, 1, 3) if "R" in directions else (),
    )
    assert mirroring_of(parse_spec(orientation=orientation)) is None


def test_slices_are_mirrored_within() -> None:
    """Axes are those of the window; the axis that slices are stacked along is none."""
    found = mirroring_of(
        parse_spec(2, labels=SIDED, slice_axis="A", orientation="SAL", tta_mirror=["R"])
    )
    assert found == Mirroring(axes=(1,), sides=1, order=(0, 2, 1, 3))
    with pytest.raises(ConfigError, match="within a padded window"):
        parse_spec(2, labels=SIDED, slice_axis="R", tta_mirror=["R"])
    with pytest.raises(ConfigError, match="distinct"):
        parse_spec(tta_mirror=["R", "R"])


@pytest.mark.parametrize("axes", [(0,), (2, 0), (0, 1, 2)])
def test_it_is_the_mean_over_all_mirror_images(axes: tuple[int, ...]) -> None:
    """It equals the sum over all flips, and mirroring the input mirrors the output."""
    network, x, order = conv(3, 4), torch.randn(2, 1, 6, 5, 7), [0, 2, 1, 3]
    found = average_mirrored(network, Mirroring(axes=axes, sides=0, order=tuple(order)))
    with torch.no_grad():
        parts = []
        for flips in product((False, True), repeat=len(axes)):
            dims = [axis + 2 for axis, flip in zip(axes, flips, strict=True) if flip]
            part = network(x.flip(dims)).flip(dims)
            parts.append(part[:, order] if 2 in dims else part)
        torch.testing.assert_close(found(x), torch.stack(parts).mean(0))
        torch.testing.assert_close(found(x.flip(2)).flip(2)[:, order], found(x))
    assert average_mirrored(network, None) is network


def test_a_mirrored_scan_gives_mirrored_labels(tmp_path: Path) -> None:
    """Whole path; without the average the labels of this network differ."""
    array = smooth((14, 11, 8)).astype(np.float32)
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    swapped = np.arange(10)
    swapped[[3, 5]] = 5, 3
    agree = {}
    for name, directions in (("with", ["R"]), ("without", [])):
        root = make_bundle(
            tmp_path / name, labels=SIDED, spacing=[1.0, 1.0, 1.0], tta_mirror=directions
        )
        model = open_bundle(root, device="cpu", runtime="torch")
        plain = predict_case(model, nib.Nifti1Image(array, affine)).labels
        turned = predict_case(model, nib.Nifti1Image(array[::-1].copy(), affine)).labels
        agree[name] = float((swapped[turned[::-1]] == plain).mean())
        assert len(np.unique(plain)) > 1
    assert agree["with"] > 0.999
    assert agree["without"] < 0.9


@pytest.mark.parametrize("dims", [2, 3])
def test_four_rotations_are_the_average_over_quarter_turns(dims: int) -> None:
    """On a square plane a quarter turn moves voxels onto voxels: rot90 is the oracle."""
    spec = rotated_spec((32,) * dims, rotations=4)
    torch.manual_seed(0)
    volume = torch.rand(1, 1, 16, 16, 16)
    plane = (2, 4) if dims == 2 else (2, 3)
    grey = torch.nn.Conv2d(1, 3, 1) if dims == 2 else torch.nn.Conv3d(1, 3, 1)
    kernel = (
        torch.nn.Conv2d(3, 3, 3, padding=1) if dims == 2 else torch.nn.Conv3d(3, 3, 3, padding=1)
    )
    net = torch.nn.Sequential(grey, kernel)
    plain = build_inferer(rotated_spec(spec.roi_size, rotations=1))
    with torch.no_grad():
        ours = build_inferer(spec)(volume, net).softmax(1)
        versions = [
            torch.rot90(plain(torch.rot90(volume, k, plane), net).softmax(1), -k, plane)
            for k in range(4)
        ]
    apart = (ours - torch.stack(versions).mean(0)).abs()
    # at the border the volume is mirror-extended, where the oracle's windows are zero-padded
    assert apart[:, :, 3:-3, 3:-3, 3:-3].max() <= 1e-5


def test_rotations_do_not_change_a_network_of_single_voxels() -> None:
    """On an anisotropic grid the average differs only by the blur of interpolation."""
    spec = rotated_spec((16, 16, 16), rotations=7)
    z, y, x = torch.meshgrid(
        torch.arange(20.0), torch.arange(21.0), torch.arange(9.0), indexing="ij"
    )
    smooth = (torch.sin(z / 6) + torch.cos(y / 7) + x / 9)[None, None]
    volume = MetaTensor(
        smooth, affine=torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    )
    net = torch.nn.Conv3d(1, 3, 1)
    with torch.no_grad():
        ours = build_inferer(spec)(volume, net).softmax(1)
        plain = net(smooth).softmax(1)
    assert ours.shape == plain.shape
    assert (ours - plain).abs().max() < 0.02


def test_rotation_is_in_mm() -> None:
    """A disc in mm stays a disc on a grid with pixels of 1 × 3 mm."""
    y, x = torch.meshgrid(torch.arange(61) - 30.0, (torch.arange(21) - 10.0) * 3, indexing="ij")
    disc = torch.exp(-((y**2 + x**2) / 100))
    inside = y**2 + x**2 < 25**2  # the corners of the picture contain its mirror image
    largest_error = 3**2 / 8 * 0.02  # of linear interpolation: h²/8 · max f''
    difference = rotate_plane(disc, 0.7, [1.0, 3.0]) - disc
    assert difference[inside].abs().max() < largest_error
