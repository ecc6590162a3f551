"""The grid that a case's label map is written on, and how it travels in a MetaTensor's `meta`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import numpy as np

from pipeline.errors import VolumeError
from pipeline.io.nifti import in_mm, mm_per_unit, moved_header
from pipeline.types import Affine

MAX_VOXELS = 2**30  # of a label map: 1 GiB as uint8
# voxels by which a new field of view may be smaller than the old one: without this tolerance the
# rounding of a float32 affine could add a whole layer of voxels
SIZE_TOLERANCE = 0.01

LABELS_AFFINE, LABELS_SHAPE, LABELS_HEADER = "labels_affine", "labels_shape", "header"


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The grid that a label map is written on: the file's own, or one with another spacing.

    Attributes:
        affine: voxel index → RAS+ world, mm.
        shape: (X, Y, Z) voxels.
        header: the bytes of a NIfTI header on this grid, in the file's own unit; see `Image`.
    """

    affine: Affine
    shape: tuple[int, ...]
    header: bytes = b""

    def with_spacing(self, mm: float) -> Grid:
        """Return the grid of isotropic voxels with the same orientation, centre and field of view.

        The field of view is rounded up to whole voxels. The header keeps its codes, and the affine
        is then the header's own, in single precision.

        Args:
            mm: spacing of the new voxels.

        Returns:
            this grid where its affine is singular or not finite: `CheckVolumed` refuses the volume.

        Raises:
            VolumeError: the new grid would have too many voxels.
        """
        if not self._is_valid():
            return self
        ratio = mm / np.linalg.norm(self.affine[:3, :3], axis=0)
        shape = tuple(
            max(1, ceil(size / step - SIZE_TOLERANCE))
            for size, step in zip(self.shape, ratio, strict=True)
        )
        if prod(shape) > MAX_VOXELS:
            raise VolumeError(
                f"a label map of {mm:g} mm has {' × '.join(map(str, shape))} voxels, "
                f"expected at most {MAX_VOXELS}; give a larger --labels-spacing"
            )
        affine = self.affine.copy()
        affine[:3, :3] *= ratio
        old_centre = (np.array(self.shape) - 1) / 2
        new_centre = (np.array(shape) - 1) / 2
        affine[:3, 3] += self.affine[:3, :3] @ old_centre - affine[:3, :3] @ new_centre
        if not self.header:
            return Grid(affine=affine, shape=shape)
        header = moved_header(self.header, affine, shape)
        own = in_mm(header.get_best_affine(), mm_per_unit(header))
        return Grid(affine=own, shape=shape, header=header.binaryblock)

    def to_meta(self) -> dict[str, Any]:
        """Return the entries of a MetaTensor's `meta` that hold this grid, fit for collation."""
        return {
            LABELS_AFFINE: self.affine.copy(),
            LABELS_SHAPE: np.array(self.shape),
            LABELS_HEADER: np.frombuffer(self.header, dtype=np.uint8).copy(),
        }

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Grid:
        """Return the grid in a `meta` that holds the entries of `to_meta`, collated or not."""
        return cls(
            affine=np.asarray(meta[LABELS_AFFINE], dtype=np.float64),
            shape=tuple(int(size) for size in meta[LABELS_SHAPE]),
            header=bytes(np.asarray(meta[LABELS_HEADER], dtype=np.uint8)),
        )

    def _is_valid(self) -> bool:
        return bool(np.isfinite(self.affine).all() and np.linalg.det(self.affine[:3, :3]))
