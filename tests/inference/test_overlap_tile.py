"""Overlap-tile: tiles of an unpadded network give what one window over the whole volume gives."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config.spec import NetworkSpec, Spec
from pipeline.config.unet_sizes import output_size, smallest_size
from pipeline.errors import ConfigError, ShapeError
from pipeline.inference.sliding_window import build_inferer
from pipeline.networks import build_unet
from pipeline.transforms.mirror_padding import mirror_indices, mirror_padded_box

DATA = os.environ.get("VOLSEG_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="VOLSEG_DATA is not set: no real volumes")


def spec_of(roi: tuple[int, ...], strides: tuple[int, ...] = (2, 2)) -> Spec:
    """Return the spec of a small network of three classes; of coronal slices in 2D."""
    return Spec(
        labels={"background": 0, "one": 1, "two": 2},
        channels=("T1w",),
        spacing=(1.0, 1.0, 1.0),
        roi_size=roi,
        slice_axis="A" if len(roi) == 2 else None,
        overlap=0.0,
        network=NetworkSpec(
            features=(4, 6, 8, 8, 8)[: len(strides) + 1], strides=strides, padding=False
        ),
    )


def whole(net: nn.Module, volume: torch.Tensor, spec: Spec) -> torch.Tensor:
    """Return the logits of the whole mirror-extended volume (or slice) in one window."""
    if spec.slice_dim is not None:
        axis = 2 + spec.slice_dim
        return torch.stack([whole_of(net, piece, spec) for piece in volume.unbind(axis)], dim=axis)
    return whole_of(net, volume, spec)


def whole_of(net: nn.Module, x: torch.Tensor, spec: Spec) -> torch.Tensor:
    pads, out = [], x.shape[2:]
    for axis, n in enumerate(out):
        strides = [s[axis] for s in spec.strides]
        size = next(
            m for m in range(n, 10**4) if (output_size(m, strides, padding=False) or 0) >= n
        )
        half = spec.margin[axis] // 2
        pads.append((half, size - n - half))
    padded = torch.from_numpy(np.pad(x.numpy(), [(0, 0), (0, 0), *pads], mode="reflect"))
    logits: torch.Tensor = net(padded)
    for axis, n in enumerate(out, start=2):
        logits = logits.narrow(axis, 0, n)
    return logits


def real_volume() -> torch.Tensor:
    assert DATA is not None
    image = nib.load(Path(DATA) / "real" / "head18_T1w.nii.gz")
    part = np.asarray(image.dataobj, dtype=np.float32)[60:89, 70:103, 55:82]
    return torch.from_numpy((part - part.mean()) / part.std())[None, None]


@needs_data
@pytest.mark.parametrize("roi", [(48, 56, 52), (60, 68, 52), (72, 92, 80)])
def test_tiled_is_whole_3d(roi: tuple[int, ...]) -> None:
    spec = spec_of(roi)
    torch.manual_seed(0)
    net = build_unet(spec).eval()
    volume = real_volume()
    with torch.no_grad():
        tiled = build_inferer(spec)(volume, net)
        expected = whole(net, volume, spec)
    assert tiled.shape == (1, 3, *volume.shape[2:])
    assert (tiled - expected).abs().max() <= 1e-5


@needs_data
@pytest.mark.parametrize("roi", [(44, 44), (48, 72), (92, 100)])
@pytest.mark.parametrize("batch", [1, 5])
def test_tiled_is_whole_2d(roi: tuple[int, ...], batch: int) -> None:
    spec = spec_of(roi)
    torch.manual_seed(0)
    net = build_unet(spec).eval()
    volume = real_volume()[:, :, :, 20:24]
    with torch.no_grad():
        tiled = build_inferer(spec, sw_batch_size=batch)(volume, net)
        expected = whole(net, volume, spec)
    assert (tiled - expected).abs().max() <= 1e-5


def test_tiles_of_the_papers_depth_abut() -> None:
    """After four poolings tiles start at multiples of 16: of 388 voxels from 572, 384 are kept."""
    spec = spec_of((236, 220), (2, 2, 2, 2))
    torch.manual_seed(0)
    net = build_unet(spec).eval()
    volume = torch.rand(1, 1, 101, 2, 83)
    with torch.no_grad():
        assert (build_inferer(spec)(volume, net) - whole(net, volume, spec)).abs().max() <= 1e-5


@pytest.mark.parametrize("size", [1, 2, 7])
def test_mirrored_is_numpys_reflect(size: int) -> None:
    line = np.arange(size)
    expected = np.pad(line, (17, 23), mode="reflect")
    assert mirror_indices(-17, 17 + size + 23, size).tolist() == expected.tolist()


def test_a_part_beyond_the_volume_is_mirrored() -> None:
    x = torch.rand(2, 5, 7)
    expected = np.pad(x.numpy(), [(0, 0), (3, 2), (0, 9)], mode="reflect")[:, :, 2:]
    assert np.array_equal(mirror_padded_box(x, (-3, 2), (10, 14)).numpy(), expected)


def test_overlap_has_no_meaning_for_tiles() -> None:
    with pytest.raises(ConfigError, match="overlap: expected 0 for a network without padding"):
        build_inferer(spec_of((44, 44, 44)), overlap=0.5)


def test_a_tile_below_one_step_is_refused() -> None:
    """With strides of 4 and 2 an output can be smaller than a step of 8 voxels."""
    smallest = smallest_size((4, 2), padding=False)
    spec = spec_of((smallest,) * 3, (4, 2))
    with pytest.raises(ShapeError, match=r"roi_size\[0\]: expected at least"):
        build_inferer(spec)
