"""The shapes that travel through the pipeline, named once.

Voxel axes are written (X, Y, Z) in the order of the array at hand, C is channels or classes, B a batch.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Affine: TypeAlias = NDArray[np.float64]
"""(4, 4): voxel index → RAS+ world, mm."""
Array: TypeAlias = NDArray[Any]
"""(X, Y, Z): one channel of a file, as read."""
LabelMap: TypeAlias = NDArray[np.unsignedinteger[Any]]
"""(X, Y, Z): output values on the file's own grid, in the smallest unsigned type."""
Spacing: TypeAlias = tuple[float, float, float]
"""mm along the three axes of the orientation at hand."""
PathOrStr: TypeAlias = str | PathLike[str]

Volume: TypeAlias = "torch.Tensor"
"""(C, X, Y, Z) float32: an image on the network's grid, a MetaTensor that knows its affine."""
Logits: TypeAlias = "torch.Tensor"
"""(C, X, Y, Z) float32 on the network's grid."""

Case: TypeAlias = dict[str, Any]
"""One case as MONAI's transforms see it: `case` (its name), `image` (path or paths), later `pred` and what was met."""

__all__ = [
    "Affine",
    "Array",
    "Case",
    "LabelMap",
    "Logits",
    "Path",
    "PathOrStr",
    "Spacing",
    "Volume",
]
