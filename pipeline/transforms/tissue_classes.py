"""What each value of a training label map stands for: the structure it is, the tissue it looks like, its mirror image."""

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
PRIORS = ("t1_mean", "t1_mean_sd", "t1_sd", "t1_sd_sd")
SIDES = ("left ", "right ")
CENTRE, SPACING = "centre", "spacing"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tissues:
    """One row a value of the label maps, in the table's order; the first is what surrounds a map.

    Attributes:
        values: (N,) as stored in the maps.
        channels: (N,) the network's channel of each, 0 for background.
        classes: (N,) from 0: rows with the same number are drawn from one distribution; left and right share it.
        mirror: (N,) the row of the same structure on the other side; its own where there is none.
        t1: (classes, 4): a class's mean in T1 images and the spread of that mean, its spread and the spread of that.
    """

    values: NDArray[np.int64]
    channels: NDArray[np.int64]
    classes: NDArray[np.int64]
    mirror: NDArray[np.int64]
    t1: NDArray[np.float64]


def read_tissues(path: PathOrStr, labels: Mapping[str, int]) -> Tissues:
    """The table of a CSV file.

    A row's structure is its `target_value`, or its `freesurfer_value` where that is 0 and the labels name it.

    Args:
        path: a CSV with the columns value, name, target_value, intensity_class and t1_mean, t1_mean_sd, t1_sd, t1_sd_sd (grey
            values, 0 to 255). Names that begin with `left ` and `right ` are pairs.
        labels: name → output value of the network's channels; structures that are not among them are background.

    Raises:
        ConfigError: no such file, a column that is missing, or a number that is none.
    """
    rows = _rows(Path(path))
    try:
        values = np.array([int(row["value"]) for row in rows])
        numbers = [int(row["intensity_class"]) for row in rows]
        channels = np.array([_channel(row, list(labels.values())) for row in rows])
        priors = np.array([[float(row[column]) for column in PRIORS] for row in rows])
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; expected numbers in every column but name") from error
    mirror = _mirror([row["name"] for row in rows])
    shared = [min(numbers[i], numbers[j]) for i, j in enumerate(mirror)]
    found, first, classes = np.unique(shared, return_index=True, return_inverse=True)
    if len(set(values.tolist())) < len(values) or not len(found):
        raise ConfigError(f"{path}: expected at least one row, and every value once")
    return Tissues(
        values=values, channels=channels, classes=classes, mirror=np.array(mirror), t1=priors[first]
    )


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); expected the table of the label maps' values"
        ) from error
    missing = [column for column in (*COLUMNS, *PRIORS) if not rows or rows[0].get(column) is None]
    if missing:
        raise ConfigError(f"{path}: expected rows with the columns {', '.join(missing)}")
    return rows


def _channel(row: Mapping[str, str], outputs: Sequence[int]) -> int:
    target = int(row["target_value"]) or int(row.get("freesurfer_value") or row["value"])
    return outputs.index(target) if target in outputs else 0


def _mirror(names: Sequence[str]) -> list[int]:
    """For each name the place of its other side, or its own."""
    places = {name: i for i, name in enumerate(names)}
    left, right = SIDES
    other = {left + n.removeprefix(right): n for n in names if n.startswith(right)}
    pairs = other | {there: here for here, there in other.items()}
    return [places.get(pairs.get(name, name), i) for i, name in enumerate(names)]


class TissueIndexd(MapTransform):
    """Turns a label map's values into rows of its table, uint8, and notes where its middle is.

    Beside the map, (1, X, Y, Z) on `device`, the case gets `spacing` (mm) and `centre` (voxels): the mean position of the
    voxels that are no background.

    Raises:
        VolumeError: a value that the table does not have.
    """

    def __init__(
        self, keys: KeysCollection, tissues: Tissues, device: torch.device | None = None
    ) -> None:
        super().__init__(keys)
        self.tissues, self.device = tissues, device

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        for key in self.key_iterator(case):
            found, inverse = torch.unique(
                case[key].as_tensor().to(torch.int64), return_inverse=True
            )
            places = {int(value): i for i, value in enumerate(self.tissues.values)}
            unknown = [str(value) for value in found.tolist() if value not in places]
            if unknown:
                raise VolumeError(
                    f"{case.get('case')}: values {', '.join(unknown)} are not in the table of label values"
                )
            rows = torch.tensor([places[value] for value in found.tolist()], dtype=torch.uint8)[
                inverse
            ]
            inside = torch.as_tensor(self.tissues.channels)[rows[0].long()] > 0
            if not inside.any():
                raise VolumeError(f"{case.get('case')}: holds no voxel of any structure")
            case[CENTRE] = inside.nonzero().double().mean(dim=0)
            case[SPACING] = case[key].pixdim.double()
            case[key] = rows.to(self.device)
        return case
