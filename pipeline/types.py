"""Types shared by all packages: shapes of arrays, and the case that every step passes on.

Voxel axes are written (X, Y, Z) in the order of the array; C is channels or classes, B the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Affine: TypeAlias = NDArray[np.float64]
"""(4, 4): voxel index → RAS+ world, mm."""
Array: TypeAlias = NDArray[Any]
"""(X, Y, Z): the voxels of one channel, as read from a file."""
LabelMap: TypeAlias = NDArray[np.unsignedinteger[Any]]
"""(X, Y, Z): output values on the file's own grid, in the smallest unsigned type."""
Box: TypeAlias = tuple[slice, ...]
"""One slice per spatial axis: a box of voxels."""
Spacing: TypeAlias = tuple[float, float, float]
"""Voxel size along the three axes, mm."""
PathOrStr: TypeAlias = str | PathLike[str]

# Any, because neither nibabel nor SimpleITK has type annotations
ImageSource: TypeAlias = Any
"""Where the voxels of one channel come from: a path, a DICOM series, an image in memory."""

Volume: TypeAlias = "torch.Tensor"
"""(C, X, Y, Z) float32: an image on the network's grid, a MetaTensor that holds its affine."""
Logits: TypeAlias = "torch.Tensor"
"""(C, X, Y, Z) float32 on the network's grid."""
NetworkFunction: TypeAlias = "Callable[[torch.Tensor], Any]"
"""A network, or what stands for one: (B, C, *roi_size) → logits, one tensor or several."""


class _NamedCase(TypedDict):
    case: str


class Case(_NamedCase, total=False):
    """One scan with its name, as a plain dict, because MONAI's transforms take dicts.

    Attributes:
        case: the name, always present; a relative path without suffix for a case to segment.
        image: the source of a single channel, or a list with one source per channel.
        label: the path of the label map, for training and evaluation.
        problem: why the case cannot be segmented, where that is known before it is read.
        left_out: why the case is not to be segmented, which is no failure: it is no volume.
        columns: further facts about the case, which are kept in the tables of results.
        dicom: DICOM objects to write besides: keys of `pipeline.io.DICOM_ENDINGS`.
        dicom_codes: name of a label → its `pipeline.io.StructureCode` in these objects, where it is
            not to be the one that volseg knows.
        outputs: ending → relative path of that output, where it is not the name with the ending.
    """

    image: ImageSource | list[ImageSource]
    label: str
    problem: str
    left_out: str
    columns: Mapping[str, str]
    dicom: tuple[str, ...]
    dicom_codes: Mapping[str, Any]
    outputs: Mapping[str, str]


__all__ = [
    "Affine",
    "Array",
    "Box",
    "Case",
    "ImageSource",
    "LabelMap",
    "Logits",
    "NetworkFunction",
    "PathOrStr",
    "Spacing",
    "Volume",
]
