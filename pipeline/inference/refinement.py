"""Refinement of borders between structures by the grey values of the scan.

A network on voxels of 2 mm gives the probability of each structure in these voxels; a scan with
finer voxels shows where the border between them is. A voxel of the label map is contested if
several structures are probable near it. Bayes' rule then chooses the structure: its prior is the
network's probability, and its likelihood tells how well the voxel's grey value fits the appearance
of the structure nearby. An appearance is a Gaussian distribution of grey values; its mean varies
over the scan, because the bias field does.
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

# probability from which the grey value of a voxel counts for the appearance of its structure;
# voxels with less may be mixed
SURE_PROBABILITY = 0.8
# probability from which a structure can get a voxel. Below it, the network is certain that the
# structure is not there, and a lesion with the structure's grey value must not become part of it
CONTESTING_PROBABILITY = 0.1
# standard deviation of the Gaussian neighbourhood in which an appearance is measured, mm. Bias
# fields vary more slowly than that, and it has enough voxels even of the thin cortex
NEIGHBOURHOOD_MM = 10.0
# approximate spacing of the grid of appearances, mm: with less than half of a neighbourhood, linear
# interpolation between its voxels loses nothing
APPEARANCE_SPACING_MM = 4.0
# smallest fraction of the neighbourhood that must belong to a structure for its appearance to be
# known
MIN_KNOWN_FRACTION = 1e-4
# smallest standard deviation of grey values, as a fraction of the largest grey value: in a phantom
# without noise it would be 0, and the likelihood is divided by it
MIN_NOISE = 1e-4
# what a neighbour with the same label adds to the logarithm of a label's probability, less for a
# more distant one. Without it, noise leaves speckles of one tissue in the other
NEIGHBOUR_WEIGHT = 0.2
SMOOTHING_STEPS = 2  # passes over all voxels
# added to probabilities before their logarithm: a network's 0 does not mean impossible
PROBABILITY_OFFSET = 1e-3


@dataclass(frozen=True, kw_only=True)
class _Appearance:
    """The Gaussian distributions of grey values of K structures, on a coarse grid (x, y, z).

    Attributes:
        means: (K, C, x, y, z) mean of each structure in each channel.
        variances: (C, x, y, z) variance in each channel, the same for all structures.
        known: (K, x, y, z) fraction of the neighbourhood that belongs to each structure.
        affine: affine of the coarse grid, voxel → world, mm.
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
    """Return class numbers whose borders, within each group of `spec.refine`, follow the scan.

    A voxel can only change from one structure of a group to another of the same group.

    Args:
        index: (X', Y', Z') class numbers on the grid of the label map.
        target_affine: affine of the label map, voxel → world, mm.
        scan: (C, I, J, K) grey values as read, on a grid of their own.
        probabilities: (N, X, Y, Z) probabilities of the classes `spec.contested`, on the network's
            grid.
        affine: affine of the network's grid, voxel → world, mm.
        spec: gives `refine` (groups of structures) and `contested` (numbers of their classes).

    Returns:
        (X', Y', Z') refined class numbers.
    """
    labels = index.cpu().numpy().copy()
    names, contested = list(spec.labels), list(spec.contested)
    scan_affine = np.asarray(scan.affine, dtype=np.float64)
    grey = scan.as_tensor().cpu().numpy()
    if not np.isfinite(grey.sum()):  # a sum keeps NaN and infinity, and is fast
        grey = np.nan_to_num(grey, posinf=0, neginf=0)
    to_scan = np.linalg.inv(scan_affine) @ affine
    shape = probabilities.shape[1:]
    network_grey = np.stack([_resample_nearest(channel, to_scan, shape) for channel in grey])
    network_grey = network_grey.astype(np.float32)
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
        probability = _sample_linear(likely, world, box_affine)
        values = np.array(numbers, dtype=labels.dtype)
        is_open = _is_open(probability, values, labels[tuple(voxels.T)])
        if not is_open.any():
            continue
        world = world[is_open]
        score = _log_posterior(
            _sample_linear(torch.from_numpy(grey), world, scan_affine),
            world,
            probability[:, torch.from_numpy(is_open)],
            _appearance(likely, crop_box(torch.from_numpy(network_grey), box), box_affine),
        )
        _label_smoothly(labels, voxels[is_open], score, values, target_affine)
    return torch.from_numpy(labels).to(index.device)


