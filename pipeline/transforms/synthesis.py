"""Training images synthesised from label maps, with random contrast, resolution and field of view.

A label map may come with the scan that it was made from; a share of its images then shows the scan.

References:
    Billot et al.: SynthSeg: Segmentation of brain MRI scans of any contrast and resolution without
    retraining. Medical Image Analysis 86, 102789 (2023), doi:10.1016/j.media.2023.102789. The
    method is theirs; the transforms and their ranges are our own.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log, radians
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.networks.layers import separable_filtering
from monai.transforms import MapTransform, Orientationd, RandomizableTransform
from monai.transforms.utils import create_rotate, create_shear
from numpy.typing import NDArray
from scipy import special
from torch.nn import functional

from pipeline.config import AXES, Spec, Synthesis
from pipeline.errors import ConfigError, GeometryError
from pipeline.io import SAME_GRID_MM, corner_distance, expand_variables
from pipeline.transforms.compose import TrainingTransform
from pipeline.transforms.intensity import normalisation
from pipeline.transforms.loading import LoadVolumed
from pipeline.transforms.preprocess import AXIS_LABELS, IMAGE, KEYS, LABEL
from pipeline.transforms.tissue_classes import (
    CENTRE,
    SPACING,
    TissueIndexd,
    TissueTable,
    read_tissue_table,
)

MAX_INTENSITY = 255.0  # the scale of the table's T1 intensities
BRIGHTEST = 99.9  # percentile of a scan's intensities above 0 that becomes `MAX_INTENSITY`
# T1 intensities at which a random function of T1 contrast is drawn: about the means of air, bone,
# fluid, grey matter, deep grey matter, brain stem and white matter
T1_KNOTS = (0.0, 25.0, 45.0, 90.0, 115.0, 135.0, 165.0)
FWHM = 2.355  # full width at half maximum of a Gaussian, in standard deviations
KERNEL_REACH = 4.0  # standard deviations at which a Gaussian kernel is cut off
# Points in a voxel whose tissues are averaged (partial volume), in voxels from its centre: every
# second corner of a cube of half the voxel's size
SAMPLE_POINTS = np.array([(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)]) / 4
# Unit vectors to the points that `inset` looks at: along the axes and diagonals of a cube
DIRECTIONS = np.vstack(
    [np.eye(3), -np.eye(3), (2 * np.array(list(np.ndindex(2, 2, 2))) - 1) / np.sqrt(3)]
)
CUT_FACE_CHANCE = 0.4  # per face of an image whose field of view is cut
BLACK_AIR_CHANCE = 0.25  # of a background that is exactly 0
LESION_CONTRAST_CHANCE = 0.5  # of lesions whose intensity does not depend on the tissue's


def synthesis_transform(
    spec: Spec, options: Synthesis, device: torch.device | None = None
) -> TrainingTransform:
    """Return the transform from the file of a label map to a synthetic image with its labels.

    Loading the label map is deterministic and can be cached; the image is synthesised anew each
    time.

    Args:
        spec: gives labels, orientation, spacing, size and normalisation of the images.
        options: probabilities and ranges of the synthesis.
        device: device that keeps the label maps and synthesises the images; None is the CPU.

    Raises:
        ConfigError: the network is not a 3D network with one channel and a spacing in mm, or the
            tissue table cannot be read.
    """
    if spec.spatial_dims != 3 or None in spec.spacing or len(spec.channels) != 1:
        raise ConfigError(
            "run.synthesis: expected a spec with one channel, a 3D roi_size and a spacing in mm "
            "along every axis"
        )
    table = read_tissue_table(expand_variables(options.table), spec.labels)
    centred_on, inset, inset_from = (
        _channels_of(spec, key, names)
        for key, names in (
            ("centred_on", options.centred_on),
            ("inset", options.inset),
            ("inset_from", options.inset_from),
        )
    )
    for value in {*options.lesions, *options.lesions.values()} - set(table.values.tolist()):
        raise ConfigError(f"run.synthesis.lesions: expected values of the table, got {value}")
    spacing = [float(mm) for mm in spec.spacing if mm is not None]
    return TrainingTransform(
        deterministic=[
            LoadVolumed(KEYS),
            Orientationd(
                KEYS,
                axcodes=spec.orientation,
                labels=AXIS_LABELS,
                allow_missing_keys=True,
            ),
            ScanIntensityd(IMAGE, device),
            TissueIndexd(LABEL, table, device, centred_on),
        ],
        random=[
            RandSynthesized(
                table,
                spec.roi_size,
                spacing,
                options,
                orientation=spec.orientation,
                inset=inset,
                inset_from=inset_from,
            ),
            normalisation(spec, IMAGE, device),
        ],
    )


def _channels_of(spec: Spec, key: str, names: Sequence[str]) -> list[int]:
    """Return the channel numbers of structures that an option of the synthesis names."""
    unknown = [name for name in names if name not in spec.labels]
    if unknown:
        raise ConfigError(
            f"run.synthesis.{key}: expected names of structures, got {', '.join(unknown)}"
        )
    return [list(spec.labels).index(name) for name in names]


class ScanIntensityd(MapTransform):
    """Scale the intensities of a label map's scan to 0 to `MAX_INTENSITY`.

    Args:
        keys: key of the scan, (1, X, Y, Z); a case without one stays as it is.
        device: device of the result; None is the CPU.

    Raises:
        GeometryError: scan and label map do not lie on one grid.
    """

    def __init__(self, keys: KeysCollection, device: torch.device | None = None) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.device = device

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            scan, label_map = case[key], case[LABEL]
            same_shape = scan.shape[1:] == label_map.shape[1:]
            affines = (np.asarray(scan.affine), np.asarray(label_map.affine))
            apart_mm = corner_distance(*affines, tuple(scan.shape[1:]))
            if not same_shape or apart_mm > SAME_GRID_MM:
                raise GeometryError(
                    f"{case.get('case')}: expected the scan on the grid of its label map, found "
                    f"{tuple(scan.shape[1:])} and {tuple(label_map.shape[1:])} voxels, up to "
                    f"{apart_mm:.2f} mm apart"
                )
            voxels = scan.as_tensor().clamp(min=0)
            head = voxels[voxels > 0].numpy()
            highest = float(np.percentile(head, BRIGHTEST)) if head.size else 1.0
            case[key] = (voxels * (MAX_INTENSITY / highest)).to(self.device)
        return case


@dataclass(frozen=True, kw_only=True, slots=True)
class Deformation:
    """Where each voxel of a synthetic image lies in its label map.

    Attributes:
        position: (3, *roi_size) positions of the voxels' centres, voxels of the label map.
        matrix: (3, 3) linear map from an offset in the image, mm, to one in the label map, voxels.
        mirrored: whether left and right are swapped.
    """

    position: torch.Tensor
    matrix: NDArray[np.float64]
    mirrored: bool


class RandSynthesized(RandomizableTransform, MapTransform):
    """Synthesise a random image, and the labels that belong to it, from a label map.

    Of a case with a scan, `scan_chance` of the images show the scan instead of drawn intensities,
    deformed with the labels. Resolution, noise, bias field and gamma are random there too.

    Args:
        table: tissue table of the label maps.
        roi_size: size of the image, voxels.
        spacing: voxel size of the image, mm.
        options: probabilities and ranges of the synthesis.
        orientation: axis codes of label maps and images, such as `RAS`.
        inset: channel numbers of the structures in `options.inset`.
        inset_from: channel numbers of the tissues in `options.inset_from`.

    Shapes:
        a case from `TissueIndexd`, with `label` (1, X, Y, Z) rows of the table, `centre`,
        `spacing` and perhaps `image` (1, X, Y, Z), its scan → `image` (1, *roi_size) float32
        intensities and `label` (1, *roi_size) float32 channel numbers.
    """

    def __init__(
        self,
        table: TissueTable,
        roi_size: Sequence[int],
        spacing: Sequence[float],
        options: Synthesis,
        *,
        orientation: str = "RAS",
        inset: Sequence[int] = (),
        inset_from: Sequence[int] = (),
    ) -> None:
        MapTransform.__init__(self, LABEL)
        RandomizableTransform.__init__(self, 1.0)
        self.table, self.options = table, options
        self.inset, self.inset_from = np.array(inset), np.array(inset_from)
        self.left_right_axis = [AXES[code] for code in orientation].index(AXES["R"])
        self.up = np.array([{"S": 1.0, "I": -1.0}.get(code, 0.0) for code in orientation])
        self.roi_size, self.spacing = tuple(roi_size), np.asarray(spacing, dtype=np.float64)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        label_map = case[LABEL][0]
        centre, spacing = case.pop(CENTRE).numpy(), case.pop(SPACING).numpy()
        # noise is drawn on the device, by a generator that this transform's random state seeds
        noise = torch.Generator(device=label_map.device).manual_seed(int(self.R.randint(2**31)))
        deformation = self._draw_deformation(label_map.device, centre, spacing)
        sample_mm = SAMPLE_POINTS * self.spacing
        rows = self._deformed_rows(label_map, deformation, np.vstack([np.zeros(3), sample_mm]))
        scan = case.pop(IMAGE, None)
        if scan is not None and self._happens(self.options.scan_chance):
            steps = sample_mm @ deformation.matrix.T
            values = [linear_values(scan[0], deformation.position, step) for step in steps]
            image = torch.stack(values).mean(dim=0)
            self._cut_field_of_view(rows, image)
            image = self._acquired(image, noise, blur_native=False)
        else:
            self._cut_field_of_view(rows)
            self._draw_lesions(rows)
            image = self._painted(rows[1:], noise)
            image = self._acquired(image, noise)
        channels = on_device(self.table.channels, rows.device)[rows[0]]
        if self.options.inset:
            channels = self._inset(channels, label_map, deformation)
        if self._happens(self.options.strip_chance):
            channels, image = self._skull_stripped(rows, channels, image)
        return case | {IMAGE: image[None], LABEL: channels[None].float()}

    def _happens(self, chance: float) -> bool:
        """Return True with the given probability."""
        return bool(self.R.rand() < chance)

    def _draw_deformation(
        self, device: torch.device, centre: NDArray[np.float64], spacing: NDArray[np.float64]
    ) -> Deformation:
        """Return a random affine and elastic deformation, perhaps with a reflection.

        Args:
            device: device of the positions.
            centre: (3,) mean position of the structures, voxels of the label map.
            spacing: (3,) voxel size of the label map, mm.
        """
        options = self.options
        # do not reorder: the result of a seed depends on the order of the random draws
        angles = self.R.uniform(-1, 1, 3) * radians(options.rotation)
        rotation = create_rotate(3, angles)[:3, :3]
        shear = create_shear(3, self.R.uniform(-options.shear, options.shear, 6))[:3, :3]
        scale = np.diag(np.exp(self.R.uniform(-1, 1, 3) * log(1 + options.scaling)))
        mirrored = self._happens(0.5)
        reflection = np.eye(3)
        if mirrored:
            reflection[self.left_right_axis, self.left_right_axis] = -1
        # linear map from mm, relative to the image's centre, to voxels of the label map
        matrix = np.diag(1 / spacing) @ rotation @ shear @ scale @ reflection
        shift = self.R.uniform(-1, 1, 3) * options.shift
        if self._happens(options.neck_chance):
            shift = shift - self.up * self.R.uniform(0, options.neck)
        sigma_mm = self.R.uniform(0, options.elastic)
        displacement = self._smooth_field(3, options.elastic_every, device) * sigma_mm
        if options.fine_elastic:
            sigma_mm = self.R.uniform(0, options.fine_elastic)
            displacement += self._smooth_field(3, options.fine_elastic_every, device) * sigma_mm
        position = self._positions(matrix, centre + shift / spacing, displacement, spacing)
        for _ in range(options.magnifications):
            self._magnify(position, centre, spacing)
        return Deformation(position=position, matrix=matrix, mirrored=mirrored)

    def _deformed_rows(
        self, label_map: torch.Tensor, deformation: Deformation, offsets_mm: NDArray[np.float64]
    ) -> torch.Tensor:
        """Return a label map after a deformation, with the sides of structures swapped if mirrored.

        Args:
            label_map: (X, Y, Z) rows of the table.
            deformation: where each voxel of the image lies in the label map.
            offsets_mm: (N, 3) points, relative to the centre of each voxel of the image, mm.

        Returns:
            (N, *roi_size) rows of the table, at these points of each voxel.
        """
        steps = offsets_mm @ deformation.matrix.T
        rows = torch.stack([nearest_values(label_map, deformation.position, s) for s in steps])
        if deformation.mirrored:
            rows = on_device(self.table.mirror, rows.device)[rows]
        return rows

    def _inset(
        self, channels: torch.Tensor, label_map: torch.Tensor, deformation: Deformation
    ) -> torch.Tensor:
        """Return channel numbers in which some structures end before the border of the image.

        A voxel of a structure in `inset` gets the tissue of `inset_from` that any of the
        `DIRECTIONS` leads to within `inset_mm`.

        Args:
            channels: (*roi_size) channel numbers, which are changed.
            label_map: (X, Y, Z) rows of the table.
            deformation: where each voxel of the image lies in the label map.
        """
        is_inset = torch.isin(channels, on_device(self.inset, channels.device))
        tissues = on_device(self.inset_from, channels.device)
        position = deformation.position[:, is_inset][:, :, None, None]
        rows = self._deformed_rows(
            label_map, replace(deformation, position=position), DIRECTIONS * self.options.inset_mm
        )
        found = channels[is_inset]
        for near in on_device(self.table.channels, channels.device)[rows[..., 0, 0]]:
            found = torch.where(torch.isin(near, tissues), near, found)
        channels[is_inset] = found
        return channels

    def _positions(
        self,
        matrix: NDArray[np.float64],
        centre: NDArray[np.float64],
        displacement: torch.Tensor,
        spacing: NDArray[np.float64],
    ) -> torch.Tensor:
        """Return the position of each voxel of the image in the label map.

        Args:
            matrix: (3, 3) linear map from mm, relative to the image's centre, to voxels of the
                label map.
            centre: (3,) position of the image's centre, voxels of the label map.
            displacement: (3, *roi_size) elastic displacement of each voxel, mm.
            spacing: (3,) voxel size of the label map, mm.

        Returns:
            (3, *roi_size) positions, voxels of the label map.
        """
        lengths = zip(self.roi_size, self.spacing, strict=True)
        axes = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in lengths]
        device = displacement.device
        position = displacement * _per_axis(1 / spacing, device) + _per_axis(centre, device)
        for dim in range(3):
            along = (matrix[:, dim, None] * axes[dim]).astype(np.float32)
            position += on_device(along, device).view(3, *(-1 if i == dim else 1 for i in range(3)))
        return position

    def _magnify(
        self, position: torch.Tensor, centre: NDArray[np.float64], spacing: NDArray[np.float64]
    ) -> None:
        """Magnify or shrink the surroundings of a random point near the structures, in place.

        Distances from the point are divided by 1 - a exp(-r² / 2s²), where r is the distance, s a
        random reach and a the strength; with -1 < a < 1 the map is one to one.

        Args:
            position: (3, *roi_size) position of each voxel, voxels of the label map.
            centre: (3,) mean position of the structures, voxels of the label map.
            spacing: (3,) voxel size of the label map, mm.
        """
        options = self.options
        offset = self.R.uniform(-1, 1, 3) * options.magnified_within
        reach_mm = self.R.uniform(*options.magnified_mm)
        strength = self.R.uniform(-1, 1) * options.magnification
        distance = position - _per_axis(centre + offset / spacing, position.device)
        in_mm = distance * _per_axis(spacing, position.device)
        factor = in_mm.square_().sum(dim=0).mul_(-0.5 / reach_mm**2).exp_().mul_(-strength)
        position.addcmul_(distance, factor)

    def _draw_lesions(self, rows: torch.Tensor) -> None:
        """Randomly turn parts of tissues into their lesions, in place.

        Args:
            rows: (1 + sample points, *roi_size) rows of the table, from `_deformed_rows`.
        """
        options = self.options
        if not options.lesions or not self._happens(options.lesion_chance):
            return
        field = self._smooth_field(1, self.R.uniform(*options.lesion_mm), rows.device)[0]
        share = self.R.uniform(0, options.lesion_share)
        threshold = torch.quantile(field.flatten(), 1 - share)
        lesion_of = np.arange(len(self.table.values))
        for tissue, lesion in options.lesions.items():
            lesion_of[self._row_of(tissue)] = self._row_of(lesion)
        lesions = on_device(lesion_of, rows.device)[rows]
        torch.where(field > threshold, lesions, rows, out=rows)

    def _row_of(self, value: int) -> int:
        return int(np.flatnonzero(self.table.values == value)[0])

    def _smooth_field(
        self, count: int, every_mm: float, device: torch.device | None = None
    ) -> torch.Tensor:
        """Return smooth random fields, (count, *roi_size).

        The values at control points have a standard normal distribution; between them they are
        interpolated linearly.

        Args:
            count: number of fields.
            every_mm: distance between control points, mm.
            device: device of the fields; None is the CPU.
        """
        points = [
            max(2, round(n * mm / every_mm) + 1)
            for n, mm in zip(self.roi_size, self.spacing, strict=True)
        ]
        coarse = self.R.normal(size=(count, *points)).astype(np.float32)
        return _resized(on_device(coarse, device), self.roi_size)

    def _cut_field_of_view(self, *volumes: torch.Tensor) -> None:
        """Randomly set the outer voxels at some faces of the image to background, in place.

        Args:
            volumes: each (..., *roi_size); all of them are cut alike.
        """
        if not self._happens(self.options.cut_chance):
            return
        for axis, size in enumerate(self.roi_size):
            first, last = self._cut_width(size), self._cut_width(size)
            for volume in volumes:
                volume.narrow(axis - 3, 0, first).zero_()
                volume.narrow(axis - 3, size - last, last).zero_()

    def _cut_width(self, size: int) -> int:
        """Return the random number of voxels that are cut off at one face of an axis."""
        if not self._happens(CUT_FACE_CHANCE):
            return 0
        return round(float(size * self.R.uniform(0, self.options.cut)))

    def _painted(self, rows: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
        """Return the intensities of the image, (*roi_size), before blur, noise and bias field.

        Each tissue class has normally distributed intensities. The mean and the standard deviation
        of a voxel are those of the classes at its sample points, averaged.

        Args:
            rows: (sample points, *roi_size) rows of the table.
            noise: generator of the normally distributed numbers.
        """
        mean, deviation = self._draw_contrast()
        of_class = (np.stack([mean, deviation]) / len(rows)).astype(np.float32)
        of_row = on_device(of_class[:, self.table.classes], rows.device)
        total = of_row[:, rows[0]]
        for point in rows[1:]:
            total += of_row[:, point]
        texture = torch.randn(self.roi_size, generator=noise, device=rows.device)
        return total[0].addcmul_(total[1], texture)

    def _draw_contrast(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return random intensities: mean and standard deviation of each tissue class, (classes,).

        The means are those of T1-weighted images, or a random function of them, or independent of
        them. With the function, tissues with similar intensities in T1 have similar intensities,
        as in sequences such as T2, FLAIR and proton density.
        """
        options, t1 = self.options, self.table.t1
        mean = t1[:, 0] + self.R.normal(size=len(t1)) * t1[:, 1]
        deviation = np.abs(t1[:, 2] + self.R.normal(size=len(t1)) * t1[:, 3])
        kind = self.R.rand()
        if kind >= options.t1_chance:
            deviation = np.minimum(deviation, MAX_INTENSITY / 8) * self.R.uniform(0.2, 1.2)
            if kind < options.t1_chance + options.sequence_chance:
                values = self.R.uniform(0, MAX_INTENSITY, len(T1_KNOTS))
                mean = np.interp(mean, T1_KNOTS, values)
            else:
                mean = self.R.uniform(0, MAX_INTENSITY, len(t1))
            for lesion in options.lesions.values():  # bright or dark, whatever the tissue is
                if self._happens(LESION_CONTRAST_CHANCE):
                    mean[self.table.classes[self._row_of(lesion)]] = self.R.uniform(
                        0, MAX_INTENSITY
                    )
            if self._happens(0.5):  # air is dark in most sequences
                mean[0], deviation[0] = self.R.uniform(0, 15), self.R.uniform(0, 8)
        if self._happens(BLACK_AIR_CHANCE):
            mean[0] = deviation[0] = 0.0
        return mean, deviation * self.R.uniform(options.texture, 1.0)

    def _acquired(
        self, image: torch.Tensor, noise: torch.Generator, *, blur_native: bool = True
    ) -> torch.Tensor:
        """Return the image with the effects of a random acquisition.

        These are blur, coarser voxels or thick slices (not always), noise, a bias field and a gamma
        transform. The result has intensities from 0 to `MAX_INTENSITY`.

        Args:
            image: (*roi_size) intensities.
            noise: generator of the noise.
            blur_native: whether an image whose resolution is not coarser is blurred too; a scan is
                blurred already.
        """
        options = self.options
        ratio = np.maximum(1.0, self._draw_resolution() / self.spacing)
        sigma = ratio / FWHM * self.R.uniform(0.8, 1.2)
        # the mean over the sample points has blurred the image already: its variance is that of
        # their positions, and is subtracted
        is_coarser = bool((ratio > 1.05).any())
        if blur_native or is_coarser:
            image = gaussian_smooth(image, np.sqrt(sigma**2 - (SAMPLE_POINTS**2).mean()))
        noise_level = self.R.uniform(0, options.noise) * MAX_INTENSITY
        size = list(self.roi_size)
        if is_coarser:
            size = [max(2, round(n / r)) for n, r in zip(self.roi_size, ratio, strict=True)]
            image = _resized(image[None], size)[0]
        image += noise_level * torch.randn(size, generator=noise, device=image.device)
        if is_coarser:
            image = _resized(image[None], self.roi_size)[0]
        bias = self._smooth_field(1, options.bias_every, image.device)[0]
        bias *= self.R.uniform(0, options.bias)
        image = image.clamp_(min=0) * bias.exp_()
        highest = image.amax().clamp(min=1e-6)  # an empty image stays 0
        gamma = float(np.exp(self.R.normal() * options.gamma))
        return (image / highest).pow_(gamma) * MAX_INTENSITY

    def _draw_resolution(self) -> NDArray[np.float64]:
        """Return the random voxel size of the acquisition, (3,) mm."""
        options = self.options
        resolution_mm = self.spacing.copy()
        if self._happens(options.resolution_chance):
            resolution_mm = self.R.uniform(*options.resolution_mm, size=3)
        if self._happens(options.slices_chance):
            resolution_mm[self.R.randint(3)] = self.R.uniform(*options.slices_mm)
        return resolution_mm

    def _skull_stripped(
        self, rows: torch.Tensor, channels: torch.Tensor, image: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return channel numbers and image with everything but the structures set to 0.

        Half of the images also lose the fluid around the brain. Voxels at a border are multiplied
        by the fraction of their sample points that is kept.

        Args:
            rows: (1 + sample points, *roi_size) rows of the table, from `_deformed_rows`.
            channels: (*roi_size) channel numbers.
            image: (*roi_size) intensities.
        """
        is_fluid = np.isin(self.table.values, self.options.outer_fluid)
        is_kept = self.table.channels > 0
        if self._happens(0.5):
            is_kept &= ~is_fluid
        kept = on_device(is_kept, rows.device)[rows]
        return channels * kept[0], image * kept[1:].float().mean(dim=0)


def nearest_values(
    label_map: torch.Tensor, position: torch.Tensor, step: NDArray[np.float64]
) -> torch.Tensor:
    """Return the values of a label map at positions, by nearest neighbours.

    Args:
        label_map: (X, Y, Z) label map.
        position: (3, *spatial) positions, voxels.
        step: (3,) offset that is added to all positions, voxels.

    Returns:
        (*spatial) int64 values; 0 for positions outside the label map.
    """
    sizes = np.array(label_map.shape)
    steps_to_next = np.array([sizes[1] * sizes[2], sizes[2], 1])
    voxel = (position + _per_axis(step, position.device)).round_()
    kept = torch.minimum(voxel.clamp(min=0), _per_axis(sizes - 1, position.device))
    inside = (kept == voxel).all(dim=0)
    index = (kept.long() * on_device(steps_to_next, position.device).view(3, 1, 1, 1)).sum(dim=0)
    return label_map.flatten()[index].long() * inside


def linear_values(
    volume: torch.Tensor, position: torch.Tensor, step: NDArray[np.float64]
) -> torch.Tensor:
    """Return the values of a volume at positions, by linear interpolation.

    Args:
        volume: (X, Y, Z) intensities.
        position: (3, *spatial) positions, voxels.
        step: (3,) offset that is added to all positions, voxels.

    Returns:
        (*spatial) intensities; 0 for positions outside the volume.
    """
    scale = 2 / np.maximum(np.array(volume.shape) - 1, 1)
    offset = _per_axis(step * scale - 1, position.device)
    grid = torch.addcmul(offset, position, _per_axis(scale, position.device))
    grid = grid.flip(0).movedim(0, -1)  # grid_sample counts axes from the last one
    sampled = functional.grid_sample(volume[None, None], grid[None], align_corners=True)
    return sampled[0, 0]


def _per_axis(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return one number per axis, (3,), as a float32 tensor that fits (3, *spatial)."""
    return on_device(values.astype(np.float32), device).view(3, 1, 1, 1)


def gaussian_smooth(x: torch.Tensor, sigma: Sequence[float] | NDArray[np.float64]) -> torch.Tensor:
    """Return a volume convolved with a Gaussian; the values at its edge are repeated beyond it.

    Args:
        x: (X, Y, Z) volume.
        sigma: standard deviation along each axis, voxels.
    """
    kernels = [on_device(discrete_gaussian(float(s)), x.device) for s in sigma]
    smoothed: torch.Tensor = separable_filtering(x[None, None], kernels, mode="replicate")
    return smoothed[0, 0]


def discrete_gaussian(sigma: float) -> NDArray[np.float32]:
    """Return the kernel of the discrete Gaussian, (2n + 1,), with a sum of 1.

    It has the right variance for small sigmas too. MONAI's `gaussian_1d(approx="scalespace")` is
    the same kernel, from so many operations on single numbers that they took half of the time of
    an image on a GPU.

    Args:
        sigma: standard deviation, voxels.

    References:
        Lindeberg: Scale-space for discrete signals. IEEE TPAMI 12(3), 1990, doi:10.1109/34.49051.
    """
    reach = int(max(sigma * KERNEL_REACH, 0.5) + 0.5)
    kernel = special.ive(np.abs(np.arange(-reach, reach + 1)), sigma**2)
    normalised: NDArray[np.float32] = (kernel / kernel.sum()).astype(np.float32)
    return normalised


def on_device(values: NDArray[Any], device: torch.device | None = None) -> torch.Tensor:
    """Return an array as a tensor on a device.

    The copy to a GPU does not wait for what the GPU has yet to compute.

    Args:
        values: array of any shape.
        device: device of the tensor; None is the CPU.
    """
    tensor = torch.from_numpy(values)
    if device is None or device.type == "cpu":
        return tensor
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _resized(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return a volume (C, X, Y, Z) interpolated to a size, with aligned corner voxels."""
    resized = functional.interpolate(x[None], size=list(size), mode="trilinear", align_corners=True)
    return resized[0]
