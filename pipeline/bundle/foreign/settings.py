"""How a bundle in MONAI's form is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.types import PathOrStr


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignSettings:
    """The choices of the user who opens a bundle.

    Attributes:
        root: the bundle's folder.
        device: that computes.
        overrides: id → value, from `parse_overrides`.
        overlap: of neighbouring windows, a fraction; None for the bundle's own.
        runtime: `auto`, `torch`, `openvino`, or `stock` for the bundle's own inferer.
        precision: `auto`, `float32` or `bfloat16`.
        volume: which volume of 4D files, from 0; None for files of one volume, or of one volume per
            file of a case.
        uncertainty: whether the entropy of the class probabilities is computed.
        probabilities: whether the probability of each output is computed.
    """

    root: PathOrStr
    device: torch.device
    overrides: Mapping[str, Any] = field(default_factory=dict)
    overlap: float | None = None
    runtime: str = "auto"
    precision: str = "auto"
    volume: int | None = None
    uncertainty: bool = False
    probabilities: bool = False
