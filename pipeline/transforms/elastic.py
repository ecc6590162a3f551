"""Elastic deformation: random displacements on a coarse grid, smooth in between.

References:
    Ronneberger, Fischer, Brox: U-Net. MICCAI 2015, doi:10.1007/978-3-319-24574-4_28, section 3.1: a 3 × 3 grid, a standard
    deviation of 10 pixels, bicubic interpolation.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional


class RandCoarseElasticd(RandomizableTransform, MapTransform):
    """Moves every voxel by a field that cubic splines make of normally distributed displacements on a coarse grid.

    All keys move together; beyond its border a patch is mirrored.

    Args:
        keys: (C, *spatial), 2D or 3D; absent ones are allowed.
        prob: of a deformation.
        grid: points of the coarse grid along each axis, the first and the last on the border.
        sigma: standard deviation of each point's displacement along each axis, voxels.
        mode: `bilinear` or `nearest`, one a key.
    """

    def __init__(
        self,
        keys: KeysCollection,
        prob: float,
        *,
        grid: int = 3,
        sigma: float = 10.0,
        mode: Sequence[str],
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys=True)
        RandomizableTransform.__init__(self, prob)
        self.grid, self.sigma = grid, sigma
        self.mode = dict(zip(self.keys, mode, strict=True))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return case
        shape = case[self.keys[0]].shape[1:]
        coarse = self.R.normal(scale=self.sigma, size=(len(shape), *(self.grid,) * len(shape)))
        field = dense_field(coarse, shape)
        for key in self.key_iterator(case):
            case[key] = displaced(case[key], field, self.mode[key])
        return case


def dense_field(coarse: NDArray[np.float64], shape: Sequence[int]) -> torch.Tensor:
    """Displacements at every voxel, by cubic splines through those of a coarse grid.

    Args:
        coarse: (axes, grid, …): displacement along each axis, voxels.
        shape: of the patch, voxels.

    Returns:
        (axes, *shape) float32.
    """
    field = np.asarray(coarse, dtype=np.float64)
    for axis, size in enumerate(shape, start=1):
        points = field.shape[axis]
        places = np.linspace(0, points - 1, size) if size > 1 else np.array([(points - 1) / 2])
        columns = [
            ndimage.map_coordinates(unit, places[None], order=3, mode="mirror")
            for unit in np.eye(points)
        ]
        field = np.moveaxis(np.tensordot(np.stack(columns, axis=1), field, axes=(1, axis)), 0, axis)
    return torch.from_numpy(field).float()


def displaced(x: torch.Tensor, field: torch.Tensor, mode: str) -> torch.Tensor:
    """(C, *spatial) with each voxel taken from where the field (axes, *spatial) points, voxels away; mirrored at the border."""
    sizes = torch.tensor(x.shape[1:], dtype=torch.float32, device=x.device)
    axes = (torch.arange(n, dtype=torch.float32, device=x.device) for n in x.shape[1:])
    places = torch.stack(torch.meshgrid(*axes, indexing="ij")) + field.to(x.device)
    grid = (2 * places.movedim(0, -1) / (sizes - 1).clamp(min=1) - 1).flip(-1)
    return functional.grid_sample(
        x[None].float(), grid[None], mode=mode, padding_mode="reflection", align_corners=True
    )[0]
