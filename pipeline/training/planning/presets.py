"""Presets: how much of the time limit a plan spends on accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PresetName = Literal["fast", "balanced", "best"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """What a plan may choose.

    Attributes:
        step_factor: factor on the largest number of voxels of a training step.
        feature_factor: factor on the channels of the network's first level.
        max_networks: largest number of U-Nets that are trained side by side and averaged.
        deep_supervision: whether lower levels get outputs of their own, where the steps allow.
        residual: whether blocks are residual, where the steps allow.
        tta_mirror: whether mirrored images are segmented too, where no label has a side.
    """

    step_factor: float = 1.0
    feature_factor: float = 1.0
    max_networks: int = 2
    deep_supervision: bool = False
    residual: bool = False
    tta_mirror: bool = False


PRESETS: dict[PresetName, Preset] = {
    # half the voxels and three quarters of the features: a step takes about a third of the time
    "fast": Preset(step_factor=0.5, feature_factor=0.75, max_networks=1),
    "balanced": Preset(),
    "best": Preset(max_networks=4, deep_supervision=True, residual=True, tta_mirror=True),
}
