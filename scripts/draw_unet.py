"""Draw the U-Net of a bundle as a U, with the channels and the size of every feature map.

    python scripts/draw_unet.py configs/classics/unet_2015_2d -o unet.png

The network is built from the bundle's spec and run once on a window; forward hooks on its layers
record the feature maps, so that the drawing shows what the network computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import nn

from pipeline.config import BundlePaths, load_spec
from pipeline.networks import UNet, build_unet

CONVOLUTION, POOL, UP, SKIP, OUTPUT = "#1f4e9c", "#b22222", "#2e8b57", "#888888", "#008b8b"
# Lengths in the drawing's units.
MAX_HEIGHT, MAX_WIDTH = 3.2, 0.55  # of a map
MAP_GAP, LEVEL_GAP = 0.75, 1.1  # between maps side by side, and between levels
# Sizes differ by factors of 16 and more; exponents below 1 keep small maps visible.
HEIGHT_EXPONENT, WIDTH_EXPONENT = 0.6, 0.5
Box = tuple[float, float, float, float]  # left, bottom, width, height
Hook = Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]


@dataclass(frozen=True)
class FeatureMap:
    """One feature map of the network.

    Attributes:
        features: number of channels.
        size: spatial size, voxels.
        level: number of poolings before it.
        kind: `input`, or the layer that computed it: `convolution`, `pool`, `up` or `output`.
        skip: channels that are concatenated to it from the contracting path.
    """

    features: int
    size: tuple[int, ...]
    level: int
    kind: str
    skip: int = 0


def feature_maps(net: UNet, roi_size: Sequence[int]) -> list[FeatureMap]:
    """Return every feature map of one forward pass, in the order of computation."""
    seen = [FeatureMap(net.in_channels, tuple(roi_size), 0, "input")]
    level = 0

    def record(kind: str, step: int) -> Hook:
        def hook(layer: nn.Module, ins: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            nonlocal level
            level += step
            seen.append(FeatureMap(out.shape[1], tuple(out.shape[2:]), level, kind))

        return hook

    blocks = [*net.encoder, net.bottleneck, *net.decoder]
    layers: list[tuple[nn.Module, str, int]] = [(pool, "pool", 1) for pool in net.pool]
    layers += [(up, "up", -1) for up in net.up] + [(net.output, "output", 0)]
    for block in blocks:
        convolutions = [part for part in block.body if isinstance(part, nn.Conv2d | nn.Conv3d)]
        layers += [(part, "convolution", 0) for part in convolutions]
    handles = [layer.register_forward_hook(record(kind, step)) for layer, kind, step in layers]
    with torch.no_grad():
        net.eval()(torch.zeros(1, net.in_channels, *roi_size))
    for handle in handles:
        handle.remove()
    skips = {m.level: m.features for m, following in pairwise(seen) if following.kind == "pool"}
    return [replace(m, skip=skips[m.level]) if m.kind == "up" else m for m in seen]


def layout(found: Sequence[FeatureMap]) -> list[Box]:
    """Return the box of each map: its height shows the size, its width the channels."""
    largest, most = max(m.size[0] for m in found), max(m.features for m in found)
    heights = [max(0.12, MAX_HEIGHT * (m.size[0] / largest) ** HEIGHT_EXPONENT) for m in found]
    widths = [
        max(0.05, MAX_WIDTH * ((m.features + m.skip) / most) ** WIDTH_EXPONENT) for m in found
    ]
    tallest: dict[int, float] = {}
    for m, height in zip(found, heights, strict=True):
        tallest[m.level] = max(height, tallest.get(m.level, 0))
    middle: dict[int, float] = {}
    top = 0.0
    for level in sorted(tallest):
        middle[level] = top - tallest[level] / 2
        top -= tallest[level] + LEVEL_GAP
    boxes = []
    left = 0.0
    for m, height, width in zip(found, heights, widths, strict=True):
        boxes.append((left, middle[m.level] - height / 2, width, height))
        left += width + MAP_GAP
    return boxes


def draw(found: Sequence[FeatureMap], path: Path, title: str) -> None:
    """Write the U as a picture."""
    boxes = layout(found)
    right = max(x + width for x, _, width, _ in boxes)
    top = max(y + height for _, y, _, height in boxes)
    bottom = min(y for _, y, _, _ in boxes)
    figure = Figure(
        figsize=(max(9, 0.62 * len(found)), max(5, 0.75 * (top - bottom))), layout="constrained"
    )
    axes = figure.subplots()
    draw_maps(axes, found, boxes)
    draw_layers(axes, found, boxes)
    draw_skips(axes, found, boxes)
    axes.set_title(title)
    axes.set_xlim(-0.5, right + 0.8)
    axes.set_ylim(bottom - 0.9, top + 0.6)
    axes.set_aspect("equal")
    axes.set_axis_off()
    draw_legend(axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_maps(axes: Axes, found: Sequence[FeatureMap], boxes: Sequence[Box]) -> None:
    """Draw each map as a box with its channels above and its size below; skips are hatched."""
    for m, (x, y, width, height) in zip(found, boxes, strict=True):
        own = width * m.features / (m.features + m.skip)
        axes.add_patch(Rectangle((x, y), own, height, facecolor="#cfe0f5", edgecolor=CONVOLUTION))
        if m.skip:
            hatched: dict[str, Any] = {
                "facecolor": "white",
                "edgecolor": CONVOLUTION,
                "hatch": "//",
            }
            axes.add_patch(Rectangle((x + own, y), width - own, height, **hatched))
        channels = f"{m.features}+{m.skip}" if m.skip else str(m.features)
        size = "×".join(map(str, m.size))
        centre = x + width / 2
        axes.text(centre, y + height + 0.08, channels, ha="center", va="bottom", fontsize=7)
        axes.text(centre, y - 0.08, size, ha="right", va="top", fontsize=6, rotation=35)


def draw_layers(axes: Axes, found: Sequence[FeatureMap], boxes: Sequence[Box]) -> None:
    """Draw an arrow from each map to the one that is computed from it, in the layer's colour."""
    colours = {"convolution": CONVOLUTION, "pool": POOL, "up": UP, "output": OUTPUT}
    for (before, after), (_, m) in zip(pairwise(boxes), pairwise(found), strict=True):
        x, y, width, height = before
        to_x, to_y, to_width, to_height = after
        start, end = (x + width, y + height / 2), (to_x, to_y + to_height / 2)
        if m.kind == "pool":
            start, end = (x + width / 2, y), (to_x + to_width / 2, to_y + to_height + 0.3)
        elif m.kind == "up":
            start = (x + width / 2, y + height + 0.3)
        draw_arrow(axes, start, end, colours[m.kind])


