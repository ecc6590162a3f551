"""Random degradations of scans, to learn how good the segmentations of bad scans are.

Each scan gets a few of: noise, motion, a bias field, thick slices, a cropped field of view, ringing
and spikes of k-space, lesions. The kinds and their severities come from a seed alone, and never
from a segmentation. Noise, ringing, spikes and the bias field are MONAI's; motion mixes the k-space
of moved copies, as a head that changes its place during the acquisition does.

References:
    Shaw et al.: A k-space model of movement artefacts. IEEE Transactions on Medical Imaging 39,
    2881-2892 (2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from monai.transforms import (
    GibbsNoise,
    KSpaceSpikeNoise,
    RandBiasField,
    RandRicianNoise,
)
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.types import Affine, Array, LabelMap

BIAS_DEGREE = 3  # of the polynomials of the bias field
LESION_FRACTION_OF_CONTRAST = 0.8  # of a lesion, relative to the standard deviation of the scan


@dataclass(frozen=True, kw_only=True, slots=True)
class Degradation:
    """Severities of the degradations of one scan; 0 leaves one out.

    Attributes:
        noise: standard deviation of Rician noise, as a fraction of the 99th percentile.
        motion: largest rotation (degrees) and shift (mm) of the head between parts of k-space.
        bias: largest coefficient of the logarithm of the bias field.
        slices: thickness of slices, in voxels of the scan as it was; 0 and 1 keep it.
        slices_axis: axis of the array across which slices are thick.
        crop: fraction of the field of view that is cut off at one face.
        crop_face: number of that face, 2 × axis, plus 1 for its upper end.
        ringing: fraction of k-space that is lost, 0 to 1.
        spikes: intensity of a spike of k-space, in its logarithm above the mean; 0 for none.
        lesions: number of lesions.
        lesion_mm: largest radius of a lesion, mm.
        seed: of the random numbers within the degradations.
    """

    noise: float = 0.0
    motion: float = 0.0
    bias: float = 0.0
    slices: int = 0
    slices_axis: int = 2
    crop: float = 0.0
    crop_face: int = 4
    ringing: float = 0.0
    spikes: float = 0.0
    lesions: int = 0
    lesion_mm: float = 0.0
    seed: int = 0

    def columns(self) -> dict[str, Any]:
        """Return the severities as plain values."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


# chance and largest severity of each kind, from what scans look like. They are not to be changed
# once a Dice has been predicted from them
CHANCES: Mapping[str, float] = {
    "noise": 0.35,
    "motion": 0.4,
    "bias": 0.35,
    "slices": 0.3,
    "crop": 0.2,
    "ringing": 0.15,
    "spikes": 0.05,
    "lesions": 0.2,
}
INTACT = 0.2  # chance of a scan without any degradation
LARGEST_NOISE, LARGEST_MOTION, LARGEST_BIAS, LARGEST_CROP = 0.15, 6.0, 0.5, 0.35
THINNEST, THICKEST = 2, 7  # slices, voxels
LEAST_RINGING, MOST_RINGING = 0.3, 0.7
LEAST_SPIKE, MOST_SPIKE = 0.5, 2.0
MOST_LESIONS, LARGEST_LESION_MM = 12, 12.0


def draw_degradation(seed: int) -> Degradation:
    """Return the degradation of the scan with a number; the same number gives the same."""
    random = np.random.default_rng([seed, 2024])
    # every number is drawn, whether it is used or not, so that a new kind would not move the others
    happens = {kind: bool(random.random() < chance) for kind, chance in CHANCES.items()}
    severity = {kind: float(random.random()) for kind in CHANCES}
    axis, face, inner = (int(random.integers(n)) for n in (3, 6, 2**31))
    if random.random() < INTACT:
        return Degradation(seed=inner)

    def between(kind: str, low: float, high: float) -> float:
        return low + (high - low) * severity[kind] if happens[kind] else 0.0

    return Degradation(
        noise=between("noise", 0.01, LARGEST_NOISE),
        motion=between("motion", 1.0, LARGEST_MOTION),
        bias=between("bias", 0.1, LARGEST_BIAS),
        slices=round(between("slices", THINNEST, THICKEST)),
        slices_axis=axis,
        crop=between("crop", 0.1, LARGEST_CROP),
        crop_face=face,
        ringing=between("ringing", LEAST_RINGING, MOST_RINGING),
        spikes=between("spikes", LEAST_SPIKE, MOST_SPIKE),
        lesions=round(between("lesions", 1, MOST_LESIONS)),
        lesion_mm=LARGEST_LESION_MM,
        seed=inner,
    )


