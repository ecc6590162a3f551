"""What the prediction of a case starts from and what it results in."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from monai.inferers import Inferer
from torch import nn

from pipeline.config import Spec
from pipeline.inference.invert import LabelInversion
from pipeline.transforms import Preprocessing
from pipeline.types import Affine, Array, LabelMap, PathOrStr


@dataclass(frozen=True, kw_only=True)
class Model:
    """A bundle opened for inference: all that one case needs, loaded once.

    Attributes:
        root: the bundle's folder.
        spec: the inputs and outputs that its weights were trained for.
        preprocessing: from files to the network's grid.
        network: the network as it runs, (B, C, *roi_size) → logits.
        inferer: applies the network to a volume of any size.
        inversion: from logits to labels on the grid of the output.
        device: where the network runs.
        max_memory: bytes of resident memory that the process may use; None for no limit.
    """

    root: PathOrStr
    spec: Spec
    preprocessing: Preprocessing
    network: nn.Module
    inferer: Inferer
    inversion: LabelInversion
    device: torch.device
    max_memory: int | None = None


@dataclass(frozen=True, kw_only=True)
class PreparedCase:
    """A case that was read and brought to the network's grid.

    Attributes:
        case: with `image` (C, X, Y, Z) and, where borders are refined, `scan`.
        seconds: wall time of each step so far.
    """

    case: dict[Hashable, Any]
    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The result of one case.

    Attributes:
        labels: (X, Y, Z) output values on the grid of the file, or the one asked for.
        affine: of the labels, voxel → RAS+ world, mm.
        header: bytes of the NIfTI header on that grid; empty where the input was of another format.
        warnings: what makes the case doubtful.
        seconds: wall time of each step.
        volumes_mm3: name → volume of each structure and of the spec's sums, mm³.
        uncertainty: (X, Y, Z) from 0 to 1, the entropy of the scores, where it was asked for.
    """

    labels: LabelMap
    affine: Affine
    header: bytes
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    volumes_mm3: dict[str, float]
    uncertainty: Array | None = None
