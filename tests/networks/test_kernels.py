"""Kernels of one voxel along the axis of thick slices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from phantom import parse_spec

from pipeline.errors import ConfigError, ShapeError
from pipeline.networks import UNet, build_unet

FLAT = (3, 3, 1)


def test_slices_stay_apart_where_the_kernels_are_flat() -> None:
    """A change of one slice changes that slice of the output only."""
    torch.manual_seed(0)
    net = UNet(3, 1, 2, (4, 6, 8), [(2, 2, 1)] * 2, kernels=[FLAT] * 3).eval()
    image = torch.rand(1, 1, 12, 16, 7)
    changed = image.clone()
    changed[..., 3] += 1
    differs = (net(image) - net(changed)).abs().amax(dim=(0, 1, 2, 3)) > 1e-7
    assert differs.tolist() == [False, False, False, True, False, False, False]


def test_three_everywhere_is_the_default() -> None:
    """The same weights from the same seed, and the same output."""
    choices: list[list[int | tuple[int, ...]] | None] = [None, [3, (3, 3, 3)]]
    nets = []
    for kernels in choices:
        torch.manual_seed(0)
        nets.append(UNet(3, 1, 2, (4, 6), norm="instance", kernels=kernels).eval())
    image = torch.rand(1, 1, 8, 12, 10)
    assert torch.equal(nets[0](image), nets[1](image))


def test_a_spec_gives_the_kernels() -> None:
    network: dict[str, Any] = {"features": [4, 6], "norm": "batch", "kernels": [[3, 3, 1], 3]}
    net = build_unet(parse_spec(3, network=network))
    sizes = [tuple(p.shape[2:]) for name, p in net.named_parameters() if p.ndim == 5]
    assert (3, 3, 1) in sizes
    assert (3, 3, 3) in sizes


@pytest.mark.parametrize("kernels", [[3], [[3, 3], 3], [2, 3], [3, 3, 3]])
def test_kernels_that_do_not_fit_are_refused(kernels: list[Any]) -> None:
    network: dict[str, Any] = {"features": [4, 6], "kernels": kernels}
    with pytest.raises(ConfigError, match=r"spec\.network\.kernels: expected 2 entries"):
        parse_spec(3, network=network)


def test_without_padding_kernels_are_refused() -> None:
    with pytest.raises(ShapeError, match="in a network with padding"):
        UNet(3, 1, 2, (4, 6), kernels=[FLAT, 3], padding=False)
