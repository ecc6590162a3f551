"""Air around a head is background without the network; the rest is as without the air."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from phantom import make_bundle, nifti, oblique, reorient

from pipeline.bundle.opening import open_bundle
from pipeline.inference.foreground import (
    CELL,
    foreground_box,
    foreground_cells,
    foreground_level,
    touches_foreground,
)
from pipeline.inference.predictor import predict_case
from pipeline.inference.sliding_window import WindowInferer
from pipeline.types import Array


def blob(shape: tuple[int, ...], low: tuple[int, ...], high: tuple[int, ...]) -> torch.Tensor:
    image = torch.zeros(1, *shape)
    at = (slice(None), *(slice(a, b) for a, b in zip(low, high, strict=True)))
    image[at] = 1
    return image


@pytest.mark.parametrize("low", [(0, 0, 0), (5, 9, 14), (30, 22, 3)])
@pytest.mark.parametrize("size", [(3, 4, 3), (10, 20, 14)])
def test_the_box_is_exact(low: tuple[int, ...], size: tuple[int, ...]) -> None:
    """It is exact to the voxel, of the least size asked for, and within the volume."""
    shape = (41, 50, 33)
    high = tuple(min(n, a + s) for n, a, s in zip(shape, low, size, strict=True))
    image = blob(shape, low, high)
    assert foreground_box(image, 0.01, (1, 1, 1)) == tuple(
        slice(a, b) for a, b in zip(low, high, strict=True)
    )
    for part, a, b, n, least in zip(
        foreground_box(image, 0.01, (40, 60, 16)), low, high, shape, (40, 60, 16), strict=True
    ):
        assert part.stop - part.start == max(min(n, least), b - a)
        assert 0 <= part.start <= a
        assert b <= part.stop <= n
    cells = foreground_cells(image, 0.01)
    assert touches_foreground(cells, low, (1, 1, 1))
    assert not touches_foreground(cells, (40, 0, 30) if low[0] < 30 else (0, 0, 30), (1, 8, 3))


def test_noise_is_background_and_an_empty_image_is_foreground() -> None:
    """Voxels of air above the level widen the box by a cell at most."""
    random = np.random.default_rng(0)
    image = (
        blob((40, 48, 36), (12, 16, 12), (24, 28, 20))
        + torch.from_numpy(random.normal(0, 0.1, (1, 40, 48, 36))).float()
    )
    assert float(image[:, :8].max()) > 0.25
    for part, low, high in zip(
        foreground_box(image, 0.25, (1, 1, 1)), (12, 16, 12), (24, 28, 20), strict=True
    ):
        assert low - CELL <= part.start <= low
        assert high <= part.stop <= high + CELL
    assert foreground_box(torch.zeros(1, 9, 8, 7), 0.5, (1, 1, 1)) == (
        slice(0, 9),
        slice(0, 8),
        slice(0, 7),
    )


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (300.0, -7.0)])
def test_the_level_scales_with_the_image(scale: float, shift: float) -> None:
    """It follows any normalisation and ignores a few very bright voxels."""
    image = blob((40, 48, 36), (4, 4, 4), (30, 40, 30))
    image[0, 0, 0, :3] = 50
    assert foreground_level(scale * image + shift, 0.1) == pytest.approx(
        0.1 * scale + shift, rel=1e-4
    )


class Smooth(torch.nn.Module):
    """Two classes by the mean of a few voxels: windows agree except at their edges."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean: torch.Tensor = torch.nn.functional.avg_pool3d(x, 3, 1, 1)
        return torch.cat([0.4 - mean, mean - 0.4], dim=1)


@pytest.mark.parametrize("held", [2**30, 1])
def test_inside_the_box_the_windows_are_those_of_the_crop(held: float) -> None:
    """Outside the box all is background, and fewer windows are computed."""
    image = blob((64, 70, 50), (20, 26, 14), (38, 45, 30))
    image += 0.02 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    inside = foreground_box(image, foreground_level(image, 0.2), (16, 16, 16))
    part = (slice(None), slice(None), *inside)
    calls = []

    def count(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        logits: torch.Tensor = Smooth()(x)
        return logits

    whole = WindowInferer((16, 16, 16), 0.25, foreground_threshold=0.2, buffer_bytes=held)(
        image[None], count
    )
    computed = sum(calls)
    crop = WindowInferer((16, 16, 16), 0.25)(image[None][part], count)
    touched = crop.argmax(1) == whole[part].argmax(1)
    assert touched.all()
    outside = torch.ones(whole.shape[2:], dtype=torch.bool)
    outside[inside] = False
    assert not whole.argmax(1)[0][outside].any()
    assert computed <= sum(calls) - computed
    plain = WindowInferer((16, 16, 16), 0.25)(image[None], Smooth())
    assert (plain.argmax(1) == whole.argmax(1)).float().mean() > 0.999


@pytest.mark.parametrize("axcodes", ["RAS", "LIP", "SRA"])
def test_a_padded_scan_has_the_labels_of_the_scan(axcodes: str, tmp_path: Path) -> None:
    """In any orientation, zeros around a scan change no label within it."""
    bundle = make_bundle(
        tmp_path / "tiny",
        spacing=[None] * 3,
        overlap=0.25,
        foreground_threshold=0.2,
        roi_size=[16, 16, 12],
        intensity={"method": "percentiles", "lower": 0, "upper": 100},
    )
    array: Array = np.zeros((60, 64, 48), dtype=np.float32)
    array[20:37, 24:48, 16:37] = np.random.default_rng(0).uniform(50, 100, (17, 24, 21))
    model: Any = open_bundle(bundle, device="cpu", runtime="torch")
    found = predict_case(model, reorient(nifti(array, oblique()), axcodes))
    upright = reorient(nifti(found.labels.astype(np.int16), found.affine), "RAS")
    labels = np.asarray(upright.dataobj)
    assert labels[20:37, 24:48, 16:37].any()
    edge = np.ones(labels.shape, dtype=bool)
    edge[16:41, 20:52, 12:41] = False
    assert not labels[edge].any()