def degrade(
    image: Array, labels: LabelMap, affine: Affine, degradation: Degradation
) -> tuple[NDArray[np.float32], LabelMap, Affine]:
    """Return a scan after a degradation, its label map on the same grid, and the grid's affine.

    Lesions come first, then what the magnet and the head do, then the sampling, and noise last.

    Args:
        image: (X, Y, Z) intensities, 0 or more.
        labels: (X, Y, Z) label map; lesions keep the label of the tissue around them.
        affine: voxel → world, mm.
        degradation: severities.
    """
    random = np.random.default_rng(degradation.seed)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    scan = np.asarray(image, dtype=np.float32)
    if degradation.lesions:
        scan = _with_lesions(scan, labels, spacing, degradation, random)
    if degradation.motion:
        scan = _moved(scan, spacing, degradation.motion, random)
    if degradation.bias:
        scan = _biased(scan, degradation.bias, degradation.seed)
    if degradation.ringing:
        scan = _positive(GibbsNoise(degradation.ringing)(torch.from_numpy(scan)[None])[0])
    if degradation.spikes:
        scan = _with_spike(scan, degradation.spikes, random)
    grid = np.array(affine, dtype=np.float64)
    if degradation.slices > 1:
        axis, count = degradation.slices_axis, degradation.slices
        scan, labels, grid = _thick_slices(scan, labels, grid, axis, count)
    if degradation.crop:
        scan, labels, grid = _cropped(scan, labels, grid, degradation)
    if degradation.noise:
        level = degradation.noise * float(np.percentile(scan, 99))
        noise = RandRicianNoise(prob=1.0, std=max(level, 1e-6), sample_std=False)
        noise.set_random_state(degradation.seed)
        scan = _positive(noise(torch.from_numpy(scan)[None])[0])
    return np.ascontiguousarray(scan), np.ascontiguousarray(labels), grid


def _positive(scan: Any) -> NDArray[np.float32]:
    """Return the magnitude of an image, which no scan is below."""
    array = np.asarray(scan, dtype=np.float32)
    return np.abs(array)


def _with_lesions(
    scan: NDArray[np.float32],
    labels: LabelMap,
    spacing: NDArray[np.float64],
    degradation: Degradation,
    random: np.random.Generator,
) -> NDArray[np.float32]:
    """Return a scan with ellipsoids of another intensity in its structures, with soft borders."""
    places = np.argwhere(labels > 0)
    if not len(places):
        return scan
    change = LESION_FRACTION_OF_CONTRAST * float(scan[labels > 0].std())
    sign = random.choice([-1.0, 1.0])
    changed = scan.copy()
    for _ in range(degradation.lesions):
        centre = places[random.integers(len(places))]
        radius = random.uniform(0.3, 1.0, 3) * degradation.lesion_mm / spacing
        low = np.maximum(np.floor(centre - 2 * radius).astype(int), 0)
        high = np.minimum(np.ceil(centre + 2 * radius).astype(int) + 1, scan.shape)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        axes = [
            (np.arange(a, b) - c) / r for a, b, c, r in zip(low, high, centre, radius, strict=True)
        ]
        distance = sum(np.square(part) for part in np.ix_(*axes))
        # 1 within the radius, and falling to 0 over the next fifth of it
        weight = np.clip((1.2 - np.sqrt(distance)) / 0.2, 0, 1) * (labels[box] > 0)
        changed[box] += (sign * change * weight).astype(np.float32)
    return np.maximum(changed, 0)


