"""MONAI's `Compose` with names for its parts, so that no caller counts transforms.

The transforms stay in one flat list, because MONAI's `Invertd` and `CacheDataset`, MONAI Label and
the Deploy SDK iterate over it. The methods run a part through `Compose` itself, which wraps a
transform's error in one that names the transform.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeAlias

from monai.transforms import Compose, MapTransform, Transform

from pipeline.transforms.loading import LoadVolumed

Data: TypeAlias = dict[Hashable, Any]
"""A case on its way through the transforms: key → path, tensor or name."""


class Preprocessing(Compose):
    """The deterministic transforms from a case's files to the network's grid and intensities.

    `preprocessing(case)` applies all of them, like any `Compose`; `load` and `to_network_grid`
    apply one part each, so that each can be timed and checked.

    Attributes:
        reader: the transform that loads the files; it holds `volume` and `labels_spacing`.
    """

    def __init__(self, reader: LoadVolumed, to_network_grid: Sequence[MapTransform]) -> None:
        super().__init__([reader, *to_network_grid])
        self.reader = reader

    def load(self, case: Mapping[Any, Any]) -> Data:
        """Return the case with its files loaded, on their own grid and with their own values."""
        loaded: Data = self(case, end=1)
        return loaded

    def to_network_grid(self, case: Mapping[Any, Any]) -> Data:
        """Return a case from `load` checked, resampled to the network's grid and normalised."""
        prepared: Data = self(case, start=1)
        return prepared


class TrainingTransform(Compose):
    """The transforms from a labelled case to training patches.

    `transform(case)` applies all of them, like any `Compose`. `deterministic` applies those whose
    result can be cached, `random` the others.

    Args:
        deterministic: the transforms that are applied once per case.
        random: the transforms that are applied each time a case is used. The first one has
            MONAI's `RandomizableTrait`, which is where `CacheDataset` stops caching.
    """

    def __init__(self, deterministic: Sequence[Transform], random: Sequence[Transform]) -> None:
        super().__init__([*deterministic, *random])
        self.first_random = len(deterministic)

    def deterministic(self, case: Mapping[Any, Any]) -> Data:
        """Return what can be cached of a case."""
        prepared: Data = self(case, end=self.first_random)
        return prepared

    def random(self, case: Mapping[Any, Any]) -> list[Data]:
        """Return new patches of a case from `deterministic`."""
        patches: list[Data] | Data = self(case, start=self.first_random)
        return patches if isinstance(patches, list) else [patches]
