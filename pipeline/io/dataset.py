"""Labelled volumes as a list of cases, and their folds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import Run
from pipeline.errors import ConfigError
from pipeline.io.layouts import MISSING, find_pairs
from pipeline.io.reader import image_stem, image_suffix
from pipeline.io.tables import read_json
from pipeline.types import Case, PathOrStr


def labelled_cases(dataset: PathOrStr | Sequence[PathOrStr]) -> list[Case]:
    """The pairs of image and label that a dataset holds, in any layout that `layouts.find_pairs` knows.

    Args:
        dataset: a folder, or one of images and one of labels; `$NAME` is taken from the environment.

    Returns:
        one dict a case with `case` (a name), `image` (a path, or several, one a channel) and `label` (a path).

    Raises:
        ConfigError: no such folder or layout, no pair, or files that a dataset.json lists are missing.
    """
    layout = find_pairs(dataset_folders(dataset))
    missing = [what for _, what in layout.problems if what.startswith(MISSING)]
    if missing:
        raise ConfigError(
            f"{dataset}/dataset.json: {len(missing)} cases are incomplete; {'; '.join(missing[:5])}"
        )
    if not layout.cases:
        raise ConfigError(f"{dataset}: found no pair of image and label in this {layout.kind}")
    return layout.cases


def fold_cases(
    dataset: PathOrStr | Sequence[PathOrStr], splits: str | None, fold: int, part: str
) -> list[Case]:
    """The cases of one part, `train` or `val`, of one fold; all cases where there are no splits.

    Raises:
        ConfigError: no such fold, or the splits name cases that the dataset does not have.
    """
    cases = labelled_cases(dataset)
    if splits is None:
        return cases
    folds = read_splits(dataset, splits)
    if not 0 <= fold < len(folds):
        raise ConfigError(
            f"fold {fold}: {splits} holds "
            + (f"folds 0 to {len(folds) - 1}" if folds else "no folds")
        )
    by_name = {case["case"]: case for case in cases}
    unknown = [name for name in folds[fold][part] if name not in by_name]
    if unknown:
        raise ConfigError(
            f"{splits}, fold {fold}, {part}: cases that the dataset does not have: {', '.join(unknown[:5])}"
        )
    return [by_name[name] for name in folds[fold][part]]


def read_splits(
    dataset: PathOrStr | Sequence[PathOrStr], splits: str
) -> list[dict[str, list[str]]]:
    """The folds of a JSON file beside the data, or anywhere: a list of dicts with the case names of `train` and `val`.

    Raises:
        ConfigError: no such file, or other content.
    """
    beside = dataset_folders(dataset)[0] / expand_variables(splits)
    path = (
        beside
        if beside.is_file() or not Path(expand_variables(splits)).is_file()
        else Path(expand_variables(splits))
    )
    folds = read_json(path)
    if not isinstance(folds, list) or not all(
        isinstance(part, dict) and {"train", "val"} <= part.keys() for part in folds
    ):
        raise ConfigError(
            f"{splits}: expected a list of folds, each with the case names of `train` and `val`"
        )
    return folds


def training_cases(dataset: PathOrStr | Sequence[PathOrStr], run: Run) -> list[Case]:
    """The cases that a run trains on, as often as it repeats them.

    Raises:
        ConfigError: see `fold_cases` and `label_maps`; or `hold_out` names a case that there is not.
    """
    cases = (
        label_maps(dataset) if run.synthesis else fold_cases(dataset, run.splits, run.fold, "train")
    )
    unknown = set(run.hold_out) - {case["case"] for case in cases}
    if unknown:
        raise ConfigError(
            f"run.hold_out: expected names of training cases, got {', '.join(sorted(unknown))}"
        )
    return [case for case in cases if case["case"] not in run.hold_out] * run.repeats


def validation_cases(dataset: PathOrStr | Sequence[PathOrStr], run: Run) -> list[Case]:
    """The cases that a run is validated on: those of its fold that training leaves out, where it validates at all."""
    if run.validate_every < 1 or run.splits is None or run.synthesis:
        return []
    return fold_cases(dataset, run.splits, run.fold, "val")


def label_maps(dataset: PathOrStr | Sequence[PathOrStr]) -> list[Case]:
    """Every volume of a folder as a case with a `label` and no image.

    Raises:
        ConfigError: no such folder, or no volume in it.
    """
    folder = dataset_folders(dataset)[0]
    found = [path for path in sorted(folder.iterdir()) if image_suffix(path)]
    if not found:
        raise ConfigError(f"{folder}: expected label maps, found no volume")
    return [{"case": image_stem(path), "label": str(path)} for path in found]


def expand_variables(path: PathOrStr) -> str:
    """A path with `$NAME` taken from the environment.

    Raises:
        ConfigError: a variable that is not set.
    """
    text = os.path.expandvars(os.fspath(path))
    if "$" in text:
        raise ConfigError(f"{path}: set the environment variable that it names")
    return text


def dataset_folders(dataset: PathOrStr | Sequence[PathOrStr]) -> list[Path]:
    """The dataset's folders, with `$NAME` taken from the environment.

    Raises:
        ConfigError: a variable that is not set, or no such folder.
    """
    listed = [dataset] if isinstance(dataset, str | os.PathLike) else list(dataset)
    found = [Path(expand_variables(item)) for item in listed]
    for path in found:
        if not path.is_dir():
            raise ConfigError(f"{path}: no such folder; expected a dataset")
    return found
