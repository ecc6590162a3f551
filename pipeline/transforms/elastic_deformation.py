"""Random elastic deformation by displacements on a coarse grid of control points.

References:
    Ronneberger, Fischer, Brox: U-Net. MICCAI 2015, doi:10.1007/978-3-319-24574-4_28, section 3.1:
    a 3 × 3 grid, a standard deviation of 10 pixels, bicubic interpolation.
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
    """Randomly deform patches by displacements of control points.

    The displacements are normally distributed, and interpolated between control points by cubic
    splines. All keys are deformed alike; beyond its border a patch is mirrored. (MONAI's
    `Rand2DElasticd` has uniformly distributed displacements and no 3D version with control points.)

    Args:
        keys: keys of tensors (C, *spatial), 2D or 3D; missing ones are allowed.
        prob: probability of a deformation.
        grid: number of control points along each axis; the outer ones lie on the border.
        sigma: standard deviation of a control point's displacement along each axis, voxels.
        mode: interpolation of each key, `bilinear` or `nearest`.
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
        control_points = (len(shape), *(self.grid,) * len(shape))
        coarse = self.R.normal(scale=self.sigma, size=control_points)
        field = dense_displacements(coarse, shape)
        for key in self.key_iterator(case):
            case[key] = deform(case[key], field, self.mode[key])
        return case


def dense_displacements(coarse: NDArray[np.float64], shape: Sequence[int]) -> torch.Tensor:
    """Return the displacement of each voxel: cubic splines through those of the control points.

    Args:
        coarse: (axes, grid, …) displacement of each control point along each axis, voxels.
        shape: size of the patch, voxels.

    Returns:
        (axes, *shape) float32 displacements along each axis, voxels.
    """
    field = np.asarray(coarse, dtype=np.float64)
    for axis, size in enumerate(shape, start=1):
        # a spline is linear in its control points: its values are a matrix times the values at the
        # points. Column i is the spline through 1 at point i and 0 at the others
        points = field.shape[axis]
        places = np.linspace(0, points - 1, size) if size > 1 else np.array([(points - 1) / 2])
        columns = [
            ndimage.map_coordinates(unit, places[None], order=3, mode="mirror")
            for unit in np.eye(points)
        ]
        field = np.moveaxis(np.tensordot(np.stack(columns, axis=1), field, axes=(1, axis)), 0, axis)
    return torch.from_numpy(field).float()


def deform(x: torch.Tensor, displacements: torch.Tensor, mode: str) -> torch.Tensor:
    """Return a deformed patch: its values at each voxel's position plus the displacement there.

    Args:
        x: (C, *spatial) patch; it is mirrored beyond its border.
        displacements: (axes, *spatial) displacement of each voxel along each axis, voxels.
        mode: interpolation, `bilinear` or `nearest`.
    """
    sizes = torch.tensor(x.shape[1:], dtype=torch.float32, device=x.device)
    axes = (torch.arange(n, dtype=torch.float32, device=x.device) for n in x.shape[1:])
    places = torch.stack(torch.meshgrid(*axes, indexing="ij")) + displacements.to(x.device)
    # grid_sample takes positions from -1 to 1, the last axis first
    grid = (2 * places.movedim(0, -1) / (sizes - 1).clamp(min=1) - 1).flip(-1)
    return functional.grid_sample(
        x[None].float(), grid[None], mode=mode, padding_mode="reflection", align_corners=True
    )[0]
