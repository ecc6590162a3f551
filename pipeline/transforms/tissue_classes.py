"""The table of a set of training label maps: the structure and the tissue of each value."""

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
    """One row per value of the label maps, in the table's order; the first row is the background.

    Attributes:
        values: (N,) the value in the label maps.
        channels: (N,) the network's channel, 0 for background.
        classes: (N,) the tissue class, from 0. Rows of one class have one intensity distribution;
            left and right structures share theirs.
        mirror: (N,) the row of the same structure on the other side, or the row itself.
        t1: (classes, 4) intensities in T1 images, 0 to 255: the mean of a class, the standard
            deviation of this mean between images, the standard deviation within the class, and
            the standard deviation of that between images.
    """

    values: NDArray[np.int64]
    channels: NDArray[np.int64]
    classes: NDArray[np.int64]
    mirror: NDArray[np.int64]
    t1: NDArray[np.float64]


def read_tissue_table(path: PathOrStr, labels: Mapping[str, int]) -> TissueTable:
    """Return the table in a CSV file.

    The structure of a row is its `target_value`, or where that is 0 its `freesurfer_value`.

    Args:
        path: a CSV file with the columns value, name, target_value, intensity_class and t1_mean,
            t1_mean_sd, t1_sd, t1_sd_sd (0 to 255). Names that differ only in beginning with
            `left ` and `right ` are a pair.
        labels: name → output value, in the order of the network's channels; other structures are
            background.

    Raises:
        ConfigError: the file is missing, lacks a column, or has text where a number belongs.
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
    # Both sides take the smaller of their two class numbers, so that they look alike
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
    """Return the network's channel of a row, 0 for structures that it does not segment."""
    target = int(row["target_value"]) or int(row.get("freesurfer_value") or row["value"])
    return outputs.index(target) if target in outputs else 0


def _t1_intensities(row: Mapping[str, str]) -> list[float]:
    return [float(row[column]) for column in T1_COLUMNS]


def _mirror_rows(names: Sequence[str]) -> list[int]:
    """Return for each row that of the same structure on the other side, or the row itself."""
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
    """Replace the values of a label map by rows of its table.

    The map becomes (1, X, Y, Z) uint8 on `device`. The case also gets `spacing`, (3,) mm, and
    `centre`, (3,) voxels: the mean position of the voxels that are not background.

    Args:
        keys: the label map.
        table: the table of its values.
        device: where the map is kept; None is the CPU.

    Raises:
        VolumeError: the map has a value that is not in the table, or no structure.
    """

    def __init__(
        self, keys: KeysCollection, table: TissueTable, device: torch.device | None = None
    ) -> None:
        super().__init__(keys)
        self.table, self.device = table, device

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
            is_structure = torch.as_tensor(self.table.channels)[rows[0].long()] > 0
            if not is_structure.any():
                raise VolumeError(f"{case.get('case')}: holds no voxel of any structure")
            case[CENTRE] = is_structure.nonzero().double().mean(dim=0)
            case[SPACING] = case[key].pixdim.double()
            case[key] = rows.to(self.device)
        return case
