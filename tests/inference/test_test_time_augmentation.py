"""Averages over mirror images: a mirrored scan gives mirrored labels, with sides that changed places."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from phantom import make_bundle, parse_spec, smooth

from pipeline.bundle.opening import open_bundle
from pipeline.errors import ConfigError
from pipeline.inference.predictor import predict_case
from pipeline.inference.test_time_augmentation import (
    Mirroring,
    average_mirrored,
    counterparts,
    mirroring_of,
)

SIDED = {"background": 0, "left thing": 5, "right thing": 3, "middle": 9}


def conv(dims: int, classes: int) -> torch.nn.Module:
    torch.manual_seed(1)
    kind = torch.nn.Conv3d if dims == 3 else torch.nn.Conv2d
    return kind(1, classes, 3, padding=1)


def test_sides_are_known_by_name() -> None:
    """Whatever stands around the word, but not within another."""
    assert counterparts(["b", "left x", "y", "right x"]) == (0, 3, 2, 1)
    assert counterparts(
        ["Left-Caudate", "ctx_right_a", "Right-Caudate", "ctx_left_a", "cleft"]
    ) == (2, 3, 0, 1, 4)
    with pytest.raises(ConfigError, match="got only right y"):
        counterparts(["left x", "right x", "right y"])


@pytest.mark.parametrize(("orientation", "directions", "axes", "sides"), [
    ("RAS", ("R",), (0,), 0), ("SLP", ("R", "A"), (1, 2), 1), ("PIR", ("S",), (1,), None)])  # fmt: skip
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
    """The window's axes are those that are left; the one that slices are stacked along has no mirror."""
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
    """Summed up here one by one; what is more, mirroring the input mirrors the output."""
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
    """File to file; without the average this network's labels are others."""
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
