"""Whether volseg's inferer gives a foreign bundle's own labels, and the memory of that decision."""

from __future__ import annotations

import hashlib
import json
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.bundle.foreign.files import ForeignFacts, weights_hash
from pipeline.bundle.foreign.settings import ForeignSettings
from pipeline.bundle.overrides import overrides_text
from pipeline.bundle.trust import code_hash
from pipeline.errors import ConfigError, WriteError
from pipeline.inference import cache_folder, processor_name
from pipeline.io import Grid, read_json, temporary_folder, write_json, write_part
from pipeline.types import LabelMap

MIN_VOXELS = 100  # of a label; smaller ones are not compared
MIN_DICE = 0.999
PROBLEM_WIDTH = 300  # characters of an error
RULE = 3  # to be raised when the comparison or what is compared changes
PACKAGES = ("volseg", "monai", "torch", "openvino")


class Choice(NamedTuple):
    """What computes a bundle's network.

    Attributes:
        runtime: `torch`, `openvino`, or `stock` for the bundle's own inferer.
        precision: of the arithmetic, `float32` or `bfloat16`.
    """

    runtime: str
    precision: str = "float32"

    def __str__(self) -> str:
        return f"{self.runtime} in {self.precision}"


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far the labels by a runtime are the bundle's own.

    Attributes:
        choice: what computed them.
        good: whether they agree.
        text: in words.
        compared: whether there were labels to compare.
    """

    choice: Choice
    good: bool
    text: str
    compared: bool = True


def failed(choice: Choice, problem: str) -> Agreement:
    """Return that a runtime gave no labels that could be compared, and why."""
    shown = textwrap.shorten(problem, PROBLEM_WIDTH, placeholder=" …")
    return Agreement(choice, good=False, text=f"{choice} {shown}", compared=False)


def label_agreement(choice: Choice, found: LabelMap, expected: LabelMap) -> Agreement | None:
    """Return how far two label maps agree; None where there are too few labels to tell.

    Args:
        choice: what computed `found`.
        found: labels or masks.
        expected: by the bundle's own inferer.
    """
    if found.shape != expected.shape:
        return failed(choice, f"gives the shape {found.shape}, expected {expected.shape}")
    ours, own = (x if x.ndim == 4 else x[None] for x in (found, expected))
    lowest = 2.0  # more than any Dice
    for number in range(len(own)):
        for value in np.union1d(np.unique(ours[number]), np.unique(own[number])):
            one, other = ours[number] == value, own[number] == value
            sizes = np.count_nonzero(one), np.count_nonzero(other)
            if value == 0 or max(sizes) <= MIN_VOXELS:
                continue
            lowest = min(lowest, float(2 * np.count_nonzero(one & other) / sum(sizes)))
    if lowest > 1:
        return None
    return Agreement(
        choice, good=lowest >= MIN_DICE, text=f"{choice}: lowest Dice of a label {lowest:.5f}"
    )


@contextmanager
def trial_folder(staging: Path | None) -> Iterator[Path]:
    """Yield a folder for the files of a trial, which is removed after that.

    Args:
        staging: where it lies; None for the system's folder for temporary files.
    """
    folder = temporary_folder(staging)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def trial_items(
    item: Mapping[str, Any], grid: Grid, length_mm: float, width_mm: float, folder: Path
) -> Iterator[tuple[dict[str, Any], Grid]]:
    """Yield the middle of a case, and then other parts of it, as items and their grids.

    A case that is not much larger than a part is yielded whole.

    Args:
        item: of the bundle's dataset.
        grid: of the case's files.
        length_mm: of a part along the longest axis of the case.
        width_mm: of a part along the other two axes.
        folder: for the files of the parts.
    """
    spacing = np.linalg.norm(grid.affine[:3, :3], axis=0)
    wanted = np.full(len(spacing), width_mm)
    wanted[np.argmax(spacing * grid.shape)] = length_mm
    along = zip(grid.shape, wanted / spacing, strict=True)
    sizes = [min(n, int(np.ceil(voxels))) for n, voxels in along]
    if all(size == n for size, n in zip(sizes, grid.shape, strict=True)):
        yield dict(item), grid
        return
    for number, fraction in enumerate((0.5, 0.25, 0.75)):
        box = []
        for size, n in zip(sizes, grid.shape, strict=True):
            start = min(max(0, round(n * fraction - size / 2)), n - size)
            box.append(slice(start, start + size))
        part_folder = folder / f"part-{number}"
        part_folder.mkdir()
        yield _part(item, box, part_folder)


class TrialParts:
    """Parts of a case with the bundle's own labels in them, each computed once.

    Args:
        parts: from `trial_items`.
        own_labels: returns the bundle's own labels in a part.
    """

    def __init__(
        self,
        parts: Iterator[tuple[dict[str, Any], Grid]],
        own_labels: Callable[[Mapping[str, Any], Grid], LabelMap],
    ) -> None:
        self._parts, self._own_labels = parts, own_labels
        self._known: list[tuple[dict[str, Any], Grid]] = []
        self._labels: dict[int, LabelMap] = {}

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Grid, LabelMap]]:
        """Yield item, grid and labels of each part."""
        number = 0
        while True:
            if number == len(self._known):
                part = next(self._parts, None)
                if part is None:
                    return
                self._known.append(part)
            item, grid = self._known[number]
            if number not in self._labels:
                self._labels[number] = self._own_labels(item, grid)
            yield item, grid, self._labels[number]
            number += 1


def _part(item: Mapping[str, Any], box: list[slice], folder: Path) -> tuple[dict[str, Any], Grid]:
    """Return the item of a box of a case; entries that are no files stay."""
    part: dict[str, Any] = {}
    grids = []
    for key, value in item.items():
        listed = value if isinstance(value, list) else [value]
        if not all(isinstance(x, str) and Path(x).is_file() for x in listed):
            part[key] = value
            continue
        paths = []
        for number, source in enumerate(listed):
            paths.append(str(folder / f"{key}-{number}.nii"))
            grids.append(write_part(source, box, paths[-1]))
        part[key] = paths if isinstance(value, list) else paths[0]
    return part, grids[0]


def stored_decision(facts: ForeignFacts, settings: ForeignSettings) -> Agreement | None:
    """Return what was decided for a bundle on this processor; None where nothing was."""
    with suppress(ConfigError, OSError, KeyError, TypeError):
        stored = read_json(_entry(facts, settings))
        choice = Choice(str(stored["runtime"]), str(stored["precision"]))
        return Agreement(choice, good=bool(stored["agrees"]), text=str(stored["reason"]))
    return None


def store_decision(facts: ForeignFacts, settings: ForeignSettings, decided: Agreement) -> None:
    """Keep what was decided for a bundle on this processor; nothing where there is no cache."""
    with suppress(OSError, WriteError):
        path = _entry(facts, settings)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        stored = {**decided.choice._asdict(), "agrees": decided.good, "reason": decided.text}
        write_json(path, stored)


def _entry(facts: ForeignFacts, settings: ForeignSettings) -> Path:
    parts = [
        RULE,
        code_hash(facts.folder),
        weights_hash(facts.folder),
        overrides_text(settings.overrides),
        settings.overlap,
        settings.precision,
        str(settings.device),
        processor_name(settings.device),
        [version(name) for name in PACKAGES],
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    return cache_folder() / f"foreign-{key}.json"
