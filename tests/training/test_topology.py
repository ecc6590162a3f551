"""Poolings and kernels by nnU-Net's rule, against those that nnU-Net plans."""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path

import numpy as np
import pytest

from pipeline.training.planning.topology import MIN_BOTTLENECK, fit_topology

ALL, IN_PLANE = [2, 2, 2], [1, 2, 2]

# patch, spacing (z, y, x) → poolings, as nnU-Net 2.8.1 plans them
KNOWN: dict[str, tuple[tuple[int, ...], tuple[float, ...], list[list[int]]]] = {
    "hippocampus": ((40, 56, 40), (1.0, 1.0, 1.0), [ALL] * 3),
    "brain tumour": ((128, 128, 128), (1.0, 1.0, 1.0), [ALL] * 5),
    "prostate": ((20, 320, 256), (3.6, 0.62, 0.62), [IN_PLANE] * 2 + [ALL] * 2 + [IN_PLANE] * 2),
    "ACDC": ((20, 256, 224), (5.0, 1.56, 1.56), [IN_PLANE, ALL, ALL, IN_PLANE, IN_PLANE]),
    "KiTS": ((80, 160, 160), (3.22, 1.62, 1.62), [ALL] * 4 + [IN_PLANE]),
    "brain tumour 2D": ((192, 160), (1.0, 1.0), [[2, 2]] * 5),
    "hippocampus 2D": ((56, 40), (1.0, 1.0), [[2, 2]] * 3),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_poolings(name: str) -> None:
    size, spacing, poolings = KNOWN[name]
    assert fit_topology(size, spacing).strides == poolings


def test_random_patches() -> None:
    """Random patches of 2 and 3 axes get the strides and kernels that nnU-Net gives them.

    `get_pool_and_conv_props` of nnunetv2 2.8.1 made the file, with features of at least 4 voxels
    and any number of poolings; patches that it does not pool are not in it.
    """
    path = Path(__file__).with_name("fixtures") / "nnunet_topologies.json"
    for row in json.loads(path.read_text()):
        topology = fit_topology(row["size"], row["spacing"])
        assert topology.strides == row["strides"], row
        assert topology.kernels == row["kernels"], row


def test_kernels_grow_once_the_voxels_are_comparable() -> None:
    """As published for the prostate: two levels of 1×3×3, then 3×3×3."""
    size, spacing, _ = KNOWN["prostate"]
    assert fit_topology(size, spacing).kernels == [[1, 3, 3]] * 2 + [[3, 3, 3]] * 5


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_thin_slabs_are_pooled_in_plane(order: tuple[int, ...]) -> None:
    """An axis that is too short to be pooled does not keep the others from being pooled."""
    strides = fit_topology(np.take((182, 217, 18), order).tolist(), (1.0, 1.0, 1.0)).strides
    expected = np.take([32, 32, 4], order)
    assert np.prod(strides, axis=0).tolist() == expected.tolist()


def test_tiny_volumes_have_one_pooling() -> None:
    topology = fit_topology((3, 5, 4), (1.0, 2.0, 1.5))
    assert topology.strides == [[2, 2, 2]]
    assert len(topology.kernels) == 2


@pytest.mark.parametrize("seed", range(60))
def test_poolings_are_legal_whatever_the_data(seed: int) -> None:
    """No bottleneck is too small, no pooled axis is far coarser, no kernel is even or shrinks."""
    random = np.random.default_rng(seed)
    dims = int(random.integers(2, 4))
    size = random.integers(2 * MIN_BOTTLENECK + 4, 400, dims).astype(float)
    spacing = random.uniform(0.3, 8, dims)
    topology = fit_topology(size.tolist(), spacing.tolist())
    assert len(topology.kernels) == len(topology.strides) + 1
    for stride in topology.strides:
        pooled = np.array(stride) == 2
        assert pooled.any()
        assert (size[pooled] >= 2 * MIN_BOTTLENECK).all()
        could_be = size >= 2 * MIN_BOTTLENECK
        assert (spacing[pooled] < 2 * spacing[could_be].min()).all()
        size = np.where(pooled, np.ceil(size / 2), size)
        spacing = np.where(pooled, 2 * spacing, spacing)
    kernels = np.array(topology.kernels)
    assert set(kernels.ravel().tolist()) <= {1, 3}
    assert (np.diff(kernels, axis=0) >= 0).all()
    assert (kernels[-1] == 3).all()


def test_the_number_of_poolings_can_be_limited() -> None:
    assert len(fit_topology((512, 512), (0.7, 0.7)).strides) == 7
    assert len(fit_topology((512, 512), (0.7, 0.7), max_poolings=4).strides) == 4
    assert ceil(512 / fit_topology((512, 512), (0.7, 0.7)).multiple(0)) == MIN_BOTTLENECK
