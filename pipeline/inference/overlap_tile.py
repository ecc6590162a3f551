"""The overlap-tile strategy of U-Net: a network without padding on a volume of any size.

The output of such a network is smaller than its input. The volume is divided into tiles that lie
next to each other without overlap. For each tile, the network gets a larger input, which contains
the receptive field of all voxels of the tile; beyond the volume's edge it is a mirror image. The
result equals that of the network on the whole volume at once. For that, tiles start at multiples of
the product of the strides, so that max pooling groups the same voxels in every tile; the part of an
output that lies in the next tile is dropped.

References:
    Ronneberger, Fischer, Brox: U-Net. MICCAI 2015, doi:10.1007/978-3-319-24574-4_28, figure 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import torch
from monai.inferers import Inferer

from pipeline.config import Spec
from pipeline.errors import ShapeError
from pipeline.transforms import mirror_padded_box
from pipeline.types import NetworkFunction

TILES_PER_BATCH_2D = 4  # tiles are large: more of them need more memory and save no time
TILES_PER_BATCH_3D = 1


class OverlapTileInferer(Inferer):
    """A MONAI inferer for networks without padding: the overlap-tile strategy.

    Args:
        roi_size: size of the network's input, voxels.
        margin: number of voxels that the output is smaller than the input along each axis, both
            ends together.
        steps: product of the strides along each axis; tiles start at multiples of it.
        sw_batch_size: number of tiles that go through the network together.
        slice_dim: array axis, 0 to 2, along which the slices of a 2D network are stacked; None for
            a 3D network.

    Shapes:
        (B, C, X, Y, Z) of any size → logits (B, classes, X, Y, Z).

    Raises:
        ShapeError: the network's output is smaller than one step along some axis.
    """

    overlap = 0.0

    def __init__(
        self,
        roi_size: Sequence[int],
        margin: Sequence[int],
        steps: Sequence[int],
        sw_batch_size: int,
        slice_dim: int | None,
    ) -> None:
        self.roi_size, self.margin = tuple(roi_size), tuple(margin)
        self.sw_batch_size, self.slice_dim = sw_batch_size, slice_dim
        tile_size = []  # size of a tile: the part of the network's output that is used
        for axis, (roi, lost, step) in enumerate(zip(roi_size, margin, steps, strict=True)):
            used = (roi - lost) // step * step
            if used < step:
                raise ShapeError(
                    f"roi_size[{axis}]: expected at least {lost + step}, so that tiles can abut at "
                    f"multiples of {step}, got {roi}"
                )
            tile_size.append(used)
        self.tile_size = tuple(tile_size)

    def __call__(
        self, inputs: torch.Tensor, network: NetworkFunction, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if self.slice_dim is None:
            return self._tiled(inputs, network)
        axis = self.slice_dim + 2
        batch, slices = inputs.shape[0], inputs.shape[axis]
        logits = self._tiled(inputs.movedim(axis, 1).flatten(0, 1), network)
        return logits.reshape(batch, slices, *logits.shape[1:]).movedim(1, axis)

    def _tiled(self, x: torch.Tensor, network: NetworkFunction) -> torch.Tensor:
        """Return the logits of images that have as many spatial axes as the network.

        Shapes:
            (B, C, *spatial) → (B, classes, *spatial).
        """
        size = x.shape[2:]
        along_axes = [range(0, n, step) for n, step in zip(size, self.tile_size, strict=True)]
        # per tile: number of the image in the batch, first voxel along each axis
        tiles = list(product(range(len(x)), *along_axes))
        result: torch.Tensor | None = None
        for first in range(0, len(tiles), self.sw_batch_size):
            group = tiles[first : first + self.sw_batch_size]
            logits = network(torch.stack([self._tile_input(x[i], start) for i, *start in group]))
            if result is None:  # the number of classes is known from the first output only
                result = logits.new_empty((len(x), logits.shape[1], *size))
            for tile_logits, (i, *start) in zip(logits, group, strict=True):
                self._paste(tile_logits, result[i], start)
        if result is None:
            raise ShapeError(f"input has shape {tuple(x.shape)}, expected one voxel at least")
        return result

    def _tile_input(self, image: torch.Tensor, start: Sequence[int]) -> torch.Tensor:
        """Return the network's input for the tile at `start` of an image (C, *spatial)."""
        first = [i - lost // 2 for i, lost in zip(start, self.margin, strict=True)]
        return torch.as_tensor(mirror_padded_box(image, first, self.roi_size))

    def _paste(self, tile: torch.Tensor, image: torch.Tensor, start: Sequence[int]) -> None:
        """Copy the tile at `start` from the network's output into an image (classes, *spatial)."""
        sizes = zip(start, self.tile_size, image.shape[1:], strict=True)
        for axis, (first, used, whole) in enumerate(sizes, start=1):
            length = min(used, whole - first)
            image = image.narrow(axis, first, length)
            tile = tile.narrow(axis, 0, length)
        image.copy_(tile)


class BackgroundInferer(Inferer):
    """An inferer that adds a background channel to the output of a network with sigmoid outputs.

    The background's logit is 0, which corresponds to a probability of 0.5. Hence a structure has
    the highest logit where its probability is above 0.5 and above those of the other structures.
    With a single structure, its softmax probability equals the sigmoid of its logit. Regions, which
    may overlap, are painted where their logit is above that of the background.

    Args:
        inferer: inferer that applies the network to a volume.
    """

    def __init__(self, inferer: Inferer) -> None:
        self.inferer, self.overlap = inferer, getattr(inferer, "overlap", 0.0)

    def __call__(
        self, inputs: torch.Tensor, network: NetworkFunction, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        result: torch.Tensor = self.inferer(
            inputs, lambda x: with_background(network(x)), *args, **kwargs
        )
        return result


def with_background(logits: torch.Tensor) -> torch.Tensor:
    """Return logits with a first channel of zeros, the background; see `BackgroundInferer`.

    Shapes:
        (B, structures, *spatial) → (B, 1 + structures, *spatial).
    """
    return torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)


def build_tile_inferer(spec: Spec, sw_batch_size: int | None = None) -> OverlapTileInferer:
    """Return the overlap-tile inferer for a spec whose network has no padding.

    Args:
        spec: gives the size of windows, the strides and the axis of slices.
        sw_batch_size: number of tiles that go through the network together; None takes 1 in 3D and
            4 in 2D.
    """
    steps = []
    for axis in range(spec.spatial_dims):
        steps.append(prod(stride[axis] for stride in spec.strides))
    default = TILES_PER_BATCH_3D if spec.slice_dim is None else TILES_PER_BATCH_2D
    return OverlapTileInferer(
        spec.roi_size, spec.margin, steps, sw_batch_size or default, spec.slice_dim
    )