def _label_smoothly(
    labels: Array, voxels: Array, score: Array, values: Array, affine: Affine
) -> None:
    """Give voxels the label with the best sum of score and neighbours with that label, in place.

    A voxel whose label has the best score keeps it: neighbours can only undo a change. Voxels are
    labelled in turn, those of even and those of odd checkerboard fields, so that no two neighbours
    change at once (iterated conditional modes of a Potts model).

    Args:
        labels: (X', Y', Z') class numbers.
        voxels: (N, 3) voxels to be labelled; where no score is finite, the label stays.
        score: (K, N) log-posterior of each structure without neighbours; -inf where it cannot be.
        values: (K,) class numbers of the structures.
        affine: affine of the labels, voxel → world, mm.

    References:
        Besag: On the statistical analysis of dirty pictures. Journal of the Royal Statistical
        Society B 48 (1986), doi:10.1111/j.2517-6161.1986.tb01412.x.
    """
    best = values[score.argmax(axis=0)]
    changes = np.isfinite(score).any(axis=0) & (best != labels[tuple(voxels.T)])
    voxels, score, best = voxels[changes], score[:, changes], best[changes]
    labels[tuple(voxels.T)] = best
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    weights = NEIGHBOUR_WEIGHT * spacing.min() / spacing
    is_odd = (voxels.sum(axis=1) % 2).astype(bool)
    fields = [(voxels[is_odd == parity], score[:, is_odd == parity]) for parity in (False, True)]
    for _ in range(SMOOTHING_STEPS):
        for own, own_score in fields:
            support = _neighbour_support(labels, own, values, weights)
            labels[tuple(own.T)] = values[(own_score + support).argmax(axis=0)]


def _neighbour_support(labels: Array, voxels: Array, values: Array, weights: Array) -> Array:
    """Return the weights of the neighbours with each label, (K, N) float32.

    Args:
        labels: (X', Y', Z') class numbers.
        voxels: (N, 3) voxels.
        values: (K,) class numbers.
        weights: (3,) weight of a neighbour along each axis.
    """
    support = np.zeros((len(values), len(voxels)), dtype=np.float32)
    for axis, step in ((axis, step) for axis in range(3) for step in (-1, 1)):
        neighbour = [*voxels.T]
        neighbour[axis] = (neighbour[axis] + step).clip(0, labels.shape[axis] - 1)
        support += weights[axis] * (labels[tuple(neighbour)] == values[:, None])
    return support


def _contesting_box(likely: torch.Tensor) -> Box:
    """Return the bounding box of the voxels that any structure can get, with one voxel around it.

    Args:
        likely: (K, X, Y, Z) probabilities of a group's structures, float16.

    Returns:
        A box within (X, Y, Z); the box at its first voxel if there are no such voxels.
    """
    # numbers in float16 that are not negative have the order of their bits, which are compared
    # several times as fast
    least = np.float16(CONTESTING_PROBABILITY).view(np.int16)
    can_win = (likely.numpy().view(np.int16) >= least).any(axis=0)
    boxes = ndimage.find_objects(can_win.view(np.uint8))
    return widen_box(boxes[0] if boxes else (slice(0, 1),) * 3, can_win.shape)


def _is_open(probability: torch.Tensor, numbers: Array, labels: Array) -> Array:
    """Return in which of N voxels grey values can decide, or the label is not what they can get.

    Args:
        probability: (K, N) probabilities of a group's structures.
        numbers: (K,) their class numbers.
        labels: (N,) class numbers of the voxels.
    """
    can_win = (probability >= CONTESTING_PROBABILITY).numpy()
    is_kept: Array = (can_win & (numbers[:, None] == labels)).any(axis=0)
    count = can_win.sum(axis=0)
    is_open: Array = (count > 1) | ((count == 1) & ~is_kept)
    return is_open


def _contested_voxels(
    labels: Array, numbers: Sequence[int], likely: torch.Tensor, to_likely: Affine
) -> Array:
    """Return the voxels (N, 3) of a group's structures near which at least two are probable.

    Args:
        labels: (X', Y', Z') class numbers.
        numbers: class numbers of the group's structures.
        likely: (K, X, Y, Z) probabilities of these structures.
        to_likely: voxel of `labels` → voxel of `likely`.
    """
    # neighbouring voxels count too, because the labels come from interpolation between them
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
    """Return the box of a target grid that covers another grid, as first and stop voxel, (3,) each.

    Args:
        shape: size of the other grid, voxels.
        from_target: voxel of the target grid → voxel of the other grid.
        target_shape: size of the target grid, voxels.
    """
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
    places = apply_affine(np.linalg.inv(from_target), corners)
    first = np.floor(places.min(axis=0)).astype(int).clip(0, target_shape)
    last = np.ceil(places.max(axis=0)).astype(int).clip(first - 1, np.array(target_shape) - 1)
    return first, last + 1


def _is_any_of(part: Array, numbers: Sequence[int], labels: Array) -> Array:
    """Return which voxels of `part` have one of the class numbers, as `numpy.isin` does.

    A lookup table is several times faster than `numpy.isin`, which sorts.

    Args:
        part: box of `labels`.
        numbers: class numbers.
        labels: whole label map, which gives the size of the table.
    """
    size = 256 if labels.dtype == np.uint8 else int(labels.max()) + 1
    table = np.zeros(size, dtype=bool)
    table[[number for number in numbers if number < size]] = True
    found: Array = table[part]
    return found