def _moved(
    scan: NDArray[np.float32],
    spacing: NDArray[np.float64],
    severity: float,
    random: np.random.Generator,
) -> NDArray[np.float32]:
    """Return a scan whose head moved during the acquisition.

    Two to four times, lines of k-space away from its centre are those of a rotated and shifted
    copy: the centre, which decides most of the picture, stays, and the others make ghosts. The
    median of the movement, weighted by the energy of the edges that each line holds, is zero: the
    picture shows the head where its label map is.

    Args:
        scan: (X, Y, Z) intensities.
        spacing: (3,) mm.
        severity: largest rotation, degrees, and shift, mm, before the median is taken off.
        random: generator.
    """
    axis = int(random.integers(3))  # the direction of the phase encoding
    count = scan.shape[axis]
    lines = np.arange(count)
    central = np.abs(lines - count // 2) < 0.04 * count
    times = np.sort(random.uniform(0.0, 1.0, int(random.integers(2, 5))))
    spans, poses = [], [np.zeros(6)]  # a pose is three angles and three shifts
    for begin, end in zip(times, [*times[1:], 1.0], strict=True):
        angles = np.radians(random.uniform(-1, 1, 3) * severity)
        poses.append(np.concatenate([angles, random.uniform(-1, 1, 3) * severity]))
        spans.append((lines >= begin * count) & (lines < end * count) & ~central)
    energy = _edge_energy(scan, spacing, axis)
    weights = [float(energy[span].sum()) for span in spans]
    weights.insert(0, float(energy.sum()) - sum(weights))
    from_median = np.array(poses) - _weighted_median(np.array(poses), np.array(weights))
    spans.insert(0, np.ones(count, dtype=bool))
    spectrum = np.zeros(scan.shape, np.complex64)
    for span, pose in zip(spans, from_median, strict=True):
        moved = _rigidly_moved(scan, spacing, *np.split(pose, 2)) if pose.any() else scan
        within = span.reshape([-1 if i == axis else 1 for i in range(3)])
        spectrum = np.where(within, _spectrum(moved, axis), spectrum)
    mixed = np.fft.ifftn(np.fft.ifftshift(spectrum, axes=axis))
    return np.abs(mixed).astype(np.float32)


def _weighted_median(
    values: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the median of each column of (N, K) values, of which each row has a weight (N,)."""
    order = values.argsort(axis=0)
    so_far = weights[order].cumsum(axis=0)
    middle = (so_far < weights.sum() / 2).sum(axis=0).clip(max=len(values) - 1)
    row = np.take_along_axis(order, middle[None], axis=0)
    median: NDArray[np.float64] = np.take_along_axis(values, row, axis=0)[0]
    return median


def _spectrum(scan: NDArray[np.float32], axis: int) -> NDArray[np.complex64]:
    """Return k-space, with frequency 0 of an axis in the middle."""
    return np.fft.fftshift(np.fft.fftn(scan).astype(np.complex64), axes=axis)


def _edge_energy(
    scan: NDArray[np.float32], spacing: NDArray[np.float64], axis: int
) -> NDArray[np.float64]:
    """Return the energy of the gradient of a scan in each line of k-space along an axis."""
    along = [np.fft.fftfreq(size, mm) ** 2 for size, mm in zip(scan.shape, spacing, strict=True)]
    squared = np.square(np.abs(_spectrum(scan, axis)), dtype=np.float64)
    along[axis] = np.fft.fftshift(along[axis])
    squared *= sum(np.ix_(*along))
    others = tuple(n for n in range(3) if n != axis)
    energy: NDArray[np.float64] = squared.sum(axis=others)
    return energy


def _rigidly_moved(
    scan: NDArray[np.float32],
    spacing: NDArray[np.float64],
    angles: NDArray[np.float64],
    shift: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Return a scan rotated about its centre (radians about each axis) and shifted (mm)."""
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        i, j = [n for n in range(3) if n != axis]
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        rotation = rotation @ turn
    matrix = np.diag(1 / spacing) @ rotation @ np.diag(spacing)
    centre = (np.array(scan.shape) - 1) / 2
    offset = centre - matrix @ centre + shift / spacing
    moved: NDArray[np.float32] = ndimage.affine_transform(scan, matrix, offset, order=1)
    return moved


def _biased(scan: NDArray[np.float32], severity: float, seed: int) -> NDArray[np.float32]:
    """Return a scan with a smooth bias field."""
    # the coefficients are drawn from the range, so that both ends are the severity's
    field = RandBiasField(degree=BIAS_DEGREE, coeff_range=(-severity, severity), prob=1.0)
    field.set_random_state(seed)
    return _positive(field(torch.from_numpy(scan)[None])[0])


def _with_spike(
    scan: NDArray[np.float32], severity: float, random: np.random.Generator
) -> NDArray[np.float32]:
    """Return a scan with stripes, from one point of k-space that is too bright."""
    place = [int(n // 2 + random.integers(n // 16, max(n // 6, n // 16 + 1))) for n in scan.shape]
    strength = float(np.log(np.abs(np.fft.fftn(scan)).mean()) + 4 + severity)
    spike = KSpaceSpikeNoise(loc=tuple(place), k_intensity=strength)
    return _positive(spike(torch.from_numpy(scan)[None])[0])


def _thick_slices(
    scan: NDArray[np.float32], labels: LabelMap, affine: Affine, axis: int, count: int
) -> tuple[NDArray[np.float32], LabelMap, Affine]:
    """Return a scan whose slices are the means of `count` ones; labels are those in the middle."""
    slices = scan.shape[axis] // count
    if slices < 2:
        return scan, labels, affine
    whole = [slice(None)] * 3
    whole[axis] = slice(0, slices * count)
    parts = scan[tuple(whole)].swapaxes(0, axis)
    means = parts.reshape(slices, count, *parts.shape[1:]).mean(axis=1).swapaxes(0, axis)
    middle = np.arange(slices) * count + count // 2
    grid = affine.copy()
    grid[:3, axis] *= count
    # the middle of `count` voxels, and that of the middle voxel, differ by half a voxel if even
    grid[:3, 3] += affine[:3, axis] * (count - 1) / 2
    return means.astype(np.float32), labels.take(middle, axis=axis), grid


def _cropped(
    scan: NDArray[np.float32], labels: LabelMap, affine: Affine, degradation: Degradation
) -> tuple[NDArray[np.float32], LabelMap, Affine]:
    """Return a scan without a part of its field of view; the box of the structures is what counts.

    The fraction is that of the extent of the structures, so that part of them is lost.
    """
    axis, upper = divmod(degradation.crop_face, 2)
    inside = np.flatnonzero(labels.any(axis=tuple(n for n in range(3) if n != axis)))
    if not len(inside):
        return scan, labels, affine
    first, last = int(inside[0]), int(inside[-1])
    depth = round(degradation.crop * (last - first + 1))
    kept = slice(0, max(2, last + 1 - depth)) if upper else slice(first + depth, None)
    box = [slice(None)] * 3
    box[axis] = kept
    grid = affine.copy()
    grid[:3, 3] += affine[:3, axis] * (kept.start or 0)
    return scan[tuple(box)], labels[tuple(box)], grid
