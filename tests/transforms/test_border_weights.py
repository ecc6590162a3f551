"""Border weights against brute force, in mm of the affine, and the balance of classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from pipeline.transforms.border_weights import WEIGHT, BorderWeightd, border_weights, class_weights
from pipeline.types import Array


def blobs(shape: tuple[int, ...]) -> Array:
    """Four objects of two classes, one of them touching another class."""
    classes = np.zeros(shape, dtype=np.int64)
    corner = (slice(1, 3),) * len(shape)
    classes[corner] = 1
    beside = (slice(3, 5), *corner[1:])
    classes[beside] = 2
    classes[(slice(-3, -1),) * len(shape)] = 1
    far = (0, *[-1] * (len(shape) - 1))
    classes[far] = 2
    return classes


def brute_force(classes: Array, spacing: list[float], weight: float, sigma: float) -> Array:
    """Every voxel against every voxel of every object."""
    objects = []
    for value in (1, 2):
        parts, count = ndimage.label(classes == value)
        objects += [np.argwhere(parts == n + 1) * spacing for n in range(count)]
    out = np.zeros(classes.shape)
    for place in np.ndindex(classes.shape):
        here = np.array(place) * spacing
        first, second = sorted(np.linalg.norm(thing - here, axis=1).min() for thing in objects)[:2]
        out[place] = weight * np.exp(-((first + second) ** 2) / (2 * sigma**2))
    return out


@pytest.mark.parametrize(
    ("shape", "spacing"), [((11, 13), [1.0, 1.0]), ((9, 8, 7), [0.8, 1.0, 4.5])]
)
def test_the_border_term_is_the_brute_force_one(
    shape: tuple[int, ...], spacing: list[float]
) -> None:
    classes = blobs(shape)
    assert np.allclose(
        border_weights(classes, spacing, 10.0, 5.0),
        brute_force(classes, spacing, 10.0, 5.0),
        rtol=1e-12,
    )


def test_border_weights_are_in_mm_of_the_affine() -> None:
    """Two objects two voxels apart: near along the fine axis, far along the coarse one."""
    affine = np.diag([1.0, 1.0, 6.0, 1.0])
    classes = np.zeros((9, 9, 9), dtype=np.float32)
    classes[4, 4, 4] = classes[7, 4, 4] = classes[4, 4, 7] = 1
    weight = BorderWeightd("label", 10.0, 5.0)(
        {"label": MetaTensor(torch.from_numpy(classes)[None], affine=torch.from_numpy(affine))}
    )[WEIGHT]
    expected = class_weights(classes) + brute_force(
        classes.astype(np.int64), [1.0, 1.0, 6.0], 10.0, 5.0
    )
    assert weight.shape == (1, 9, 9, 9)
    assert np.allclose(weight[0].numpy(), expected, rtol=1e-5)
    assert weight[0, 5, 4, 4] > 5 > weight[0, 4, 4, 5]


def test_one_object_has_no_border() -> None:
    classes = np.zeros((5, 6), dtype=np.int64)
    classes[2, 3] = 1
    assert not border_weights(classes, [1.0, 1.0], 10.0, 5.0).any()
    assert not border_weights(np.zeros((5, 6), dtype=np.int64), [1.0, 1.0], 10.0, 5.0).any()


def test_class_weights_balance_classes() -> None:
    classes = blobs((9, 8, 7))
    weights = class_weights(classes)
    sums = [weights[classes == value].sum() for value in (0, 1, 2)]
    assert np.allclose(sums, sums[0])
    assert weights.mean() == pytest.approx(1)
