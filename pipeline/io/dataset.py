"""The cases of a dataset for training and evaluation: all, those of a fold, or label maps only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pipeline.config import Run
from pipeline.errors import ConfigError
from pipeline.io.formats import image_stem, image_suffix
from pipeline.io.layout import Layout
from pipeline.io.layouts import find_pairs, is_table
from pipeline.io.tables import read_json
from pipeline.types import Case, PathOrStr

MAX_NAMED = 5  # cases that an error message names


def labelled_cases(dataset: PathOrStr | Sequence[PathOrStr]) -> list[Case]:
    """Return the labelled cases of a dataset, in any layout that `find_pairs` knows.

    Files without a partner are ignored; a missing file that a dataset.json or a table lists is an
    error.

    Args:
        dataset: a folder, a table, or a folder of images and a folder of labels; `$NAME` is
            replaced by the value of the environment variable.

    Returns:
        One case per pair, with `case`, `image` (a path, or a list with one path per channel) and
        `label` (a path).

    Raises:
        ConfigError: a folder does not exist, its layout is unknown, it holds no pair, or files that
            a dataset.json or a table lists are missing.
    """
    layout = _layout(dataset)
    missing = _missing_files(layout)
    if missing:
        raise ConfigError(
            f"{_shown(dataset)}: {len(missing)} cases are incomplete; "
            + "; ".join(list(missing.values())[:MAX_NAMED])
        )
    return layout.cases


def _layout(dataset: PathOrStr | Sequence[PathOrStr]) -> Layout:
    """Return the layout of a dataset that has cases.

    Raises:
        ConfigError: its layout is unknown, or it holds no pair.
    """
    layout = find_pairs(dataset_folders(dataset))
    if not layout.cases and not _missing_files(layout):
        raise ConfigError(
            f"{_shown(dataset)}: found no pair of image and label in this {layout.kind}"
        )
    return layout


def _missing_files(layout: Layout) -> dict[str, str]:
    """Return case → message, for cases of which a listed file is missing."""
    return {item.case: item.message for item in layout.problems if item.kind == "missing_file"}


def _shown(dataset: PathOrStr | Sequence[PathOrStr]) -> str:
    paths = [dataset] if isinstance(dataset, str | os.PathLike) else dataset
    return " and ".join(os.fspath(path) for path in paths)


def fold_cases(
    dataset: PathOrStr | Sequence[PathOrStr],
    splits: str | None,
    fold: int,
    part: Literal["train", "val"],
) -> list[Case]:
    """Return the training or the validation cases of a fold; all cases if there are no splits.

    Args:
        dataset: folder or folders, as for `labelled_cases`.
        splits: JSON file of the folds, as for `read_splits`; None returns all cases.
        fold: number of the fold, from 0.
        part: `train` for the training cases, `val` for the cases that are held out.

    Raises:
        ConfigError: there is no such fold, the dataset lacks cases that the fold names, or one of
            the two cannot be read.
    """
    if splits is None:
        return labelled_cases(dataset)
    folds = read_splits(dataset, splits)
    if not 0 <= fold < len(folds):
        found = f"folds 0 to {len(folds) - 1}" if folds else "no folds"
        raise ConfigError(f"fold {fold}: {splits} holds {found}")
    names = folds[fold][part]
    # the splits of a plan leave out the cases that it found to be incomplete
    layout = _layout(dataset)
    case_of = {case["case"]: case for case in layout.cases}
    unknown = [name for name in names if name not in case_of]
    if unknown:
        missing = _missing_files(layout)
        named = [f"{name} ({missing[name]})" if name in missing else name for name in unknown]
        raise ConfigError(
            f"{splits}, fold {fold}, {part}: cases that the dataset does not have: "
            + ", ".join(named[:MAX_NAMED])
        )
    return [case_of[name] for name in names]


def read_splits(
    dataset: PathOrStr | Sequence[PathOrStr], splits: str
) -> list[dict[str, list[str]]]:
    """Return the folds in a JSON file: per fold, `train` and `val` → names of the cases.

    Args:
        dataset: folder or folders, as for `labelled_cases`.
        splits: path of the file, relative to the dataset's first folder or to the working folder;
            `$NAME` is replaced by the value of the environment variable.

    Raises:
        ConfigError: the file does not exist, or holds something other than folds.
    """
    given = Path(expand_variables(splits))
    # the file inside the dataset comes first: a run then means the same in every working folder
    first = dataset_folders(dataset)[0]
    path = (first.parent if is_table(first) else first) / given
    if not path.is_file() and given.is_file():
        path = given
    folds = read_json(path)
    if not isinstance(folds, list) or not all(_is_fold(fold) for fold in folds):
        raise ConfigError(
            f"{splits}: expected a list of folds, each with the case names of `train` and `val`"
        )
    return folds


def _is_fold(content: object) -> bool:
    return isinstance(content, dict) and {"train", "val"} <= content.keys()


def training_cases(dataset: PathOrStr | Sequence[PathOrStr], run: Run) -> list[Case]:
    """Return the cases of one epoch of a run.

    These are the training cases of the run's fold, or all label maps if it synthesises its images,
    without those in `hold_out`. Each case is `repeats` times in the list.

    Args:
        dataset: folder or folders, as for `labelled_cases`.
        run: gives `splits`, `fold`, `synthesis`, `hold_out` and `repeats`.

    Raises:
        ConfigError: the dataset or the splits cannot be used, or `hold_out` names an unknown case.
    """
    if run.synthesis:
        cases = label_maps(dataset, run.synthesis.scans)
    else:
        cases = fold_cases(dataset, run.splits, run.fold, "train")
    unknown = set(run.hold_out) - {case["case"] for case in cases}
    if unknown:
        raise ConfigError(
            f"run.hold_out: expected names of training cases, got {', '.join(sorted(unknown))}"
        )
    return [case for case in cases if case["case"] not in run.hold_out] * run.repeats


def validation_cases(dataset: PathOrStr | Sequence[PathOrStr], run: Run) -> list[Case]:
    """Return the cases that a run is validated on: those that its fold holds out.

    A run without validation, without splits or with synthetic images has none.

    Args:
        dataset: folder or folders, as for `labelled_cases`.
        run: gives `validate_every`, `splits`, `fold` and `synthesis`.

    Raises:
        ConfigError: the dataset or the splits cannot be used.
    """
    if run.validate_every < 1 or run.splits is None or run.synthesis:
        return []
    return fold_cases(dataset, run.splits, run.fold, "val")


def label_maps(
    dataset: PathOrStr | Sequence[PathOrStr], scans: PathOrStr | None = None
) -> list[Case]:
    """Return one case per volume of a folder, with the volume as `label`.

    Args:
        dataset: the folder; of several, the first one.
        scans: folder of scans; a volume whose name one of them has gets that scan as `image`. The
            other volumes have no image.

    Raises:
        ConfigError: a folder does not exist, the first one holds no volume, or no scan has the name
            of a volume.
    """
    folder = dataset_folders(dataset)[0]
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder of label maps")
    volumes = [path for path in sorted(folder.iterdir()) if image_suffix(path)]
    if not volumes:
        raise ConfigError(f"{folder}: expected label maps, found no volume")
    cases: list[Case] = [{"case": image_stem(path), "label": str(path)} for path in volumes]
    if scans is None:
        return cases
    scans_folder = dataset_folders(scans)[0]
    scan_of = {image_stem(p): p for p in sorted(scans_folder.iterdir()) if image_suffix(p)}
    with_scan: list[Case] = [
        {**case, "image": str(scan_of[case["case"]])} if case["case"] in scan_of else case
        for case in cases
    ]
    if with_scan == cases:
        raise ConfigError(f"{scans_folder}: expected scans with the names of the label maps")
    return with_scan


def expand_variables(path: PathOrStr) -> str:
    """Return a path with each `$NAME` replaced by the value of the environment variable.

    Raises:
        ConfigError: a variable is not set.
    """
    text = os.path.expandvars(os.fspath(path))
    if "$" in text:
        raise ConfigError(f"{path}: set the environment variable that it names")
    return text


def dataset_folders(dataset: PathOrStr | Sequence[PathOrStr]) -> list[Path]:
    """Return the folders of a dataset, or its table, with environment variables replaced.

    Raises:
        ConfigError: a variable is not set, or a path does not exist.
    """
    paths = [dataset] if isinstance(dataset, str | os.PathLike) else list(dataset)
    folders = [Path(expand_variables(path)) for path in paths]
    for folder in folders:
        if not folder.is_dir() and not is_table(folder):
            raise ConfigError(
                f"{folder}: no such folder; expected a dataset, or a CSV of its cases"
            )
    return folders
