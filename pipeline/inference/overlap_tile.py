"""An unpadded network over a volume of any size: mirror-extended tiles whose outputs abut.

Nothing is blended and nothing computed twice: each voxel comes from one tile, in which all that it depends on was real or a
mirror image. Tiles start at multiples of the strides' product, so that every max pooling pairs the same voxels in every tile;
what a tile gives beyond the next one's start is dropped. The result is then that of one window over the whole volume.

References:
    Ronneberger, Fischer, Brox: U-Net. MICCAI 2015, doi:10.1007/978-3-319-24574-4_28, figure 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import Any

import torch
from monai.inferers import Inferer

from pipeline.config import Spec
from pipeline.errors import ShapeError
from pipeline.transforms import mirror_padded_box

Predict = Callable[..., torch.Tensor]


class OverlapTileInferer(Inferer):
    """Feeds mirror-extended tiles whose outputs abut.

    Args:
        roi_size: voxels that the network takes in.
        margin: voxels that its output is smaller, along each axis, both ends together.
        steps: the product of the strides along each axis.
        sw_batch_size: tiles that go through the network together.
        slice_dim: the axis, 0 to 2, that the slices of a 2D network are stacked along; None for a 3D network.

    Shapes: (B, C, X, Y, Z) of any size → logits (B, classes, X, Y, Z).

    Raises:
        ShapeError: tiles whose output is smaller than one step.
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
        self.kept = tuple(
            (roi - m) // step * step for roi, m, step in zip(roi_size, margin, steps, strict=True)
        )
        for axis, (roi, step) in enumerate(zip(roi_size, steps, strict=True)):
            if self.kept[axis] < step:
                need = self.margin[axis] + step
                raise ShapeError(
                    f"roi_size[{axis}]: expected at least {need}, so that tiles can abut at multiples of {step}, got {roi}"
                )

    def __call__(
        self, inputs: torch.Tensor, network: Predict, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if self.slice_dim is None:
            return self._tiles(inputs, network)
        axis = self.slice_dim + 2
        batch, slices = inputs.shape[0], inputs.shape[axis]
        logits = self._tiles(inputs.movedim(axis, 1).flatten(0, 1), network)
        return logits.reshape(batch, slices, *logits.shape[1:]).movedim(1, axis)

    def _tiles(self, x: torch.Tensor, network: Predict) -> torch.Tensor:
        """(B, C, *spatial) → (B, classes, *spatial), spatial as many axes as the network has."""
        size = x.shape[2:]
        starts = list(
            product(
                range(len(x)), *(range(0, n, step) for n, step in zip(size, self.kept, strict=True))
            )
        )
        out: torch.Tensor | None = None
        for first in range(0, len(starts), self.sw_batch_size):
            group = starts[first : first + self.sw_batch_size]
            logits = network(torch.stack([self._tile(x[i], start) for i, *start in group]))
            if out is None:
                out = logits.new_empty((len(x), logits.shape[1], *size))
            for tile, (i, *start) in zip(logits, group, strict=True):
                place = out[i]
                for axis, (s, k, n) in enumerate(zip(start, self.kept, size, strict=True), start=1):
                    place = place.narrow(axis, s, min(k, n - s))
                place.copy_(_beginning(tile, place.shape[1:]))
        assert out is not None
        return out

    def _tile(self, image: torch.Tensor, start: Sequence[int]) -> torch.Tensor:
        """The piece of (C, *spatial) whose output begins at `start`."""
        begin = [s - m // 2 for s, m in zip(start, self.margin, strict=True)]
        return torch.as_tensor(mirror_padded_box(image, begin, self.roi_size))


class BackgroundInferer(Inferer):
    """Puts a logit of 0 before those of a network that has one a structure: the background, of probability .5.

    A structure then has the highest logit where its own probability is above .5 and above that of the others, and with one
    structure the softmax is its sigmoid.

    Args:
        inferer: what the volume goes through.
    """

    def __init__(self, inferer: Inferer) -> None:
        self.inferer, self.overlap = inferer, getattr(inferer, "overlap", 0.0)

    def __call__(
        self, inputs: torch.Tensor, network: Predict, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        result: torch.Tensor = self.inferer(
            inputs, lambda x: with_background(network(x)), *args, **kwargs
        )
        return result


def with_background(logits: torch.Tensor) -> torch.Tensor:
    """(B, structures, *spatial) → (B, 1 + structures, *spatial), a 0 before them."""
    return torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)


def _beginning(tile: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The first voxels of (classes, *spatial) along each axis."""
    for axis, n in enumerate(size, start=1):
        tile = tile.narrow(axis, 0, n)
    return tile


def build_tile_inferer(spec: Spec, sw_batch_size: int | None = None) -> OverlapTileInferer:
    """The overlap-tile inferer of a spec whose network has no padding; one tile in 3D and four in 2D go together by default."""
    steps = [prod(stride[axis] for stride in spec.strides) for axis in range(spec.spatial_dims)]
    batch = sw_batch_size or (1 if spec.slice_dim is None else 4)
    return OverlapTileInferer(spec.roi_size, spec.margin, steps, batch, spec.slice_dim)
