"""The border between two tissues, settled once more where the scan shows it, at the labels' own voxels.

A network of 2 mm voxels says how likely each structure is in them; a scan of finer ones shows where the border runs. Where
structures contest a voxel, their probabilities are weighed with how well its grey value fits what each structure looks like
nearby (a Gaussian, whose means follow the bias field): Bayes' rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from scipy import ndimage
from torch.nn import functional

from pipeline.config import Spec
from pipeline.inference.connected_components import widen_box
from pipeline.types import Affine, Array

SURE, CONTESTED = (
    0.8,
    0.1,
)  # probabilities: from which a voxel tells of its structure, from which a structure may win one
NEARBY = 10.0  # mm: the standard deviation of what counts as near
COARSE = 4.0  # mm: means are held on about this grid
SEEN = 1e-4  # of what is near: how much of it must be surely of a structure to know its grey value
FLOOR = 1e-4  # of the largest grey value: the standard deviation of noise is never less
LEAST = 1e-3  # added to probabilities before their logarithm


def refine_borders(
    index: torch.Tensor,
    target_affine: Affine,
    scan: MetaTensor,
    probabilities: torch.Tensor,
    affine: Affine,
    spec: Spec,
) -> torch.Tensor:
    """Class numbers with the borders within each group of `spec.refine` settled by the scan.

    Args:
        index: (X', Y', Z') class numbers on the grid of `target_affine`.
        target_affine: voxel → world of the labels.
        scan: (C, I, J, K) grey values on a grid of its own.
        probabilities: (N, X, Y, Z) of the classes `spec.contested`, on the network's grid.
        affine: voxel → world of that.
        spec: `refine`, `contested`.

    Returns:
        as `index`; a voxel goes from one structure of a group to another, all else stays.
    """
    labels = index.cpu().numpy().copy()
    names, contested = list(spec.labels), list(spec.contested)
    own = np.asarray(scan.affine, dtype=np.float64)
    grey = np.nan_to_num(scan.as_tensor().cpu().numpy(), posinf=0, neginf=0)
    onto = np.linalg.inv(own) @ affine
    seen = np.stack([_moved(channel, onto, probabilities.shape[1:]) for channel in grey])
    for group in spec.refine:
        numbers = [names.index(name) for name in group]
        likely = probabilities[[contested.index(number) for number in numbers]]
        part = _part(likely)
        there = affine.copy()
        there[:3, 3] += affine[:3, :3] @ [s.start for s in part]
        likely = likely[:, part[0], part[1], part[2]].float()
        voxels = _contested(labels, numbers, likely, np.linalg.inv(there) @ target_affine)
        if len(voxels):
            world = voxels @ target_affine[:3, :3].T + target_affine[:3, 3]
            values = _at(torch.from_numpy(grey), world, own)
            won = _winners(
                values, world, likely, torch.from_numpy(seen[:, part[0], part[1], part[2]]), there
            )
            before = labels[tuple(voxels.T)]
            labels[tuple(voxels.T)] = np.where(
                won >= 0, np.array(numbers, dtype=labels.dtype)[won], before
            )
    return torch.from_numpy(labels).to(index.device)


def _part(likely: torch.Tensor) -> tuple[slice, ...]:
    """The box of a grid (K, X, Y, Z) in which structures may win anything, and a voxel more; a corner where they may not."""
    able = (likely >= CONTESTED).any(dim=0).numpy()
    boxes = ndimage.find_objects(able.astype(np.uint8))
    return widen_box(boxes[0] if boxes else (slice(0, 1),) * 3, able.shape)


def _moved(array: Array, matrix: Affine, shape: Sequence[int]) -> Array:
    """Nearest values at the voxels of another grid, beyond the edge those of the edge."""
    found: Array = ndimage.affine_transform(
        array, matrix[:3, :3], matrix[:3, 3], output_shape=tuple(shape), order=0, mode="nearest"
    )
    return found


def _contested(
    labels: Array, numbers: Sequence[int], likely: torch.Tensor, matrix: Affine
) -> Array:
    """(N, 3) voxels of a group's structures near which two of them are likely."""
    wide = functional.max_pool3d(likely[None], 3, stride=1, padding=1)[0]
    near = ((wide >= CONTESTED).sum(dim=0) > 1).numpy().astype(np.uint8)
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(near.shape) - 1)
    places = nib.affines.apply_affine(np.linalg.inv(matrix), corners)
    first = np.floor(places.min(axis=0)).astype(int).clip(0, labels.shape)
    last = np.ceil(places.max(axis=0)).astype(int).clip(first - 1, np.array(labels.shape) - 1) + 1
    part = labels[tuple(slice(a, b) for a, b in zip(first, last, strict=True))]
    shifted = matrix.copy()
    shifted[:3, 3] += matrix[:3, :3] @ first
    wanted = np.zeros(256 if part.dtype == np.uint8 else int(labels.max()) + 1, dtype=bool)
    wanted[[number for number in numbers if number < len(wanted)]] = True
    found: Array = (
        np.argwhere(_moved(near, shifted, part.shape).astype(bool) & wanted[part]) + first
    )
    return found


