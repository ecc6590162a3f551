"""Refinement of borders between structures by the grey values of the scan.

A network on voxels of 2 mm gives the probability of each structure in them; a scan with finer
voxels shows where the border runs. In each voxel of the labels that several structures contest,
their probabilities are combined with how well the voxel's grey value fits the appearance of each
structure nearby (Bayes' rule). The appearance is a Gaussian distribution of grey values, whose mean
varies from place to place, because the bias field does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.data import MetaTensor
from nibabel.affines import apply_affine
from scipy import ndimage
from torch.nn import functional

from pipeline.config import Spec
from pipeline.inference.boxes import crop_box, widen_box
from pipeline.types import Affine, Array, Box

# from this probability on a voxel shows the appearance of its structure: mixed voxels do not
SURE_PROBABILITY = 0.8
# from this probability on a structure can win a voxel: below, the network is sure that it is not
# there, and a lesion with its grey value must not become part of it
CONTESTING_PROBABILITY = 0.1
# mm, the standard deviation of the neighbourhood that an appearance is measured in: bias fields
# vary more slowly, and structures as thin as the cortex still have enough voxels in it
NEIGHBOURHOOD_MM = 10.0
# mm, about, of the grid of the appearances: less than half of a neighbourhood loses nothing
APPEARANCE_SPACING_MM = 4.0
# fraction of the neighbourhood that must surely be a structure for its appearance to be known
MIN_KNOWN_FRACTION = 1e-4
# the least standard deviation of noise, a fraction of the largest grey value: a phantom without
# noise would divide by 0
MIN_NOISE = 1e-4
# added to probabilities before their logarithm: a network's 0 is not quite 0
PROBABILITY_OFFSET = 1e-3


@dataclass(frozen=True, kw_only=True)
class _Appearance:
    """The grey values of a group's structures around each place, on a coarse grid (x, y, z).

    Attributes:
        means: (K, C, x, y, z), per structure and channel.
        variances: (C, x, y, z), shared by the structures.
        known: (K, x, y, z), the fraction of the neighbourhood that is surely each structure.
        affine: voxel → world of the coarse grid, mm.
    """

    means: torch.Tensor
    variances: torch.Tensor
    known: torch.Tensor
    affine: Affine


def refine_borders(
    index: torch.Tensor,
    target_affine: Affine,
    scan: MetaTensor,
    probabilities: torch.Tensor,
    affine: Affine,
    spec: Spec,
) -> torch.Tensor:
    """Return class numbers whose borders within each group of `spec.refine` follow the scan.

    Args:
        index: (X', Y', Z') class numbers on the grid of `target_affine`.
        target_affine: voxel → world of the labels, mm.
        scan: (C, I, J, K) grey values on a grid of their own.
        probabilities: (N, X, Y, Z) of the classes `spec.contested`, on the network's grid.
        affine: voxel → world of the probabilities, mm.
        spec: gives `refine` and `contested`.

    Returns:
        (X', Y', Z') class numbers. Voxels move from one structure of a group to another; all
        others keep their class.
    """
    labels = index.cpu().numpy().copy()
    names, contested = list(spec.labels), list(spec.contested)
    scan_affine = np.asarray(scan.affine, dtype=np.float64)
    grey = np.nan_to_num(scan.as_tensor().cpu().numpy(), posinf=0, neginf=0)
    to_scan = np.linalg.inv(scan_affine) @ affine
    shape = probabilities.shape[1:]
    network_grey = np.stack([_resample_nearest(channel, to_scan, shape) for channel in grey])
    for group in spec.refine:
        numbers = [names.index(name) for name in group]
        likely = probabilities[[contested.index(number) for number in numbers]]
        box = _contesting_box(likely)
        box_affine = affine.copy()
        box_affine[:3, 3] += affine[:3, :3] @ [s.start for s in box]
        likely = crop_box(likely, box).float()
        to_box = np.linalg.inv(box_affine) @ target_affine
        voxels = _contested_voxels(labels, numbers, likely, to_box)
        if not len(voxels):
            continue
        world = voxels @ target_affine[:3, :3].T + target_affine[:3, 3]
        winners = _most_probable(
            _sample_linear(torch.from_numpy(grey), world, scan_affine),
            world,
            likely,
            _appearance(likely, crop_box(torch.from_numpy(network_grey), box), box_affine),
            box_affine,
        )
        place = tuple(voxels.T)
        refined = np.array(numbers, dtype=labels.dtype)[winners]
        labels[place] = np.where(winners >= 0, refined, labels[place])
    return torch.from_numpy(labels).to(index.device)


def _contesting_box(likely: torch.Tensor) -> Box:
    """Return the box of voxels that any structure can win, and one voxel more at each end.

    Args:
        likely: (K, X, Y, Z) probabilities of a group's structures.

    Returns:
        A box within (X, Y, Z); a corner of it where no structure can win anything.
    """
    can_win = (likely >= CONTESTING_PROBABILITY).any(dim=0).numpy()
    boxes = ndimage.find_objects(can_win.astype(np.uint8))
    return widen_box(boxes[0] if boxes else (slice(0, 1),) * 3, can_win.shape)


def _contested_voxels(
    labels: Array, numbers: Sequence[int], likely: torch.Tensor, to_likely: Affine
) -> Array:
    """Return the voxels (N, 3) of a group's structures near which two of them are likely.

    Args:
        labels: (X', Y', Z') class numbers.
        numbers: the classes of the group.
        likely: (K, X, Y, Z) their probabilities.
        to_likely: voxel of `labels` → voxel of `likely`.
    """
    # one voxel around counts as well: labels interpolate between voxels of the network
    widened = functional.max_pool3d(likely[None], 3, stride=1, padding=1)[0]
    is_contested = ((widened >= CONTESTING_PROBABILITY).sum(dim=0) > 1).numpy().astype(np.uint8)
    first, stop = _covered_box(is_contested.shape, to_likely, labels.shape)
    part = labels[tuple(slice(a, b) for a, b in zip(first, stop, strict=True))]
    part_to_likely = to_likely.copy()
    part_to_likely[:3, 3] += to_likely[:3, :3] @ first
    near_border = _resample_nearest(is_contested, part_to_likely, part.shape).astype(bool)
    found: Array = np.argwhere(near_border & _is_any_of(part, numbers, labels)) + first
    return found


def _covered_box(
    shape: Sequence[int], from_target: Affine, target_shape: Sequence[int]
) -> tuple[Array, Array]:
    """Return the first and the stop voxel of the box on a target grid that covers another grid.

    Args:
        shape: of the other grid, voxels.
        from_target: voxel of the target grid → voxel of the other grid.
        target_shape: of the target grid, voxels.
    """
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
    places = apply_affine(np.linalg.inv(from_target), corners)
    first = np.floor(places.min(axis=0)).astype(int).clip(0, target_shape)
    last = np.ceil(places.max(axis=0)).astype(int).clip(first - 1, np.array(target_shape) - 1)
    return first, last + 1


def _is_any_of(part: Array, numbers: Sequence[int], labels: Array) -> Array:
    """Return which voxels of a part of a label map have one of some class numbers, bool.

    A lookup table is several times faster than `numpy.isin`, which sorts.
    """
    size = 256 if labels.dtype == np.uint8 else int(labels.max()) + 1
    table = np.zeros(size, dtype=bool)
    table[[number for number in numbers if number < size]] = True
    found: Array = table[part]
    return found


def _most_probable(
    grey: torch.Tensor,
    world: Array,
    likely: torch.Tensor,
    appearance: _Appearance,
    affine: Affine,
) -> Array:
    """Return which structure of a group each of N voxels belongs to.

    Args:
        grey: (C, N) grey values of the voxels.
        world: (N, 3) their positions, mm.
        likely: (K, X, Y, Z) probabilities of the group's structures.
        appearance: of the group's structures.
        affine: voxel → world of `likely`, mm.

    Returns:
        (N,) numbers from 0 to K - 1; -1 where no structure can win, or the appearance of one that
        can win is unknown.
    """
    count, channels = appearance.means.shape[:2]
    fields = torch.cat([appearance.means.flatten(0, 1), appearance.variances, appearance.known])
    sampled = _sample_linear(fields, world, appearance.affine)
    means, variances, known = torch.split(sampled, [count * channels, channels, count])
    probability = _sample_linear(likely, world, affine)
    # Bayes: log prior + log likelihood. The structures share their variances, hence the
    # normalisation of the Gaussian is the same for all of them and left out.
    deviation = grey - means.view(count, channels, -1)
    misfit = deviation**2 / (2 * variances.clamp(min=torch.finfo().tiny))
    can_win = probability >= CONTESTING_PROBABILITY
    score = (probability + PROBABILITY_OFFSET).log() - misfit.sum(dim=1)
    score = score.masked_fill(~can_win, -torch.inf)
    unknown = (can_win & (known < MIN_KNOWN_FRACTION)).any(dim=0)
    undecided = unknown | ~can_win.any(dim=0)
    winners: Array = score.argmax(dim=0).masked_fill(undecided, -1).numpy()
    return winners


def _appearance(likely: torch.Tensor, grey: torch.Tensor, affine: Affine) -> _Appearance:
    """Return what the structures of a group look like around each place.

    Args:
        likely: (K, X, Y, Z) probabilities of the group's structures.
        grey: (C, X, Y, Z) grey values on the same grid.
        affine: voxel → world of both, mm.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    step = []  # voxels of the fine grid per voxel of the coarse grid
    for mm, size in zip(spacing, likely.shape[1:], strict=True):
        step.append(min(max(1, round(APPEARANCE_SPACING_MM / mm)), size))
    coarse = affine @ np.diag([*map(float, step), 1.0])
    coarse[:3, 3] = affine[:3, :3] @ ((np.array(step) - 1) / 2) + affine[:3, 3]
    sigma = NEIGHBOURHOOD_MM / (spacing * step)

    smallest = torch.finfo().tiny
    # variances are differences of means of squares: less is lost to rounding around the mean
    centre = grey.mean(dim=(1, 2, 3), keepdim=True)
    centred = grey - centre
    sure = torch.where(likely >= SURE_PROBABILITY, likely, 0.0)
    known = _neighbourhood_mean(sure, step, sigma)
    sums = torch.stack([_neighbourhood_mean(weight * centred, step, sigma) for weight in sure])
    squares = torch.stack(
        [_neighbourhood_mean(weight * centred**2, step, sigma) for weight in sure]
    )
    means = sums / known.clamp(min=smallest)[:, None]
    within = (squares - sums * means).clamp(min=0).sum(dim=0)
    variances = within / known.sum(dim=0).clamp(min=smallest)
    least = MIN_NOISE * grey.abs().amax(dim=(1, 2, 3), keepdim=True)
    return _Appearance(
        means=means + centre,
        variances=torch.maximum(variances, least**2),
        known=known,
        affine=coarse,
    )


def _neighbourhood_mean(field: torch.Tensor, step: Sequence[int], sigma: Array) -> torch.Tensor:
    """Return the mean of a field around each place of a coarse grid; beyond its edge it is 0.

    Args:
        field: (F, X, Y, Z).
        step: voxels of the field per voxel of the coarse grid, along each axis.
        sigma: standard deviation of the Gaussian, voxels of the coarse grid along each axis.
    """
    pooled = functional.avg_pool3d(field[None], list(step), ceil_mode=True)[0].numpy()
    smoothed = ndimage.gaussian_filter(pooled, [0.0, *sigma], mode="constant", truncate=3.0)
    return torch.from_numpy(smoothed)


def _resample_nearest(array: Array, matrix: Affine, shape: Sequence[int]) -> Array:
    """Return the nearest values at the voxels of another grid; beyond the edge, the edge's.

    Args:
        array: (X, Y, Z).
        matrix: voxel of the other grid → voxel of `array`.
        shape: of the other grid, voxels.
    """
    values: Array = ndimage.affine_transform(
        array, matrix[:3, :3], matrix[:3, 3], output_shape=tuple(shape), order=0, mode="nearest"
    )
    return values


def _sample_linear(fields: torch.Tensor, world: Array, affine: Affine) -> torch.Tensor:
    """Return fields, linearly interpolated at N positions; beyond the edge, the edge's values.

    Args:
        fields: (F, X, Y, Z).
        world: (N, 3), mm.
        affine: voxel → world of the fields, mm.

    Returns:
        (F, N) float32.
    """
    inverse = np.linalg.inv(affine)
    size = np.array(fields.shape[1:])
    voxels = world @ inverse[:3, :3].T + inverse[:3, 3]
    # grid_sample takes coordinates from -1 to 1, in the order (z, y, x)
    grid = torch.from_numpy(2 * voxels / np.maximum(size - 1, 1) - 1).float().flip(-1)
    sampled = functional.grid_sample(
        fields.float()[None], grid[None, None, None], padding_mode="border", align_corners=True
    )
    return sampled[0, :, 0, 0]
