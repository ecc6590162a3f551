"""The drawing has the feature maps that the network computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from phantom import load_script

from pipeline.networks import UNet


@pytest.fixture(scope="module")
def script() -> Any:
    """scripts/draw_unet.py as a module."""
    return load_script("draw_unet")


def test_the_papers_figure(script: Any) -> None:
    """The sizes are those of the figure in the paper of 2015."""
    found = script.feature_maps(UNet(2, 1, 2, (2, 4, 8, 16, 32), padding=False), (572, 572))
    sizes = [m.size[0] for m in found]
    down = [572, 570, 568, 284, 282, 280, 140, 138, 136, 68, 66, 64, 32, 30, 28]
    assert sizes == [*down, 56, 54, 52, 104, 102, 100, 200, 198, 196, 392, 390, 388, 388]
    assert [m.skip for m in found if m.kind == "up"] == [16, 8, 4, 2]
    assert found[-1].features == 2


def test_any_network_is_drawn(script: Any, tmp_path: Path) -> None:
    net = UNet(3, 2, 4, (2, 3, 4), ((2, 2, 1), (3, 2, 2)), norm="batch", residual=True)
    found = script.feature_maps(net, (12, 8, 6))
    assert [m.level for m in found if m.kind in ("pool", "up")] == [1, 2, 1, 0]
    script.draw(found, tmp_path / "net.png", "three levels")
    assert (tmp_path / "net.png").read_bytes()[:4] == b"\x89PNG"
