"""Test-time augmentation: averages over mirrored windows and over rotated volumes.

References:
    Ronneberger, Fischer, Brox: U-Net. MICCAI 2015, doi:10.1007/978-3-319-24574-4_28: the average
    over seven rotated versions of the input gave the result on the electron microscopy stacks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, cos, hypot, pi, sin
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch.nn import functional

from pipeline.config import AXES, Spec
from pipeline.errors import ConfigError
from pipeline.inference.decision_agreement import DecisionAgreement
from pipeline.inference.multi_output import map_tensors
from pipeline.transforms import mirror_padded_box
from pipeline.types import NetworkFunction

OTHER_SIDE = {
    "left": "right",
    "Left": "Right",
    "LEFT": "RIGHT",
    "right": "left",
    "Right": "Left",
    "RIGHT": "LEFT",
}
# whole words only: `ctx_left_a` has a side, `cleft` has none
SIDE_WORD = re.compile(rf"(?<![A-Za-z])({'|'.join(OTHER_SIDE)})(?![A-Za-z])")
MIN_PROBABILITY = 1e-7  # lower bound of a mean probability, so that its logarithm is finite


@dataclass(frozen=True, kw_only=True, slots=True)
class Mirroring:
    """The mirror images of a window over which the network's output is averaged.

    Attributes:
        axes: spatial axes of the window along which it is flipped, in all combinations.
        sides: the one of these axes that runs from left to right; None if none does.
        order: for each output channel, the channel of the same structure on the other side. If a
            window is flipped along `sides`, channel `order[i]` of its output is channel i of the
            window itself.
    """

    axes: tuple[int, ...]
    sides: int | None = None
    order: tuple[int, ...] = ()


def mirroring_of(spec: Spec) -> Mirroring | None:
    """Return the mirror images that `spec.tta_mirror` asks for, or None for no mirror images.

    Raises:
        ConfigError: a left or right label has no counterpart on the other side.
    """
    if not spec.tta_mirror:
        return None
    window_axes = [AXES[code] for i, code in enumerate(spec.orientation) if i != spec.slice_dim]
    axes = tuple(window_axes.index(AXES[direction]) for direction in spec.tta_mirror)
    if "R" not in spec.tta_mirror:
        return Mirroring(axes=axes)
    sides = window_axes.index(AXES["R"])
    return Mirroring(axes=axes, sides=sides, order=counterparts(spec.outputs))


def other_side(name: str) -> str:
    """Return the name of a structure on the other side; a name without a side as it is."""
    return SIDE_WORD.sub(lambda match: OTHER_SIDE[match[0]], name)


def side_of(name: str) -> str:
    """Return `left` or `right`; empty for the name of a structure without a side."""
    match = SIDE_WORD.search(name)
    return match[0].lower() if match else ""


def counterparts(names: Sequence[str]) -> tuple[int, ...]:
    """Return, for each name, the index of its counterpart on the other side of the body.

    `left x` and `right x` are counterparts. A name without a side is its own counterpart.

    Raises:
        ConfigError: a name with a side has no counterpart in `names`.
    """
    mirrored = [other_side(name) for name in names]
    lonely = [name for name, other in zip(names, mirrored, strict=True) if other not in names]
    if lonely:
        raise ConfigError(
            "spec.tta_mirror: expected each side's labels on the other side too, got only "
            f"{', '.join(lonely)}"
        )
    return tuple(names.index(other) for other in mirrored)


def average_mirrored(
    network: NetworkFunction,
    mirroring: Mirroring | None,
    agreement: DecisionAgreement | None = None,
) -> NetworkFunction:
    """Return a network whose output is the mean over a window and its mirror images.

    Args:
        network: network, (B, C, *spatial) → (B, classes, *spatial), one tensor or several.
        mirroring: mirror images; None returns the network itself.
        agreement: counts how well the images agree, for a network of one output; None counts
            nothing.
    """
    if mirroring is None:
        return network
    combinations = []
    for flips in product((False, True), repeat=len(mirroring.axes)):
        combinations.append(
            [axis for axis, flip in zip(mirroring.axes, flips, strict=True) if flip]
        )

    def averaged(patch: torch.Tensor) -> Any:
        total, decisions = None, []
        for axes in combinations:
            output = network(patch.flip([axis + 2 for axis in axes]))
            # divided before they are summed, so that float16 does not overflow
            part = map_tensors(
                lambda scores, axes=axes: _unmirror(scores, axes, mirroring) / len(combinations),
                output,
            )
            if agreement is not None and isinstance(part, torch.Tensor):
                decisions.append(agreement.decision(part))
            total = part if total is None else map_tensors(torch.add, total, part)
        if agreement is not None and decisions:
            agreement.add(decisions, part.shape[1])
        return total

    return averaged


def _unmirror(scores: torch.Tensor, axes: Sequence[int], mirroring: Mirroring) -> torch.Tensor:
    """Return the scores of a flipped window as scores of the window itself.

    Args:
        scores: (B, classes, *spatial) scores of the window flipped along `axes`.
        axes: spatial axes of the flip.
        mirroring: gives the left-right axis and the order of channels.
    """
    scores = scores.flip([axis + 2 for axis in axes])
    return scores[:, list(mirroring.order)] if mirroring.sides in axes else scores


class RotationInferer(Inferer):
    """An inferer that averages probabilities over rotated versions of a volume.

    The versions are rotated in one plane, by multiples of 360° / rotations. The volume is first
    extended by mirroring, so that rotating loses no corner. A MetaTensor is rotated in mm, by its
    spacing, a plain tensor in voxels.

    Args:
        inferer: inferer that segments each version.
        rotations: number of versions, including the unrotated one.
        axis: array axis to rotate about, 0 to 2.
        regions: whether the structures are regions, which may overlap: the sigmoid of their logit
            minus that of the background is then averaged.

    Shapes:
        (B, C, X, Y, Z) → logits (B, classes, X, Y, Z) whose softmax (or sigmoid) is the mean
        probability.
    """

    def __init__(
        self, inferer: Inferer, rotations: int, axis: int, *, regions: bool = False
    ) -> None:
        self.inferer, self.rotations, self.axis = inferer, rotations, axis
        self.regions = regions
        self.overlap = getattr(inferer, "overlap", 0.0)

    def __call__(
        self, inputs: torch.Tensor, network: NetworkFunction, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        plane = [i + 2 for i in range(3) if i != self.axis]
        spacing = _spacing(inputs)
        plane_spacing = [spacing[i - 2] for i in plane]
        x = torch.as_tensor(inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs)
        x = x.movedim(plane, (-2, -1))  # (B, C, slices, H, W)
        height, width = x.shape[-2:]
        top, left = _rotation_margins([height, width], plane_spacing)
        extended = mirror_padded_box(x, [-top, -left], [height + 2 * top, width + 2 * left])

        def probabilities(angle: float) -> torch.Tensor:
            rotated = rotate_plane(extended, angle, plane_spacing).movedim((-2, -1), plane)
            logits = self.inferer(rotated, network).movedim(plane, (-2, -1))
            logits = logits.float()
            if self.regions:
                fields = torch.sigmoid(logits - logits[:, :1])
            else:
                fields = torch.softmax(logits, dim=1)
            upright = rotate_plane(fields, -angle, plane_spacing)
            return upright[..., top : top + height, left : left + width]

        total = probabilities(0.0)
        for k in range(1, self.rotations):
            total = total + probabilities(2 * pi * k / self.rotations)
        mean = total / self.rotations
        if self.regions:  # 0 for the background, whose sigmoid is 0.5
            return torch.logit(mean, eps=MIN_PROBABILITY).movedim((-2, -1), plane)
        return torch.log(mean.clamp(min=MIN_PROBABILITY)).movedim((-2, -1), plane)


def rotate_plane(x: torch.Tensor, angle: float, spacing: Sequence[float]) -> torch.Tensor:
    """Return images rotated about their centre, with linear interpolation and mirrored borders.

    Args:
        x: (…, H, W) float32 images.
        angle: angle of the rotation, radians.
        spacing: voxel size along H and W, mm.
    """
    if angle == 0:
        return x
    height, width = x.shape[-2:]
    # affine_grid has coordinates from -1 to 1 along both axes: a rotation in mm is scaled by half
    # the length of each axis, mm
    half_height = max(1, height - 1) * spacing[0] / 2
    half_width = max(1, width - 1) * spacing[1] / 2
    c, s = cos(angle), sin(angle)
    theta = torch.tensor(
        [[c, -s * half_height / half_width, 0.0], [s * half_width / half_height, c, 0.0]],
        dtype=x.dtype,
        device=x.device,
    )
    flat = x.reshape(1, -1, height, width)
    grid = functional.affine_grid(theta[None], list(flat.shape), align_corners=True)
    rotated = functional.grid_sample(flat, grid, padding_mode="reflection", align_corners=True)
    return rotated.reshape(x.shape)


def average_rotations(spec: Spec, inferer: Inferer) -> Inferer:
    """Return an inferer that averages over the rotations that `spec.tta_rotations` asks for.

    For a 2D network slices are rotated in their plane, for a 3D network the volume about the
    inferior-superior axis.

    Args:
        spec: gives `tta_rotations`; with 1, the inferer itself is returned.
        inferer: inferer that segments each rotated version.
    """
    if spec.tta_rotations == 1:
        return inferer
    vertical = next(i for i, code in enumerate(spec.orientation) if code in "SI")
    axis = vertical if spec.slice_dim is None else spec.slice_dim
    return RotationInferer(inferer, spec.tta_rotations, axis, regions=spec.output == "regions")


def _spacing(inputs: torch.Tensor) -> list[float]:
    """Return the spacing along the three spatial axes, mm; 1 where it is unknown."""
    if not isinstance(inputs, MetaTensor):
        return [1.0, 1.0, 1.0]
    affine = np.asarray(inputs.affine, dtype=np.float64)
    affine = affine[0] if affine.ndim == 3 else affine  # a batch has one affine per item
    return [float(n) for n in np.linalg.norm(affine[:3, :3], axis=0)]


def _rotation_margins(size: Sequence[int], spacing: Sequence[float]) -> list[int]:
    """Return how many voxels to add at each end of H and W, so that rotating loses no corner.

    Args:
        size: (H, W) size of the image, voxels.
        spacing: voxel size along H and W, mm.
    """
    diagonal = hypot(*((n - 1) * mm for n, mm in zip(size, spacing, strict=True)))
    margins = []
    for n, mm in zip(size, spacing, strict=True):
        margins.append(max(0, ceil((diagonal / mm - (n - 1)) / 2)))
    return margins
