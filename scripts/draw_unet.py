"""Draws the U-Net of a bundle as a U: every map that it makes, with its features and its size, as it really came out.

The network is built from the bundle's spec and run once on a window; hooks on its layers tell what went where.

    python scripts/draw_unet.py configs/classics/unet_2015_2d -o unet.png
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import click
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import nn

from pipeline.config import load_spec
from pipeline.networks import UNet, build_unet

CONVOLUTION, POOL, UP, SKIP, OUTPUT = "#1f4e9c", "#b22222", "#2e8b57", "#888888", "#008b8b"
HIGHEST, WIDEST, GAP, SPACE = (
    3.2,
    0.55,
    0.75,
    1.1,
)  # of a map, of a map, between maps, between levels


@dataclass(frozen=True)
class Map:
    """One map of the network.

    Attributes:
        features: its channels.
        size: its spatial size.
        level: how often it was pooled.
        kind: what made it, `input`, `convolution`, `pool`, `up` or `output`.
        skip: features that were put beside it from the contracting path.
    """

    features: int
    size: tuple[int, ...]
    level: int
    kind: str
    skip: int = 0


def maps(net: UNet, roi_size: Sequence[int]) -> list[Map]:
    """Every map of one pass through a network, in order, as hooks on its layers saw them."""
    seen: list[Map] = [Map(net.in_channels, tuple(roi_size), 0, "input")]
    level = 0

    def note(kind: str, step: int) -> object:
        def hook(layer: nn.Module, ins: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            nonlocal level
            level += step
            seen.append(Map(out.shape[1], tuple(out.shape[2:]), level, kind))

        return hook

    blocks = [*net.encoder, net.bottleneck, *net.decoder]
    layers: list[tuple[nn.Module, str, int]] = [(pool, "pool", 1) for pool in net.pool]
    layers += [(up, "up", -1) for up in net.up] + [(net.output, "output", 0)]
    layers += [
        (layer, "convolution", 0)
        for block in blocks
        for layer in block.body
        if isinstance(layer, nn.Conv2d | nn.Conv3d)
    ]
    handles = [layer.register_forward_hook(note(kind, step)) for layer, kind, step in layers]  # type: ignore[arg-type]
    with torch.no_grad():
        net.eval()(torch.zeros(1, net.in_channels, *roi_size))
    for handle in handles:
        handle.remove()
    skips = {one.level: one.features for one, after in pairwise(seen) if after.kind == "pool"}
    return [
        Map(m.features, m.size, m.level, m.kind, skips[m.level] if m.kind == "up" else 0)
        for m in seen
    ]


def draw(found: Sequence[Map], path: Path, title: str) -> None:
    """Writes the U as a picture; a map's height goes by its size and its width by its features, both on a root scale."""
    largest, most = max(m.size[0] for m in found), max(m.features for m in found)
    heights = [max(0.12, HIGHEST * (m.size[0] / largest) ** 0.6) for m in found]
    widths = [max(0.05, WIDEST * ((m.features + m.skip) / most) ** 0.5) for m in found]
    levels = max(m.level for m in found) + 1
    tallest = [
        max(h for h, m in zip(heights, found, strict=True) if m.level == level)
        for level in range(levels)
    ]
    middle = [-sum(tallest[:level]) - tallest[level] / 2 - SPACE * level for level in range(levels)]
    figure = Figure(
        figsize=(max(9, 0.62 * len(found)), max(5, 0.75 * -middle[-1])), layout="constrained"
    )
    axes = figure.subplots()
    left = 0.0
    places: list[tuple[float, float, float, float]] = []
    for one, height, width in zip(found, heights, widths, strict=True):
        places.append((left, middle[one.level] - height / 2, width, height))
        left += width + (GAP if one.kind != "output" else 0)
    _maps(axes, found, places)
    _arrows(axes, found, places)
    axes.set_title(title)
    axes.set_xlim(-0.5, left + 0.8)
    axes.set_ylim(middle[-1] - tallest[-1] / 2 - 0.9, middle[0] + tallest[0] / 2 + 0.6)
    axes.set_aspect("equal")
    axes.set_axis_off()
    _legend(axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _maps(
    axes: Axes, found: Sequence[Map], places: Sequence[tuple[float, float, float, float]]
) -> None:
    for one, (x, y, width, height) in zip(found, places, strict=True):
        share = one.skip / (one.features + one.skip)
        axes.add_patch(
            Rectangle((x, y), width * (1 - share), height, facecolor="#cfe0f5", edgecolor="#1f4e9c")
        )
        if share:
            axes.add_patch(
                Rectangle(
                    (x + width * (1 - share), y),
                    width * share,
                    height,
                    facecolor="white",
                    edgecolor="#1f4e9c",
                    hatch="//",
                )
            )
        text = f"{one.features}+{one.skip}" if one.skip else str(one.features)
        axes.text(x + width / 2, y + height + 0.08, text, ha="center", va="bottom", fontsize=7)
        axes.text(
            x + width / 2,
            y - 0.08,
            "×".join(map(str, one.size)),
            ha="right",
            va="top",
            fontsize=6,
            rotation=35,
        )


def _arrows(
    axes: Axes, found: Sequence[Map], places: Sequence[tuple[float, float, float, float]]
) -> None:
    colours = {"convolution": CONVOLUTION, "pool": POOL, "up": UP, "output": OUTPUT}
    for i in range(1, len(found)):
        (x, y, width, height), (to_x, to_y, to_width, to_height) = places[i - 1], places[i]
        start, end = (x + width, y + height / 2), (to_x, to_y + to_height / 2)
        if found[i].kind == "pool":
            start, end = (x + width / 2, y), (to_x + to_width / 2, to_y + to_height + 0.3)
        elif found[i].kind == "up":
            start, end = (x + width / 2, y + height + 0.3), (to_x, to_y + to_height / 2)
        _arrow(axes, start, end, colours[found[i].kind])
    for i, one in enumerate(found):
        if one.kind == "up":
            source = max(
                k for k in range(i) if found[k].level == one.level and found[k + 1].kind == "pool"
            )
            (x, y, width, height), (to_x, to_y, _, to_height) = places[source], places[i]
            level = y + height / 2 + 0.3 * min(height, to_height)
            _arrow(axes, (x + width, level), (to_x, level), SKIP)
            if found[source].size != one.size:
                axes.text(
                    (x + width + to_x) / 2,
                    level + 0.05,
                    "cropped",
                    ha="center",
                    va="bottom",
                    fontsize=7,
                    color=SKIP,
                )


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=8,
            color=colour,
            shrinkA=1,
            shrinkB=1,
            lw=1.2,
        )
    )


def _legend(axes: Axes) -> None:
    words = {
        "convolution 3, norm, activation": CONVOLUTION,
        "max pooling": POOL,
        "transposed convolution": UP,
        "skip": SKIP,
        "convolution 1": OUTPUT,
    }
    for word, colour in words.items():
        axes.plot([], [], color=colour, label=word)
    axes.legend(loc="lower right", fontsize=8, frameon=False)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The PNG to write."
)
def main(bundle: Path, output: Path) -> None:
    """Draw the U-Net that a bundle's spec names."""
    said = load_spec(bundle / "configs" / "spec.yaml")
    net = build_unet(said)
    count = sum(p.numel() for p in net.parameters())
    size = "×".join(map(str, said.roi_size))
    draw(
        maps(net, said.roi_size), output, f"{bundle.name}: {count:,} parameters, a window of {size}"
    )
    click.echo(f"drawn: {output}", err=True)


if __name__ == "__main__":
    main()
