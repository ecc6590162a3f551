"""Rotated versions of a volume, segmented and averaged.

References:
    Ronneberger, Fischer, Brox: U-Net. MICCAI 2015, doi:10.1007/978-3-319-24574-4_28: the average over seven rotated versions of
    the input gave the result on the electron microscopy stacks.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, cos, hypot, pi, sin
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch.nn import functional

from pipeline.config import Spec
from pipeline.transforms import mirror_padded_box

TINY = 1e-7  # a probability below it counts as this much, so that its logarithm is finite
Predict = Callable[..., torch.Tensor]


class RotationInferer(Inferer):
    """Averages the probabilities that an inferer gives for versions of a volume rotated in one plane, 360°/rotations apart.

    The volume is mirror-extended before it is turned, so that no corner is lost; it is turned in mm where its spacing is known.

    Args:
        inferer: what each version goes through.
        rotations: how many versions, the unrotated one among them.
        axis: 0 to 2, the array axis to turn about.

    Shapes: (B, C, X, Y, Z) → logits (B, classes, X, Y, Z) whose probabilities are the averages.
    """

    def __init__(self, inferer: Inferer, rotations: int, axis: int) -> None:
        self.inferer, self.rotations, self.axis = inferer, rotations, axis
        self.overlap = getattr(inferer, "overlap", 0.0)

    def __call__(
        self, inputs: torch.Tensor, network: Predict, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        plane = [i + 2 for i in range(3) if i != self.axis]
        spacing = _spacing(inputs)
        mm = [spacing[i - 2] for i in plane]
        x = torch.as_tensor(inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs)
        x = x.movedim(plane, (-2, -1))
        size = list(x.shape[-2:])
        pad = _margins(size, mm)
        wide = mirror_padded_box(
            x, [-p for p in pad], [n + 2 * p for n, p in zip(size, pad, strict=True)]
        )
        total: torch.Tensor | None = None
        for k in range(self.rotations):
            angle = 2 * pi * k / self.rotations
            logits = self.inferer(
                rotate_plane(wide, angle, mm).movedim((-2, -1), plane), network
            ).movedim(plane, (-2, -1))
            back = rotate_plane(torch.softmax(logits.float(), dim=1), -angle, mm)
            back = back[..., pad[0] : pad[0] + size[0], pad[1] : pad[1] + size[1]]
            total = back if total is None else total + back
        assert total is not None
        return torch.log((total / self.rotations).clamp(min=TINY)).movedim((-2, -1), plane)


def rotate_plane(x: torch.Tensor, angle: float, mm: list[float]) -> torch.Tensor:
    """(…, H, W) turned about its centre by linear interpolation, mirrored at its border.

    Args:
        x: float32.
        angle: radians.
        mm: spacing along H and W.
    """
    if angle == 0:
        return x
    height, width = x.shape[-2:]
    across, along = (
        max(1, n - 1) * s / 2 for n, s in zip((width, height), (mm[1], mm[0]), strict=True)
    )
    c, s = cos(angle), sin(angle)
    theta = torch.tensor(
        [[c, -s * along / across, 0.0], [s * across / along, c, 0.0]],
        dtype=x.dtype,
        device=x.device,
    )
    flat = x.reshape(1, -1, height, width)
    grid = functional.affine_grid(theta[None], list(flat.shape), align_corners=True)
    turned = functional.grid_sample(flat, grid, padding_mode="reflection", align_corners=True)
    return turned.reshape(x.shape)


def average_rotations(spec: Spec, inferer: Inferer) -> Inferer:
    """The inferer with the averaging that a spec asks for: about the axis of its slices, or the vertical one in 3D."""
    if spec.tta_rotations == 1:
        return inferer
    vertical = next(i for i, code in enumerate(spec.orientation) if code in "SI")
    axis = vertical if spec.slice_dim is None else spec.slice_dim
    return RotationInferer(inferer, spec.tta_rotations, axis)


def _spacing(inputs: torch.Tensor) -> list[float]:
    """Spacing along the three spatial axes, mm; equal where the volume does not know."""
    if not isinstance(inputs, MetaTensor):
        return [1.0, 1.0, 1.0]
    affine = np.asarray(inputs.affine, dtype=np.float64)
    affine = affine[0] if affine.ndim == 3 else affine
    return [float(n) for n in np.linalg.norm(affine[:3, :3], axis=0)]


def _margins(size: list[int], mm: list[float]) -> list[int]:
    """Voxels to add at each end so that every turned corner is inside."""
    extent = hypot(*((n - 1) * s for n, s in zip(size, mm, strict=True)))
    return [max(0, ceil((extent / s - (n - 1)) / 2)) for n, s in zip(size, mm, strict=True)]
