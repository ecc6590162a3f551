"""From the output of a bundle's postprocessing to a label map on the input's grid, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample

from pipeline.errors import VolumeError
from pipeline.inference import volumes_mm3
from pipeline.io import SAME_GRID_MM, Grid, corner_distance
from pipeline.types import Array, LabelMap

MAX_VALUES = 4096  # an output with more values is no label map


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignLabels:
    """The labels of a case.

    Attributes:
        labels: (X, Y, Z) label map, or (N, X, Y, Z) masks, 0 or 1, of labels that overlap; in the
            smallest unsigned type.
        grid: of the label map.
        volumes_mm3: name → volume, mm³.
        warnings: reasons to check the case by eye.
    """

    labels: LabelMap
    grid: Grid
    volumes_mm3: dict[str, float]
    warnings: tuple[str, ...]


def checked_labels(
    pred: torch.Tensor,
    grids: Sequence[Grid],
    labels: Mapping[str, int],
    channel_names: Mapping[int, str],
) -> ForeignLabels:
    """Return the labels in the output of a bundle's postprocessing.

    Args:
        pred: (C, X, Y, Z), or (X, Y, Z).
        grids: of the case's files, the first one first.
        labels: name → value, background first; empty where values have no names.
        channel_names: name of each channel, for masks.

    Raises:
        VolumeError: the output is on none of the grids and leads to none, or holds no labels.
    """
    stacked = pred[None] if pred.ndim == 3 else pred
    if stacked.ndim != 4:
        raise VolumeError(
            f"the bundle's output has the shape {tuple(pred.shape)}, expected (C, X, Y, Z)"
        )
    placed, grid = _on_a_grid(stacked, grids)
    values = whole_values(placed.cpu().numpy())
    if len(values) == 1:
        return _label_map(values[0], grid, labels)
    return _masks(values, grid, channel_names)


def _on_a_grid(pred: torch.Tensor, grids: Sequence[Grid]) -> tuple[torch.Tensor, Grid]:
    """Return an output and the grid that it is on, resampled to the first one if it is on none.

    MONAI's own writer does the same, by the affine.
    """
    shape = tuple(pred.shape[1:])
    affine = None
    if isinstance(pred, MetaTensor):
        affine = np.asarray(pred.affine.cpu(), dtype=np.float64)
    for grid in grids:
        near = affine is None or corner_distance(affine, grid.affine, shape) <= SAME_GRID_MM
        if shape == tuple(grid.shape) and near:
            return _plain(pred), grid
    if affine is None:
        raise VolumeError(
            f"the bundle's output has the shape {shape}, the input {grids[0].shape}: its "
            "postprocessing does not lead back to the input's grid (is `Invertd` missing?)"
        )
    resample = SpatialResample(mode="nearest", padding_mode="zeros")
    first = grids[0]
    target = torch.as_tensor(first.affine)
    return _plain(resample(pred, dst_affine=target, spatial_size=first.shape)), first


def _plain(pred: torch.Tensor) -> torch.Tensor:
    plain: torch.Tensor = pred.as_tensor() if isinstance(pred, MetaTensor) else pred
    return plain


def whole_values(values: Array) -> LabelMap:
    """Return values as the smallest unsigned type that holds them.

    Raises:
        VolumeError: some are fractions, negative or not finite.
    """
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            count = int((~np.isfinite(values)).sum())
            raise VolumeError(f"the bundle's output is NaN or infinite in {count} voxels")
        fractions = values[values != np.rint(values)]
        if fractions.size:
            raise VolumeError(
                f"the bundle's output holds {len(np.unique(fractions))} values that are no whole "
                f"numbers, such as {fractions[0]:g}, so it is no label map: its postprocessing "
                "ends without AsDiscreted, or inverts labels by linear interpolation"
            )
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if low < 0:
        raise VolumeError(f"the bundle's output holds {low}, expected labels of 0 and more")
    whole: LabelMap = values.astype(np.min_scalar_type(high))
    return whole


def _label_map(labels: LabelMap, grid: Grid, names: Mapping[str, int]) -> ForeignLabels:
    present = [int(value) for value in np.unique(labels)]
    if len(present) > MAX_VALUES:
        raise VolumeError(
            f"the bundle's output holds {len(present)} values, expected at most {MAX_VALUES} labels"
        )
    warnings = []
    unnamed = [value for value in present if value and value not in names.values()]
    if unnamed and names:
        listed = ", ".join(map(str, unnamed))
        warnings.append(f"the labels {listed} have no name in the bundle's metadata")
    if present in ([], [0]):
        warnings.append("nothing was found: the label map is empty")
    all_names = {**(names or {"background": 0}), **{unnamed_label(v): v for v in unnamed}}
    return ForeignLabels(
        labels=labels,
        grid=grid,
        volumes_mm3=volumes_mm3(labels, grid.affine, all_names),
        warnings=tuple(warnings),
    )


def unnamed_label(value: int) -> str:
    """Return how a label without a name is called."""
    return f"label {value}"


def _masks(masks: LabelMap, grid: Grid, names: Mapping[int, str]) -> ForeignLabels:
    if masks.max(initial=0) > 1:
        raise VolumeError(
            f"the bundle's output has {len(masks)} channels with values up to {masks.max()}, "
            "expected one label map, or masks of 0 and 1"
        )
    voxel_mm3 = abs(float(np.linalg.det(grid.affine[:3, :3])))
    volumes = {}
    for number, mask in enumerate(masks):
        name = names.get(number, f"channel {number}")
        volumes[name] = int(np.count_nonzero(mask)) * voxel_mm3
    empty = () if masks.any() else ("nothing was found: all masks are empty",)
    return ForeignLabels(
        labels=masks.astype(np.uint8), grid=grid, volumes_mm3=volumes, warnings=empty
    )
