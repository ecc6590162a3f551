"""The computed sizes against networks that are run."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.unet_sizes import margin, output_size, smallest_size
from pipeline.errors import ShapeError
from pipeline.networks import UNet


def small(dims: int, strides: list[int], *, padding: bool) -> UNet:
    torch.manual_seed(0)
    return UNet(dims, 1, 2, [2] * (len(strides) + 1), strides, padding=padding).eval()


def test_the_papers_sizes() -> None:
    net = UNet(2, 1, 2, (2, 2, 2, 2, 2), padding=False).eval()
    assert net(torch.zeros(1, 1, 572, 572)).shape == (1, 2, 388, 388)
    assert margin((2, 2, 2, 2), padding=False) == 572 - 388


def test_the_papers_number_of_parameters() -> None:
    net = UNet(2, 1, 2, (64, 128, 256, 512, 1024), padding=False)
    assert sum(p.numel() for p in net.parameters()) == 31_030_658


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("strides", [[2], [2, 2], [3, 2], [2, 1, 2]])
def test_sizes_are_those_of_the_network(strides: list[int], padding: bool) -> None:
    """The network accepts the same input sizes and has the same output sizes."""
    net = small(2, strides, padding=padding)
    for size in range(1, 80):
        expected = output_size(size, strides, padding=padding)
        fit = smallest_size(strides, padding=padding)
        if expected is None:
            with pytest.raises(ShapeError, match=rf"{size} voxels along spatial axis 0, .* to \d+"):
                net(torch.zeros(1, 1, size, fit))
        else:
            assert net(torch.zeros(1, 1, size, fit)).shape[2] == expected
            assert size - expected == margin(strides, padding=padding)


def test_residual_blocks_without_padding_keep_their_centre() -> None:
    net = UNet(3, 1, 3, (2, 4), residual=True, padding=False).eval()
    assert net(torch.zeros(1, 1, 18, 20, 22)).shape == (1, 3, 2, 4, 6)


def test_dropout_at_the_end_of_the_contracting_path_only_acts_in_training() -> None:
    torch.manual_seed(0)
    net = UNet(2, 1, 2, (4, 8, 16), contraction_dropout=0.5)
    x = torch.rand(1, 1, 16, 16)
    net.train()
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
