"""The tissue table of training label maps: the structure and the tissue of each of their values."""

from __future__ import annotations

import csv
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from numpy.typing import NDArray

from pipeline.errors import ConfigError, VolumeError
from pipeline.types import PathOrStr

COLUMNS = ("value", "name", "target_value", "intensity_class")
T1_COLUMNS = ("t1_mean", "t1_mean_sd", "t1_sd", "t1_sd_sd")
LEFT, RIGHT = "left ", "right "  # how the names of paired structures begin
CENTRE, SPACING = "centre", "spacing"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TissueTable:
    """What each value of the label maps means: one row per value, the background first.

    Attributes:
        values: (N,) value of each row in the label maps.
        channels: (N,) number of the network's channel for each row, 0 for background.
        classes: (N,) number of the tissue class of each row, from 0. All voxels of a class have the
            same intensity distribution. Left and right structures have the same class.
        mirror: (N,) row of the same structure on the other side; the row itself if there is none.
        t1: (classes, 4) intensities of each class in T1-weighted images, 0 to 255: mean, standard
            deviation of this mean between images, standard deviation within the class, and standard
            deviation of the latter between images.
    """

    values: NDArray[np.int64]
    channels: NDArray[np.int64]
    classes: NDArray[np.int64]
    mirror: NDArray[np.int64]
    t1: NDArray[np.float64]


def read_tissue_table(path: PathOrStr, labels: Mapping[str, int]) -> TissueTable:
    """Return the tissue table in a CSV file.

    The label of a row is the one whose value equals the row's `target_value` or, if that is 0, its
    `freesurfer_value` (or its `value`, if the table has no such column).

    Args:
        path: CSV file with the columns value, name, target_value, intensity_class and t1_mean,
            t1_mean_sd, t1_sd, t1_sd_sd (0 to 255). Two names that are equal after `left ` and
            `right ` are the two sides of a structure.
        labels: name → value, in the order of the network's channels; all other structures are
            background.

    Raises:
        ConfigError: the file does not exist, lacks a column, or has text in place of a number.
    """
    rows = _read_rows(Path(path))
    outputs = list(labels.values())
    try:
        values = np.array([int(row["value"]) for row in rows])
        class_numbers = [int(row["intensity_class"]) for row in rows]
        channels = np.array([_channel(row, outputs) for row in rows])
        t1 = np.array([_t1_intensities(row) for row in rows])
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; expected numbers in every column but name") from error
    mirror = _mirror_rows([row["name"] for row in rows])
    # both sides get the smaller of their two class numbers, so that they have the same intensities
    shared = [min(class_numbers[row], class_numbers[other]) for row, other in enumerate(mirror)]
    found, first_rows, classes = np.unique(shared, return_index=True, return_inverse=True)
    if len(set(values.tolist())) < len(values) or not len(found):
        raise ConfigError(f"{path}: expected at least one row, and every value once")
    return TissueTable(
        values=values,
        channels=channels,
        classes=classes,
        mirror=np.array(mirror),
        t1=t1[first_rows],
    )


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); expected the table of the label maps' "
            "values"
        ) from error
    first = rows[0] if rows else {}
    missing = [column for column in (*COLUMNS, *T1_COLUMNS) if first.get(column) is None]
    if missing:
        raise ConfigError(f"{path}: expected rows with the columns {', '.join(missing)}")
    return rows


def _channel(row: Mapping[str, str], outputs: Sequence[int]) -> int:
    """Return the network's channel for a row, 0 for structures that it does not segment.

    Args:
        row: row of the table.
        outputs: label value of each channel.
    """
    target = int(row["target_value"]) or int(row.get("freesurfer_value") or row["value"])
    return outputs.index(target) if target in outputs else 0


def _t1_intensities(row: Mapping[str, str]) -> list[float]:
    return [float(row[column]) for column in T1_COLUMNS]


def _mirror_rows(names: Sequence[str]) -> list[int]:
    """Return, for each row, the row of the same structure on the other side, or the row itself."""
    row_of = {name: row for row, name in enumerate(names)}
    mirror = []
    for row, name in enumerate(names):
        other = name
        if name.startswith(LEFT):
            other = RIGHT + name.removeprefix(LEFT)
        elif name.startswith(RIGHT):
            other = LEFT + name.removeprefix(RIGHT)
        mirror.append(row_of.get(other, row))
    return mirror


class TissueIndexd(MapTransform):
    """Replace the values of a label map by their row numbers in the tissue table.

    The label map becomes a (1, X, Y, Z) uint8 tensor on `device`. The case also gets `spacing`,
    (3,) mm, and `centre`, (3,) voxels: the mean position of all structures of the network.

    Args:
        keys: key of the label map.
        table: tissue table with all values of the label map.
        device: device of the result; None is the CPU.

    Raises:
        VolumeError: the label map has a value that is not in the table, or no voxel of the
            structures.
    """

    def __init__(
        self,
        keys: KeysCollection,
        table: TissueTable,
        device: torch.device | None = None,
        centred_on: Sequence[int] = (),
    ) -> None:
        super().__init__(keys)
        self.table, self.device = table, device
        self.is_central = np.isin(table.channels, centred_on) if centred_on else table.channels > 0

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        row_of = {value: row for row, value in enumerate(self.table.values.tolist())}
        for key in self.key_iterator(case):
            label_map = case[key].as_tensor().to(torch.int64)
            found, inverse = torch.unique(label_map, return_inverse=True)
            unknown = [str(value) for value in found.tolist() if value not in row_of]
            if unknown:
                raise VolumeError(
                    f"{case.get('case')}: values {', '.join(unknown)} are not in the table of "
                    "label values"
                )
            found_rows = [row_of[value] for value in found.tolist()]
            rows = torch.tensor(found_rows, dtype=torch.uint8)[inverse]
            is_structure = torch.as_tensor(self.is_central)[rows[0].long()]
            if not is_structure.any():
                raise VolumeError(f"{case.get('case')}: holds no voxel of the structures")
            case[CENTRE] = is_structure.nonzero().double().mean(dim=0)
            case[SPACING] = case[key].pixdim.double()
            case[key] = rows.to(self.device)
        return case