def _log_posterior(
    grey: torch.Tensor,
    world: Array,
    probability: torch.Tensor,
    appearance: _Appearance,
) -> Array:
    """Return the log-posterior of each structure of a group in N voxels, up to a constant.

    Args:
        grey: (C, N) grey values of the voxels.
        world: (N, 3) positions of the voxels, mm.
        probability: (K, N) probabilities of the group's structures.
        appearance: appearance of the group's structures.

    Returns:
        (K, N) float32; -inf for a structure that cannot get the voxel, and for all of them if the
        appearance of one that can get it is unknown.
    """
    count, channels = appearance.means.shape[:2]
    fields = torch.cat([appearance.means.flatten(0, 1), appearance.variances, appearance.known])
    sampled = _sample_linear(fields, world, appearance.affine)
    means, variances, known = torch.split(sampled, [count * channels, channels, count])
    # Bayes: log prior + log likelihood. The factor before a Gaussian depends on its variance only,
    # which is the same for all structures, and is left out.
    deviation = grey - means.view(count, channels, -1)
    misfit = deviation**2 / (2 * variances.clamp(min=torch.finfo().tiny))
    can_win = probability >= CONTESTING_PROBABILITY
    score = (probability + PROBABILITY_OFFSET).log() - misfit.sum(dim=1)
    score = score.masked_fill(~can_win, -torch.inf)
    unknown = (can_win & (known < MIN_KNOWN_FRACTION)).any(dim=0)
    posterior: Array = score.masked_fill(unknown, -torch.inf).numpy()
    return posterior


def _appearance(likely: torch.Tensor, grey: torch.Tensor, affine: Affine) -> _Appearance:
    """Return the appearance of a group's structures: means and variances of their grey values.

    Args:
        likely: (K, X, Y, Z) probabilities of the group's structures.
        grey: (C, X, Y, Z) grey values on the same grid.
        affine: affine of this grid, voxel → world, mm.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    step = []  # voxels of the fine grid per voxel of the coarse grid
    for mm, size in zip(spacing, likely.shape[1:], strict=True):
        step.append(min(max(1, round(APPEARANCE_SPACING_MM / mm)), size))
    coarse = affine @ np.diag([*map(float, step), 1.0])
    coarse[:3, 3] = affine[:3, :3] @ ((np.array(step) - 1) / 2) + affine[:3, 3]
    sigma = NEIGHBOURHOOD_MM / (spacing * step)

    smallest = torch.finfo().tiny
    # variance = mean of squares - square of mean, which rounds less if values are close to 0
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
    """Return the Gaussian-weighted mean of fields around each voxel of a coarse grid.

    Beyond their edge the fields are 0.

    Args:
        field: (F, X, Y, Z) fields.
        step: number of voxels of the fields per voxel of the coarse grid, along each axis.
        sigma: standard deviation of the Gaussian along each axis, voxels of the coarse grid.
    """
    pooled = functional.avg_pool3d(field[None], list(step), ceil_mode=True)[0].numpy()
    smoothed = ndimage.gaussian_filter(pooled, [0.0, *sigma], mode="constant", truncate=3.0)
    return torch.from_numpy(smoothed)


def _resample_nearest(array: Array, matrix: Affine, shape: Sequence[int]) -> Array:
    """Return an array resampled to another grid by nearest neighbours, with repeated edges.

    Args:
        array: (X, Y, Z) values.
        matrix: voxel of the other grid → voxel of `array`.
        shape: size of the other grid, voxels.
    """
    values: Array = ndimage.affine_transform(
        array, matrix[:3, :3], matrix[:3, 3], output_shape=tuple(shape), order=0, mode="nearest"
    )
    return values


def _sample_linear(fields: torch.Tensor, world: Array, affine: Affine) -> torch.Tensor:
    """Return fields interpolated linearly at N positions, with repeated edges.

    Args:
        fields: (F, X, Y, Z) fields.
        world: (N, 3) positions, mm.
        affine: affine of the fields, voxel → world, mm.

    Returns:
        (F, N) float32 values.
    """
    inverse = np.linalg.inv(affine)
    size = np.array(fields.shape[1:])
    voxels = world @ inverse[:3, :3].T + inverse[:3, 3]
    # grid_sample takes coordinates from -1 to 1, in the order (z, y, x)
    grid = torch.from_numpy(2 * voxels / np.maximum(size - 1, 1) - 1).float().flip(-1)
    # grid_sample uses one thread per item of a batch
    threads = torch.get_num_threads()
    length = -(-len(grid) // threads)
    padded = functional.pad(grid, (0, 0, 0, threads * length - len(grid)))
    sampled = functional.grid_sample(
        fields.float().expand(threads, *fields.shape),
        padded.view(threads, 1, 1, length, 3),
        padding_mode="border",
        align_corners=True,
    )
    return sampled[:, :, 0, 0].movedim(0, 1).flatten(1)[:, : len(grid)]
