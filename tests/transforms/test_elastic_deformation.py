"""Elastic deformation: the spline through the control points, shifts, and all keys together."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from phantom import spec_content
from scipy import ndimage

from pipeline.config.parser import parse_config
from pipeline.config.run import Augment
from pipeline.config.spec import Spec
from pipeline.transforms.augmentation import augmentation
from pipeline.transforms.border_weights import WEIGHT
from pipeline.transforms.elastic_deformation import deform, dense_displacements


@pytest.mark.parametrize("shape", [(17, 22), (9, 14, 11)])
def test_the_dense_field_is_the_cubic_spline_through_the_points(shape: tuple[int, ...]) -> None:
    coarse = np.random.default_rng(0).normal(scale=10, size=(len(shape), *(3,) * len(shape)))
    places = np.meshgrid(*(np.linspace(0, 2, n) for n in shape), indexing="ij")
    expected = [ndimage.map_coordinates(part, places, order=3, mode="mirror") for part in coarse]
    field = dense_displacements(coarse, shape)
    assert np.abs(field.numpy() - expected).max() < 1e-4
    for corner in product((0, -1), repeat=len(shape)):
        ours, drawn = np.moveaxis(field.numpy(), 0, -1)[corner], np.moveaxis(coarse, 0, -1)[corner]
        assert np.allclose(ours, drawn, atol=1e-4)


@pytest.mark.parametrize("shape", [(17, 22), (9, 14, 11)])
def test_displacement_by_whole_voxels_is_a_shift(shape: tuple[int, ...]) -> None:
    x = torch.rand(2, *shape)
    field = torch.zeros(len(shape), *shape)
    field[1] = 3
    moved = deform(x, field, "bilinear")
    assert torch.allclose(moved[:, :, :-3], x[:, :, 3:], atol=1e-5)
    assert torch.allclose(moved[:, :, -3:], x[:, :, -4:-1].flip(2), atol=1e-5), (
        "mirrored at the border"
    )


@pytest.mark.parametrize("dims", [2, 3])
def test_image_and_label_are_deformed_together(dims: int) -> None:
    spec = parse_config(Spec, spec_content(dims, roi_size=[48, 64, 56][:dims]), "spec")
    still = Augment(
        affine_chance=0,
        noise_chance=0,
        blur_chance=0,
        intensity_chance=0,
        elastic_chance=1.0,
        elastic_sigma=4.0,
    )
    steps = augmentation(still, spec)
    ramp = torch.stack(
        torch.meshgrid(*(torch.linspace(0, 1, n) for n in spec.roi_size), indexing="ij")
    ).sum(0)[None]
    case = {"image": ramp, "label": (ramp > dims / 2).float(), WEIGHT: 1 + ramp}
    for step in steps:
        if hasattr(step, "set_random_state"):
            step.set_random_state(seed=5)
        case = step(case)
    assert set(case["label"].flatten().tolist()) == {0.0, 1.0}
    assert (case["image"] - ramp).abs().max() > 0.02
    assert torch.allclose(case[WEIGHT] - 1, case["image"], atol=1e-5)
    assert ((case["image"] > dims / 2).float() != case["label"]).float().mean() < 0.02