def _winners(
    values: torch.Tensor, world: Array, likely: torch.Tensor, seen: torch.Tensor, affine: Affine
) -> Array:
    """(N,) which structure of a group each voxel is of; -1 where one that may win has not been seen nearby.

    Args:
        values: (C, N) grey values.
        world: (N, 3) places, mm.
        likely: (K, X, Y, Z) probabilities of the group's structures.
        seen: (C, X, Y, Z) grey values where they are told.
        affine: voxel → world of both.
    """
    means, variances, known, coarse = _appearance(likely, seen, affine)
    channels, count = len(seen), len(likely)
    fields = _at(torch.cat([means.flatten(0, 1), variances, known]), world, coarse)
    mean, variance, there = torch.split(fields, [count * channels, channels, count])
    off = (values - mean.view(count, channels, -1)) ** 2 / (
        2 * variance.clamp(min=torch.finfo().tiny)
    )
    chance = _at(likely, world, affine)
    able = chance >= CONTESTED
    score = ((chance + LEAST).log() - off.sum(dim=1)).masked_fill(~able, -torch.inf)
    blind = (able & (there < SEEN)).any(dim=0) | ~able.any(dim=0)
    found: Array = score.argmax(dim=0).masked_fill(blind, -1).numpy()
    return found


def _appearance(
    likely: torch.Tensor, seen: torch.Tensor, affine: Affine
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Affine]:
    """What structures look like around each place: means (K, C, …), variances (C, …) and how much of each is near (K, …).

    Beside these the affine of their grid.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    step = [
        min(max(1, round(COARSE / mm)), n) for mm, n in zip(spacing, likely.shape[1:], strict=True)
    ]
    coarse = affine @ np.diag([*map(float, step), 1.0])
    coarse[:3, 3] = affine[:3, :3] @ ((np.array(step) - 1) / 2) + affine[:3, 3]
    sigma = [0.0, *(NEARBY / (spacing * step))]

    def around(field: torch.Tensor) -> torch.Tensor:
        pooled = functional.avg_pool3d(field[None], step, ceil_mode=True)[0].numpy()
        return torch.from_numpy(
            ndimage.gaussian_filter(pooled, sigma, mode="constant", truncate=3.0)
        )

    middle = seen.mean(dim=(1, 2, 3), keepdim=True)
    centred = seen - middle
    sure = torch.where(likely >= SURE, likely, 0.0)
    known = around(sure)
    first = torch.stack([around(weight * centred) for weight in sure])
    second = torch.stack([around(weight * centred**2) for weight in sure])
    mean = first / known.clamp(min=torch.finfo().tiny)[:, None]
    spread = (second - first * mean).clamp(min=0).sum(dim=0) / known.sum(dim=0).clamp(
        min=torch.finfo().tiny
    )
    least = FLOOR * seen.abs().amax(dim=(1, 2, 3), keepdim=True)
    return mean + middle, torch.maximum(spread, least**2), known, coarse


def _at(fields: torch.Tensor, world: Array, affine: Affine) -> torch.Tensor:
    """(F, N): fields (F, X, Y, Z), linearly interpolated at N places; beyond the edge those of the edge."""
    inverse = np.linalg.inv(affine)
    size = np.array(fields.shape[1:])
    voxel = world @ inverse[:3, :3].T + inverse[:3, 3]
    grid = torch.from_numpy(2 * voxel / np.maximum(size - 1, 1) - 1).float().flip(-1)
    found = functional.grid_sample(
        fields.float()[None], grid[None, None, None], padding_mode="border", align_corners=True
    )
    return found[0, :, 0, 0]
