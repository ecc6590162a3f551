"""A folder of labelled volumes as a list of cases, and its folds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.read import suffix
from pipeline.run import Run
from pipeline.types import Case, PathOrStr


def labelled_cases(dataset: PathOrStr) -> list[Case]:
    """The pairs that a Decathlon `dataset.json` lists; files it does not list are not used.

    Args:
        dataset: the folder of dataset.json; `$NAME` is taken from the environment.

    Returns:
        one dict a case with `case` (the image's name without suffix), `image` and `label` (paths).

    Raises:
        ConfigError: no dataset.json, or files that it lists are missing (all of them are named).
    """
    folder = resolve(dataset)
    content = _json(folder / "dataset.json")
    try:
        pairs = [{key: str(folder / item[key]) for key in ("image", "label")} for item in content["training"]]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder}/dataset.json: expected a list `training` of pairs of `image` and `label`") from error
    missing = [path for pair in pairs for path in pair.values() if not Path(path).is_file()]
    if missing:
        raise ConfigError(f"{folder}/dataset.json lists {len(missing)} files that are missing: {', '.join(missing[:5])}")
    return [{"case": _name(pair["image"]), **pair} for pair in pairs]


def fold_cases(dataset: PathOrStr, splits: str | None, fold: int, part: str) -> list[Case]:
    """The cases of one part, `train` or `val`, of one fold; all cases where there are no splits.

    Raises:
        ConfigError: no such fold, or the splits name cases that the dataset does not have.
    """
    cases = labelled_cases(dataset)
    if splits is None:
        return cases
    folds = _json(resolve(dataset) / splits)
    if not isinstance(folds, list) or not all(isinstance(part, dict) and {"train", "val"} <= part.keys() for part in folds):
        raise ConfigError(f"{splits}: expected a list of folds, each with the case names of `train` and `val`")
    if not 0 <= fold < len(folds):
        raise ConfigError(f"fold {fold}: {splits} holds " + (f"folds 0 to {len(folds) - 1}" if folds else "no folds"))
    by_name = {case["case"]: case for case in cases}
    unknown = [name for name in folds[fold][part] if name not in by_name]
    if unknown:
        raise ConfigError(f"{splits}, fold {fold}, {part}: cases that dataset.json does not list: {', '.join(unknown[:5])}")
    return [by_name[name] for name in folds[fold][part]]


def training_cases(dataset: PathOrStr, run: Run) -> list[Case]:
    """The cases that a run trains on, as often as it repeats them.

    Raises:
        ConfigError: see `fold_cases` and `label_maps`; or `hold_out` names a case that there is not.
    """
    cases = label_maps(dataset) if run.synthesis else fold_cases(dataset, run.splits, run.fold, "train")
    unknown = set(run.hold_out) - {case["case"] for case in cases}
    if unknown:
        raise ConfigError(f"run.hold_out: expected names of training cases, got {', '.join(sorted(unknown))}")
    return [case for case in cases if case["case"] not in run.hold_out] * run.repeats


def validation_cases(dataset: PathOrStr, run: Run) -> list[Case]:
    """The cases that a run is validated on: those of its fold that training leaves out, where it validates at all."""
    if run.validate_every < 1 or run.splits is None or run.synthesis:
        return []
    return fold_cases(dataset, run.splits, run.fold, "val")


def label_maps(dataset: PathOrStr) -> list[Case]:
    """Every volume of a folder as a case with a `label` and no image.

    Raises:
        ConfigError: no such folder, or no volume in it.
    """
    folder = resolve(dataset)
    found = [path for path in sorted(folder.iterdir()) if suffix(path)]
    if not found:
        raise ConfigError(f"{folder}: expected label maps, found no volume")
    return [{"case": _name(str(path)), "label": str(path)} for path in found]


def expand(path: PathOrStr) -> str:
    """A path with `$NAME` taken from the environment.

    Raises:
        ConfigError: a variable that is not set.
    """
    text = os.path.expandvars(os.fspath(path))
    if "$" in text:
        raise ConfigError(f"{path}: set the environment variable that it names")
    return text


def resolve(dataset: PathOrStr) -> Path:
    """The dataset's folder, with `$NAME` taken from the environment.

    Raises:
        ConfigError: a variable that is not set, or no such folder.
    """
    text = expand(dataset)
    if not Path(text).is_dir():
        raise ConfigError(f"{text}: no such folder; expected a dataset")
    return Path(text)


def _name(image: str) -> str:
    """A file's name without its suffix; other dots belong to the name."""
    name = Path(image).name
    return name[: len(name) - len(suffix(Path(name)) or Path(name).suffix)]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error