def draw_skips(axes: Axes, found: Sequence[FeatureMap], boxes: Sequence[Box]) -> None:
    """Draw an arrow along each skip connection, and mark those whose map is cropped."""
    # The map before a pooling is the one that its level's skip connection passes on.
    source = {m.level: i for i, (m, after) in enumerate(pairwise(found)) if after.kind == "pool"}
    for m, (to_x, _, _, to_height) in zip(found, boxes, strict=True):
        if m.kind != "up":
            continue
        x, y, width, height = boxes[source[m.level]]
        level = y + height / 2 + 0.3 * min(height, to_height)
        draw_arrow(axes, (x + width, level), (to_x, level), SKIP)
        if found[source[m.level]].size != m.size:
            place = ((x + width + to_x) / 2, level + 0.05)
            axes.text(*place, "cropped", ha="center", va="bottom", fontsize=7, color=SKIP)


def draw_arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str
) -> None:
    """Draw an arrow from one point to another."""
    style: dict[str, Any] = {
        "arrowstyle": "-|>",
        "mutation_scale": 8,
        "shrinkA": 1,
        "shrinkB": 1,
        "lw": 1.2,
    }
    axes.add_patch(FancyArrowPatch(start, end, color=colour, **style))


def draw_legend(axes: Axes) -> None:
    """Draw the legend of the arrows' colours."""
    layers = {
        "convolution 3, norm, activation": CONVOLUTION,
        "max pooling": POOL,
        "transposed convolution": UP,
        "skip": SKIP,
        "convolution 1": OUTPUT,
    }
    for label, colour in layers.items():
        axes.plot([], [], color=colour, label=label)
    axes.legend(loc="lower right", fontsize=8, frameon=False)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="PNG file to write."
)
def main(bundle: Path, output: Path) -> None:
    """Draw the U-Net of BUNDLE."""
    spec = load_spec(BundlePaths(bundle).spec)
    net = build_unet(spec)
    if not isinstance(net, UNet):
        raise click.UsageError(
            f"{bundle}: expected network.architecture: unet, a U-Net with pooling"
        )
    count = sum(p.numel() for p in net.parameters())
    size = "×".join(map(str, spec.roi_size))
    title = f"{bundle.name}: {count:,} parameters, a window of {size}"
    draw(feature_maps(net, spec.roi_size), output, title)
    click.echo(f"drawn: {output}", err=True)


if __name__ == "__main__":
    main()
