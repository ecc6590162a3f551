"""Loading the files of a case into tensors."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from pipeline.io import (
    DicomSeries,
    Grid,
    Image,
    add_warnings,
    printable,
    read_channels,
    source_list,
)
from pipeline.transforms.tensors import (
    NO_ORIENTATION,
    has_orientation,
    images_in_memory,
    is_in_memory,
)
from pipeline.types import ImageSource


class LoadVolumed(MapTransform):
    """Load each key's file, or one file per channel, into a (C, X, Y, Z) float32 MetaTensor.

    A single 4D file with as many volumes as the model has channels becomes these channels. Images
    in memory are taken as well: those of nibabel and SimpleITK, and tensors and arrays, as MONAI
    Label and MONAI Deploy hand them over after loading them by themselves.

    Besides MONAI's own keys, `meta` holds the grid of the label map (`Grid.from_meta`), the
    warnings about the files (`warnings_of`) and `sources`, the path of each channel.

    MONAI's `LoadImaged` is not used because it accepts files with a wrong checksum, takes 4D
    files for channels, drops imaginary parts, and does not keep the NIfTI header.

    Args:
        keys: keys of the case; missing ones are allowed, because a case to segment has no label.
        volume: which volume of 4D files, from 0; None accepts files with a single volume only.
        labels_spacing: spacing of the label map's isotropic voxels, mm; None keeps the file's grid.
        channels: number of channels of the model; a single file of so many volumes holds them all.
    """

    def __init__(
        self,
        keys: KeysCollection,
        volume: int | None = None,
        labels_spacing: float | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.volume, self.labels_spacing, self.channels = volume, labels_spacing, channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            case[key] = self.load(case[key])
        return case

    def load(self, sources: ImageSource | list[ImageSource]) -> MetaTensor:
        """Return the (C, X, Y, Z) float32 tensor of one source, or of one source per channel.

        Raises:
            ReadError: a file cannot be read.
            VolumeError: a file does not hold one grey volume.
            GeometryError: the channels lie on different grids.
        """
        given = source_list(sources)
        channels = images_in_memory(given, self.channels)
        images = read_channels(channels, self.channels, self.volume)
        first = images[0]
        # As shown to readers: handlers of MONAI print and hash these, and fail at undecodable names
        paths = [_shown(source) for source in channels]
        meta: dict[str, Any] = {
            "affine": first.affine,
            "original_affine": first.affine.copy(),
            "spatial_shape": np.array(first.array.shape),
            "original_channel_dim": 0,
            "filename_or_obj": paths[0],
            "sources": paths * (len(images) // len(paths)),  # one for each channel
            "space": "RAS",
            **self._labels_grid(first).to_meta(),
        }
        add_warnings(meta, *_warnings(channels, images))
        if any(is_in_memory(x) and not has_orientation(x) for x in given):
            add_warnings(meta, NO_ORIENTATION)
        array = np.stack([np.asarray(image.array, dtype=np.float32) for image in images])
        tensor: MetaTensor = MetaTensor.ensure_torch_and_prune_meta(array, meta)
        return tensor

    def _labels_grid(self, image: Image) -> Grid:
        grid = Grid(affine=image.affine, shape=image.array.shape, header=image.header)
        return grid if self.labels_spacing is None else grid.with_spacing(self.labels_spacing)


def _shown(source: ImageSource) -> str:
    """Return what names a source in messages; empty for an image in memory."""
    if isinstance(source, DicomSeries):
        return str(source)
    return printable(source) if isinstance(source, str | Path) else ""


def _warnings(channels: list[ImageSource], images: list[Image]) -> list[str]:
    """Return the warnings of all channels, each once, and one for a file that is used twice."""
    warnings: dict[str, None] = {}
    for image in images:
        warnings.update(dict.fromkeys(image.warnings))
    identities = {str(x) if isinstance(x, str | Path) else id(x) for x in channels}
    if len(identities) < len(channels):
        warnings["one file serves for several channels: the segmentation is less reliable"] = None
    return list(warnings)
