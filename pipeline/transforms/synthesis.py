"""Training images drawn from label maps alone: any contrast, resolution and field of view, and never the same one twice.

References:
    Billot et al.: SynthSeg: Segmentation of brain MRI scans of any contrast and resolution without retraining. Medical Image
    Analysis 86, 102789 (2023), doi:10.1016/j.media.2023.102789: the idea. What is drawn, and from which ranges, is ours.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import log, radians
from typing import Any

import numpy as np
import torch
from monai.networks.layers import gaussian_1d, separable_filtering
from monai.transforms import Compose, MapTransform, Orientationd, RandomizableTransform
from monai.transforms.utils import create_rotate, create_shear
from numpy.typing import NDArray
from torch.nn import functional

from pipeline.config import AXES, Spec, Synthesis
from pipeline.errors import ConfigError
from pipeline.io import ReadVolumed, expand_variables
from pipeline.transforms.preprocess import AXIS_LABELS, IMAGE, LABEL, normalisation
from pipeline.transforms.tissue_classes import CENTRE, SPACING, TissueIndexd, Tissues, read_tissues

GREY = 255.0  # the scale of the priors
KNOTS = (
    0.0,
    25.0,
    45.0,
    90.0,
    115.0,
    135.0,
    165.0,
)  # T1 means: air, bone, fluid, grey, deep grey, brain-stem and white matter
FWHM = 2.355  # of a Gaussian, in standard deviations
REACH = 4.0  # standard deviations, of a Gaussian kernel
# places in a voxel, in voxels from its middle, whose tissues it mixes: every second corner of a cube of half its size
PARTS = np.array([(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)]) / 4


def synthesis_transform(
    spec: Spec, options: Synthesis, device: torch.device | None = None
) -> Compose:
    """From the file of a label map to a training image and its labels; reading can be cached, the rest is drawn each time.

    Args:
        spec: of the network: the labels it tells apart, its grid and its normalisation.
        options: what is drawn.
        device: where images are drawn, and where maps are kept.

    Raises:
        ConfigError: a spec that the images cannot follow, or no table of the maps' values.
    """
    if spec.spatial_dims != 3 or None in spec.spacing or len(spec.channels) != 1:
        raise ConfigError(
            "run.synthesis: expected a spec with one channel, a 3D roi_size and a spacing in mm along every axis"
        )
    tissues = read_tissues(expand_variables(options.table), spec.labels)
    spacing = [float(mm) for mm in spec.spacing if mm is not None]
    return Compose(
        [
            ReadVolumed(LABEL),
            Orientationd(LABEL, axcodes=spec.orientation, labels=AXIS_LABELS),
            TissueIndexd(LABEL, tissues, device),
            RandSynthesized(tissues, spec.roi_size, spacing, options, orientation=spec.orientation),
            normalisation(spec.intensity),
        ]
    )


class RandSynthesized(RandomizableTransform, MapTransform):
    """A label map → an image that nobody has taken, and the structures in it.

    Shapes: `label` (1, X, Y, Z) rows of a table (from `pipeline.tissues.TissueIndexd`, which also gives `centre` and
    `spacing`) → `image` (1, *roi_size) float32, grey values, and `label` (1, *roi_size) channel numbers, float32.

    Args:
        tissues: what the rows stand for.
        roi_size: of the image, voxels.
        spacing: of the image, mm.
        options: what is drawn from which range.
        orientation: axis codes of maps and images.
    """

    def __init__(
        self,
        tissues: Tissues,
        roi_size: Sequence[int],
        spacing: Sequence[float],
        options: Synthesis,
        *,
        orientation: str = "RAS",
    ) -> None:
        MapTransform.__init__(self, LABEL)
        RandomizableTransform.__init__(self, 1.0)
        self.tissues, self.options = tissues, options
        self.side = [AXES[code] for code in orientation].index(AXES["R"])
        self.up = np.array([{"S": 1.0, "I": -1.0}.get(code, 0.0) for code in orientation])
        self.roi_size, self.spacing = tuple(roi_size), np.asarray(spacing, dtype=np.float64)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        noise = torch.Generator(device=case[LABEL].device).manual_seed(int(self.R.randint(2**31)))
        seen = self._deformed(case[LABEL][0], case[CENTRE].numpy(), case[SPACING].numpy())
        self._cut(seen)
        channels = torch.as_tensor(self.tissues.channels, device=seen.device)[seen[0]]
        grey = self._painted(seen[1:], noise)
        grey = self._scanned(grey, noise)
        if self._chance(self.options.strip_chance):
            channels, grey = self._stripped(seen, channels, grey)
        return {key: value for key, value in case.items() if key not in (CENTRE, SPACING)} | {
            IMAGE: grey[None],
            LABEL: channels[None].float(),
        }

    def _chance(self, probability: float) -> bool:
        return bool(self.R.rand() < probability)

    def _deformed(
        self, rows: torch.Tensor, centre: NDArray[np.float64], spacing: NDArray[np.float64]
    ) -> torch.Tensor:
        """The map seen through a random affine and elastic deformation, mirrored or not.

        Returns:
            (1 + PARTS, *roi_size) row numbers: in the middle of each voxel of the image, and at places around it.
        """
        o = self.options
        turn = create_rotate(3, self.R.uniform(-1, 1, 3) * radians(o.rotation))[:3, :3]
        shear = create_shear(3, self.R.uniform(-o.shear, o.shear, 6))[:3, :3]
        scale = np.diag(np.exp(self.R.uniform(-1, 1, 3) * log(1 + o.scaling)))
        flipped = self._chance(0.5)
        reflect = np.diag([-1.0 if flipped and axis == self.side else 1.0 for axis in range(3)])
        matrix = np.diag(1 / spacing) @ turn @ shear @ scale @ reflect
        shift = self.R.uniform(-1, 1, 3) * o.shift
        if self._chance(o.neck_chance):
            shift = shift - self.up * self.R.uniform(0, o.neck)
        middle = centre + shift / spacing
        axes = [
            (torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * s
            for n, s in zip(self.roi_size, self.spacing, strict=True)
        ]
        field = self._field(self.R.uniform(0, o.elastic), o.elastic_every).to(rows.device)
        place = torch.stack(
            [field[axis] / float(spacing[axis]) + float(middle[axis]) for axis in range(3)]
        )
        for axis, dim in np.ndindex(3, 3):
            along = float(matrix[axis, dim]) * axes[dim].to(rows.device)
            place[axis] += along.view([-1 if i == dim else 1 for i in range(3)])
        steps = [np.zeros(3), *(matrix @ (part * self.spacing) for part in PARTS)]
        seen = torch.stack([nearest(rows, place, step) for step in steps])
        return torch.as_tensor(self.tissues.mirror, device=rows.device)[seen] if flipped else seen

    def _field(self, sigma: float, every: float) -> torch.Tensor:
        """(3, *roi_size): smooth random displacements with a standard deviation of sigma mm, drawn every so many mm."""
        return self._smooth(3, every) * sigma

    def _smooth(self, count: int, every: float) -> torch.Tensor:
        """(count, *roi_size): standard normal numbers on a grid of points so many mm apart, trilinear in between."""
        points = [
            max(2, round(n * s / every) + 1)
            for n, s in zip(self.roi_size, self.spacing, strict=True)
        ]
        coarse = torch.from_numpy(self.R.normal(size=(count, *points)).astype(np.float32))
        return functional.interpolate(
            coarse[None], size=self.roi_size, mode="trilinear", align_corners=True
        )[0]

    def _cut(self, seen: torch.Tensor) -> None:
        """Sometimes a field of view that ends within the head, at one or more of its faces."""
        if not self._chance(self.options.cut_chance):
            return
        for axis, size in enumerate(self.roi_size, start=1):
            lost = [
                round(float(size * self.R.uniform(0, self.options.cut))) if self._chance(0.4) else 0
                for _ in range(2)
            ]
            seen.narrow(axis, 0, lost[0]).zero_()
            seen.narrow(axis, size - lost[1], lost[1]).zero_()

    def _painted(self, seen: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
        """Grey values (*roi_size): each class from a Gaussian of its own, the mean of what a voxel holds."""
        mean, spread = self._contrast()
        values = torch.as_tensor(
            np.stack([mean, spread]) / len(seen), dtype=torch.float32, device=seen.device
        )
        values = values[:, torch.as_tensor(self.tissues.classes, device=seen.device)]
        total = values[:, seen[0]]
        for rows in seen[1:]:
            total += values[:, rows]
        texture = torch.randn(self.roi_size, generator=noise, device=seen.device)
        return total[0].addcmul_(total[1], texture)

    def _contrast(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of each class: as in T1 images, as some function of that, or anything.

        The function keeps tissues of the same T1 alike, as sequences do (T2, FLAIR and proton density among them).
        """
        o, t1 = self.options, self.tissues.t1
        mean = t1[:, 0] + self.R.normal(size=len(t1)) * t1[:, 1]
        spread = np.abs(t1[:, 2] + self.R.normal(size=len(t1)) * t1[:, 3])
        kind = self.R.rand()
        if kind >= o.t1_chance:
            spread = np.minimum(spread, GREY / 8) * self.R.uniform(0.2, 1.2)
            if kind < o.t1_chance + o.sequence_chance:
                mean = np.interp(mean, KNOTS, self.R.uniform(0, GREY, len(KNOTS)))
            else:
                mean = self.R.uniform(0, GREY, len(t1))
            if self._chance(0.5):
                mean[0], spread[0] = (
                    self.R.uniform(0, 15),
                    self.R.uniform(0, 8),
                )  # air is dark in most
        if self._chance(0.25):
            mean[0] = spread[0] = 0.0
        return mean, spread * self.R.uniform(o.texture, 1.0)

    def _scanned(self, grey: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
        """What a scanner makes of it: blurred, perhaps in thick slices, unevenly bright, noisy, with some gamma."""
        o = self.options
        mm = (
            self.R.uniform(*o.resolution_mm, size=3)
            if self._chance(o.resolution_chance)
            else self.spacing.copy()
        )
        if self._chance(o.slices_chance):
            mm[self.R.randint(3)] = self.R.uniform(*o.slices_mm)
        ratio = np.maximum(1.0, mm / self.spacing)
        wide = ratio / FWHM * self.R.uniform(0.8, 1.2)
        grey = smoothed(
            grey, np.sqrt(wide**2 - (PARTS**2).mean())
        )  # a voxel's parts have been averaged already
        noisy = self.R.uniform(0, o.noise) * GREY
        if (ratio > 1.05).any():
            size = [max(2, round(n / r)) for n, r in zip(self.roi_size, ratio, strict=True)]
            grey = functional.interpolate(
                grey[None, None], size=size, mode="trilinear", align_corners=True
            )[0, 0]
            grey += noisy * torch.randn(size, generator=noise, device=grey.device)
            grey = functional.interpolate(
                grey[None, None], size=self.roi_size, mode="trilinear", align_corners=True
            )[0, 0]
        else:
            grey += noisy * torch.randn(self.roi_size, generator=noise, device=grey.device)
        bias = self._smooth(1, o.bias_every)[0] * self.R.uniform(0, o.bias)
        grey = grey.clamp_(min=0) * bias.exp_().to(grey.device)
        top = grey.amax().clamp(min=1e-6)
        return (grey / top).pow_(float(np.exp(self.R.normal() * o.gamma))) * GREY

    def _stripped(
        self, seen: torch.Tensor, channels: torch.Tensor, grey: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Without what is no structure, as brain extraction leaves it; with or without the fluid around the brain."""
        fluid = np.isin(self.tissues.values, self.options.outer_fluid)
        kept = (self.tissues.channels > 0) & (~fluid if self._chance(0.5) else True)
        inside = torch.as_tensor(kept, device=seen.device)[seen]
        return channels * inside[0], grey * inside[1:].float().mean(dim=0)


def nearest(rows: torch.Tensor, place: torch.Tensor, step: NDArray[np.float64]) -> torch.Tensor:
    """The values of a map (X, Y, Z) at places (3, *spatial) moved by a step (3,), voxels; 0 beyond it. (*spatial) int64."""
    flat = torch.zeros(place.shape[1:], dtype=torch.int64, device=rows.device)
    inside = torch.ones_like(flat, dtype=torch.bool)
    for axis, size in enumerate(rows.shape):
        voxel = (place[axis] + float(step[axis])).round_().long()
        inside &= (voxel >= 0) & (voxel < size)
        flat = flat * size + voxel.clamp_(0, size - 1)
    return rows.flatten()[flat].long() * inside


def smoothed(x: torch.Tensor, sigma: Sequence[float] | NDArray[np.float64]) -> torch.Tensor:
    """(X, Y, Z) under a Gaussian of so many voxels along each axis; edge values go on beyond the edge."""
    kernels = [
        gaussian_1d(torch.tensor(float(s)), truncated=REACH, approx="scalespace", normalize=True)
        for s in sigma
    ]
    found: torch.Tensor = separable_filtering(
        x[None, None], [kernel.to(x) for kernel in kernels], mode="replicate"
    )
    return found[0, 0]
