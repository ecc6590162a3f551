"""The data types of a prediction: the opened bundle, a preprocessed case, and the result."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer
from numpy.typing import NDArray
from torch import nn

from pipeline.config import Spec
from pipeline.inference.invert import LabelInversion
from pipeline.transforms import Preprocessing
from pipeline.types import Affine, Array, LabelMap, PathOrStr


@dataclass(frozen=True, kw_only=True)
class Model:
    """A bundle opened for inference: everything that the prediction of a case needs.

    Attributes:
        root: folder of the bundle.
        spec: inputs and outputs that the weights were trained for.
        preprocessing: transform from the files of a case to the image on the network's grid.
        network: network with its weights, in the runtime that was chosen, (B, C, *roi_size) →
            logits.
        inferer: inferer that applies the network to an image of any size.
        inversion: transform from logits to a label map on the grid of the file.
        device: device that the network runs on.
        max_memory: largest resident memory of the process, bytes; None sets no limit.
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
    """A case that was read and preprocessed.

    Attributes:
        case: the case with `image` (C, X, Y, Z) on the network's grid and, if the spec has
            `refine`, `scan` (C, I, J, K): the intensities as read.
        seconds: name of each step so far (`read`, `preprocess`) → its wall time.
    """

    case: dict[Hashable, Any]
    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The result of one case.

    Attributes:
        labels: (X, Y, Z) label map, on the grid of the file or with the voxel size that was
            requested.
        affine: affine of the label map, voxel → RAS+ world, mm.
        header: bytes of a NIfTI header for the label map's grid; empty if the input was in another
            format.
        warnings: reasons to check the case by eye.
        seconds: name of each step → its wall time.
        volumes_mm3: name of each structure and of each sum in the spec → volume, mm³.
        uncertainty: (X, Y, Z) entropy of the class probabilities, 0 to 1; None if it was not
            requested.
        probabilities: (N, X, Y, Z) uint8 probability of each of `spec.outputs`, 255 for 1; None if
            they were not requested.
    """

    labels: LabelMap
    affine: Affine
    header: bytes
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    volumes_mm3: dict[str, float]
    uncertainty: Array | None = None
    probabilities: NDArray[np.uint8] | None = None
