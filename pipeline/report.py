"""What is said about a case: its volumes, its row in a table."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ConfigError
from pipeline.spec import ALL
from pipeline.types import Affine, LabelMap
from pipeline.write import write_bytes


def volumes_mm3(
    labels: LabelMap, affine: Affine, names: Mapping[str, int], soft_mm3: Sequence[float] | None = None
) -> dict[str, float]:
    """The volume of each structure, mm³: its voxels times the volume of one; background is left out.

    Args:
        labels: (X, Y, Z) output values.
        affine: voxel → world, mm.
        names: name → output value, as in the spec.
        soft_mm3: each one's volume by its probabilities, in the order of `names`, which then counts instead; a structure that
            no voxel of the label map has is 0 either way.
    """
    if soft_mm3 is not None:
        there = _counts(labels)
        return {
            name: mm3 if value in there else 0.0
            for (name, value), mm3 in zip(names.items(), soft_mm3, strict=True)
            if value != 0
        }
    voxel = abs(float(np.linalg.det(affine[:3, :3])))
    counts = _counts(labels)
    return {name: counts.get(value, 0) * voxel for name, value in names.items() if value != 0}


def with_sums(volumes: Mapping[str, float], sums: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Volumes a structure, mm³, and after them those of several together: name → the structures that it sums, or `all`."""
    return {
        **volumes,
        **{name: sum(volumes[part] for part in (volumes if ALL in parts else parts)) for name, parts in sums.items()},
    }


def _counts(labels: LabelMap) -> dict[int, int]:
    """How many voxels have each value; small types are counted without sorting."""
    if labels.dtype == np.uint8:
        counts = np.bincount(labels.ravel())
        return {value: int(count) for value, count in enumerate(counts) if count}
    values, found = np.unique(labels, return_counts=True)
    return dict(zip(values.tolist(), found.tolist(), strict=True))


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A table, whole or not at all; the columns are those of the rows, in the order in which they come up."""
    rows = list(rows)
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where there is no file."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ConfigError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def sha256(path: Path) -> str:
    """The hash of a file's content, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
