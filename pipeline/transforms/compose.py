"""MONAI's `Compose` with methods that run a part of the transforms.

The transforms stay in one flat list, because MONAI's `Invertd` and `CacheDataset`, MONAI Label and
the Deploy SDK iterate over it. The methods use the arguments `start` and `end` of `Compose`, which
wraps an error of a transform in one that names the transform.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeAlias

from monai.transforms import Compose, MapTransform, Transform

from pipeline.transforms.loading import LoadVolumed

Data: TypeAlias = dict[Hashable, Any]
"""A case as MONAI's transforms take and return it: key → path, tensor or name."""


class Preprocessing(Compose):
    """The deterministic transforms from the files of a case to the network's input.

    Like any `Compose`, `preprocessing(case)` applies all of them. `load` and `to_network_grid`
    apply the first and the second part.

    Args:
        reader: transform that loads the files; it is also an attribute.
        to_network_grid: transforms that check the case, resample it and normalise its intensities.
    """

    def __init__(self, reader: LoadVolumed, to_network_grid: Sequence[MapTransform]) -> None:
        super().__init__([reader, *to_network_grid])
        self.reader = reader

    def load(self, case: Mapping[Any, Any]) -> Data:
        """Return the case with its files loaded, on their own grid and with unchanged values."""
        loaded: Data = self(case, end=1)
        return loaded

    def to_network_grid(self, case: Mapping[Any, Any]) -> Data:
        """Return a loaded case after checks, resampling to the network's grid and normalisation."""
        prepared: Data = self(case, start=1)
        return prepared


class TrainingTransform(Compose):
    """The transforms from a labelled case to training patches.

    Like any `Compose`, `transform(case)` applies all of them. `deterministic` applies those whose
    result can be cached, `random` the others.

    Args:
        deterministic: transforms that are applied once per case.
        random: transforms that are applied each time a case is used. The first one must have
            MONAI's `RandomizableTrait`, because `CacheDataset` caches the result up to there.
    """

    def __init__(self, deterministic: Sequence[Transform], random: Sequence[Transform]) -> None:
        super().__init__([*deterministic, *random])
        self.first_random = len(deterministic)

    def deterministic(self, case: Mapping[Any, Any]) -> Data:
        """Return a case after the deterministic transforms, whose result can be cached."""
        prepared: Data = self(case, end=self.first_random)
        return prepared

    def random(self, case: Mapping[Any, Any]) -> list[Data]:
        """Return random patches of a case to which `deterministic` has been applied."""
        patches: list[Data] | Data = self(case, start=self.first_random)
        return patches if isinstance(patches, list) else [patches]
