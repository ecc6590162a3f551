"""Air around a head is background without the network, and the rest is what it would be without the air."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from phantom import make_bundle, nifti, oblique, turn

from pipeline.air import CELL, box, holds, occupied
from pipeline.bundle import open_model
from pipeline.engine import predict_case
from pipeline.types import Array
from pipeline.window import WindowInferer


def blob(shape: tuple[int, ...], low: tuple[int, ...], high: tuple[int, ...]) -> torch.Tensor:
    image = torch.zeros(1, *shape)
    at = (slice(None), *(slice(a, b) for a, b in zip(low, high, strict=True)))
    image[at] = 1
    return image


@pytest.mark.parametrize("low", [(0, 0, 0), (5, 9, 14), (30, 22, 3)])
@pytest.mark.parametrize("size", [(1, 2, 3), (10, 20, 14)])
def test_the_box_holds_all_that_is_there(low: tuple[int, ...], size: tuple[int, ...]) -> None:
    """With a margin, as far as the volume goes, and not much more; at least as large as was asked for."""
    shape = (41, 50, 33)
    high = tuple(min(n, a + s) for n, a, s in zip(shape, low, size, strict=True))
    cells = occupied(blob(shape, low, high), 0.01)
    found = box(cells, shape, (1, 1, 1))
    for part, a, b, n in zip(found, low, high, shape, strict=True):
        assert max(0, a - 3 * CELL) <= part.start <= max(0, a - CELL)
        assert min(n, b + CELL) <= part.stop <= min(n, b + 4 * CELL)
    for part, n, least in zip(box(cells, shape, (40, 60, 16)), shape, (40, 60, 16), strict=True):
        assert part.stop - part.start >= min(n, least)
        assert part.start >= 0
        assert part.stop <= n
    assert holds(cells, low, (1, 1, 1))
    assert not holds(cells, tuple((a + 20) % (n - 1) if s < 10 else 0 for a, n, s in zip(low, shape, size, strict=True)),
                     (1, 1, 1)) or size[0] == 10  # fmt: skip


def test_noise_is_no_tissue_and_nothing_is_everything() -> None:
    random = np.random.default_rng(0)
    image = blob((40, 48, 36), (12, 16, 12), (24, 28, 20)) + torch.from_numpy(random.normal(0, 0.1, (1, 40, 48, 36)))
    assert float(image[:, :8].max()) > 0.25  # some voxel of the air is brighter than the level
    found = box(occupied(image.float(), 0.25), (40, 48, 36), (1, 1, 1))
    assert [part.start for part in found] == [4, 8, 4]
    assert box(occupied(torch.zeros(1, 9, 8, 7), 0.5), (9, 8, 7), (1, 1, 1)) == (slice(0, 9), slice(0, 8), slice(0, 7))


class Smooth(torch.nn.Module):
    """Two classes by the mean of a few voxels: a network whose windows agree where they overlap, but for their edges."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean: torch.Tensor = torch.nn.functional.avg_pool3d(x, 3, 1, 1)
        return torch.cat([0.4 - mean, mean - 0.4], dim=1)


@pytest.mark.parametrize("held", [2**30, 1])
def test_inside_the_box_the_windows_are_those_of_the_crop(held: float) -> None:
    """And outside all is background; fewer windows were looked at."""
    image = blob((64, 70, 50), (20, 26, 14), (38, 45, 30))
    image += 0.02 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    inside = box(occupied(image, 0.1), image.shape[1:], (16, 16, 16))
    part = (slice(None), slice(None), *inside)
    calls = []

    def count(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return Smooth()(x)

    whole = WindowInferer((16, 16, 16), 0.25, air=0.1, held_bytes=held)(image[None], count)
    looked = sum(calls)
    crop = WindowInferer((16, 16, 16), 0.25)(image[None][part], count)
    touched = crop.argmax(1) == whole[part].argmax(1)
    assert touched.all()
    outside = torch.ones(whole.shape[2:], dtype=torch.bool)
    outside[inside] = False
    assert not whole.argmax(1)[0][outside].any()
    assert looked <= sum(calls) - looked
    plain = WindowInferer((16, 16, 16), 0.25)(image[None], Smooth())
    assert (plain.argmax(1) == whole.argmax(1)).float().mean() > 0.999


@pytest.mark.parametrize("axcodes", ["RAS", "LIP", "SRA"])
def test_a_padded_scan_has_the_labels_of_the_scan(axcodes: str, tmp_path: Path) -> None:
    """File to file, whatever the orientation: zeros around change nothing within, where the box is the same."""
    bundle = make_bundle(tmp_path / "tiny", spacing=[None] * 3, overlap=0.25, air=0.0, roi_size=[16, 16, 12],
                         intensity={"method": "percentiles", "lower": 0, "upper": 100})  # fmt: skip
    array: Array = np.zeros((60, 64, 48), dtype=np.float32)
    array[20:37, 24:48, 16:37] = np.random.default_rng(0).uniform(50, 100, (17, 24, 21))
    model: Any = open_model(bundle, device="cpu", runtime="torch")
    found = predict_case(model, turn(nifti(array, oblique()), axcodes))
    upright = turn(nifti(found.labels.astype(np.int16), found.affine), "RAS")
    labels = np.asarray(upright.dataobj)
    assert labels[20:37, 24:48, 16:37].any()
    edge = np.ones(labels.shape, dtype=bool)
    edge[8:49, 12:60, 4:48] = False
    assert not labels[edge].any()
