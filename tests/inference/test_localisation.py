"""One window over a brain in a head: where it is placed, and that no label is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from phantom import parse_spec

from pipeline.errors import ConfigError
from pipeline.inference.localisation import MAX_SEARCH_WINDOWS, HeadTop, head_top
from pipeline.inference.sliding_window import WindowInferer

SHAPE, ROI = (50, 60, 64), (24, 32, 28)
AIR = 0.1
UP = HeadTop(2, at_end=True)


class Brain(torch.nn.Module):
    """A network for which bright voxels are a structure; it counts its windows."""

    def __init__(self) -> None:
        super().__init__()
        self.windows = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.windows += len(x)
        return torch.cat([0.6 - x, x - 0.6], dim=1)


def ellipsoid(centre: tuple[float, ...], radii: tuple[float, ...]) -> torch.Tensor:
    places = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), axis=-1)
    return torch.from_numpy((((places - centre) / radii) ** 2).sum(-1) <= 1)


def head(centre: tuple[float, ...], radii: tuple[float, ...]) -> torch.Tensor:
    """Return a dim head that fills most of the image, with a bright brain in it."""
    image = 0.3 * ellipsoid((25, 30, 32), (22, 27, 33)).float()
    image[ellipsoid(centre, radii)] = 1
    image += 0.01 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    return image[None, None]


def labels(image: torch.Tensor, top: HeadTop | None) -> tuple[torch.Tensor, int]:
    network = Brain()
    with torch.no_grad():
        scores = WindowInferer(ROI, 0.25, foreground_threshold=AIR, head_top=top)(image, network)
    return scores.argmax(1), network.windows


@pytest.mark.parametrize("top", [UP, HeadTop(2, False), HeadTop(1, True), HeadTop(0, False)])
@pytest.mark.parametrize(
    "centre", [(25, 30, 44), (25, 26, 20), (16, 40, 30), (12, 15, 12), (38, 46, 50), (45, 30, 60)]
)
def test_a_brain_that_one_window_holds_is_found_whole(
    centre: tuple[int, ...], top: HeadTop
) -> None:
    """Wherever it lies and the search begins: the same labels by fewer windows."""
    image = head(centre, (9.3, 12.4, 10.6))
    plain, windows = labels(image, None)
    found, computed = labels(image, top)
    assert plain.sum() > 1000
    assert torch.equal(found, plain)
    assert computed <= MAX_SEARCH_WINDOWS + windows
    assert windows >= 12


def test_the_search_begins_at_the_top_of_a_head() -> None:
    """A brain there takes one window, which is found and segmented at once."""
    image = head((25, 30, 48), (9.3, 12.4, 10.6))
    found, computed = labels(image, UP)
    assert torch.equal(found, labels(image, None)[0])
    assert computed == 1


@pytest.mark.parametrize("radii", [(15.0, 12.0, 10.0), (9.0, 12.0, 20.0), (13.2, 17.1, 10.3)])
def test_a_brain_that_is_longer_than_a_window_is_found_whole(radii: tuple[float, ...]) -> None:
    """Windows are spread along the axes where it is too long, one lies along the others."""
    image = head((25, 30, 34), radii)
    (plain, windows), (found, computed) = labels(image, None), labels(image, UP)
    assert torch.equal(found, plain)
    assert computed < 2 * windows


def test_a_speck_is_no_region_of_interest() -> None:
    """Windows are then spread over the whole foreground."""
    speck = head((25, 30, 34), (0.5, 0.5, 0.5))
    assert labels(speck, UP)[0].sum() == 1
    assert labels(speck, UP)[1] == labels(speck, None)[1] + 1


def test_an_image_smaller_than_the_window_is_one_window() -> None:
    """It is padded as without a search."""
    image = head((25, 30, 44), (9.3, 12.4, 10.6))[..., 14:36, 10:50, 30:60]
    assert torch.equal(labels(image, UP)[0], labels(image, None)[0])


@pytest.mark.parametrize("thin", [(1, 40, 40), (40, 2, 30), (30, 40, 3)])
@pytest.mark.parametrize("top", [UP, HeadTop(2, False), HeadTop(1, True)])
def test_an_image_of_few_slices_is_segmented(thin: tuple[int, int, int], top: HeadTop) -> None:
    at = (slice(None), slice(None), *(slice(25, 25 + n) for n in thin))
    image = head((25, 30, 44), (9.3, 12.4, 10.6))[at]
    assert torch.equal(labels(image, top)[0], labels(image, None)[0])


def test_the_top_follows_the_orientation() -> None:
    assert head_top(parse_spec(orientation="RAS")) == HeadTop(2, at_end=True)
    assert head_top(parse_spec(orientation="ILP")) == HeadTop(0, at_end=False)


def test_localise_needs_a_foreground_threshold_and_a_3d_network() -> None:
    for dims, air in ((3, None), (2, 0.1)):
        with pytest.raises(ConfigError, match="localise"):
            parse_spec(dims, localise=True, foreground_threshold=air)
