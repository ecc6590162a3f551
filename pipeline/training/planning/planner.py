"""Planning a training run: read the cases, choose settings, time a few steps, write the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import BundlePaths, Run, Spec, parse_config
from pipeline.errors import ConfigError
from pipeline.inference import resolve_device
from pipeline.io import Layout, Problem, find_pairs
from pipeline.training.planning.choices import (
    Choice,
    choose_duration,
    choose_settings,
    nested_values,
    training_length,
)
from pipeline.training.planning.files import write_plan
from pipeline.training.planning.fingerprint import Fingerprint, take_fingerprints
from pipeline.training.planning.folds import make_folds
from pipeline.training.planning.timing import time_training
from pipeline.types import Case

TIMED_CASES = 4  # number of cases that training steps are timed on
MIN_CASES = 2  # one to train on, one to validate on


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A planned training run.

    Attributes:
        layout: layout of the dataset.
        cases: number of usable cases.
        problems: why other cases and files are not used.
        choices: all settings that were chosen, each with its reason.
        seconds: expected wall time of training one fold on this machine.
    """

    layout: Layout
    cases: int
    problems: list[Problem]
    choices: list[Choice]
    seconds: float


def plan_training(
    folders: Sequence[Path],
    path: Path,
    *,
    minutes: float,
    dims: int = 3,
    start_progress: Callable[[int], Callable[[str], None]] = lambda _: lambda __: None,
) -> Plan:
    """Plan a training run for a dataset, and write the run and a bundle without weights.

    The bundle is the folder next to the run that has the same name without `.yaml`.

    Args:
        folders: the dataset's folder, or a folder of images and a folder of labels.
        path: YAML file of the run, which is written.
        minutes: largest wall time of training one fold on this machine, minutes.
        dims: 2 for a network of slices, 3 for one of volumes.
        start_progress: called with the number of cases before they are read; the function that it
            returns is called with the name of each case after it has been read.

    Raises:
        ConfigError: no labelled cases are found, fewer than `MIN_CASES` of them can be used, or
            run or spec already exist.
    """
    paths = BundlePaths(path.with_suffix(""))
    _check_new(path, paths)
    layout = find_pairs(folders)
    fingerprints, problems = take_fingerprints(layout, start_progress(len(layout.cases)))
    problems = layout.problems + problems
    if len(fingerprints) < MIN_CASES:
        raise ConfigError(
            f"{folders[0]}: {len(fingerprints)} of {len(layout.cases)} cases can be used, "
            f"expected {MIN_CASES} or more\n{problem_table(problems)}"
        )
    splits = make_folds(
        [fingerprint.case for fingerprint in fingerprints],
        subjects=layout.subjects,
        folds=layout.folds,
    )
    choices = choose_settings(
        fingerprints,
        layout.labels or _numbered_labels(fingerprints, layout.label_names),
        layout.channels or ("MR",),
        "cpu" if resolve_device("auto").type == "cpu" else "gpu",
        dims,
    )
    location = {"bundle": str(paths.folder), "dataset": _dataset_setting(folders)}
    # `epochs` is required, but follows from the times that are measured with this run
    run = parse_config(Run, {**nested_values(choices, "run."), **location, "epochs": 1}, "run")
    training_cases = len(splits[0]["train"])
    times = time_training(
        parse_config(Spec, nested_values(choices, "spec."), "spec"),
        run,
        _sample(layout.cases, fingerprints),
        training_cases=training_cases,
        validation_cases=len(splits[0]["val"]),
    )
    steps = max(1, training_cases // run.cases_per_step)
    epochs, seconds = training_length(minutes, steps, times)
    choices += choose_duration(minutes, epochs, steps, times)
    write_plan(path, location, choices, splits, layout)
    return Plan(
        layout=layout,
        cases=len(fingerprints),
        problems=problems,
        choices=choices,
        seconds=seconds,
    )


def problem_table(problems: Sequence[Problem]) -> str:
    """Return the problems as a table: one line per problem, with the case and the message."""
    width = max((len(problem.case) for problem in problems), default=0)
    return "\n".join(f"{problem.case:{width}}  {problem.message}" for problem in problems)


def _check_new(path: Path, paths: BundlePaths) -> None:
    """Raise ConfigError if run or spec exist, which the user may have edited or trained."""
    for existing in (path, paths.spec):
        if existing.exists():
            raise ConfigError(f"{existing}: already exists; choose another name, or move it away")


def _numbered_labels(
    fingerprints: Sequence[Fingerprint], names: Mapping[int, str]
) -> dict[str, int]:
    """Return the labels that occur, for datasets that do not define which do.

    Args:
        fingerprints: fingerprints of all usable cases.
        names: value → name; other labels are named by their values.
    """
    values: set[int] = set()
    for fingerprint in fingerprints:
        values.update(fingerprint.label_voxels)
    return {"background": 0} | {names.get(v, f"label {v}"): v for v in sorted(values)}


def _dataset_setting(folders: Sequence[Path]) -> Any:
    """Return the run's `dataset`: one path, or a list of two."""
    return str(folders[0]) if len(folders) == 1 else [str(folder) for folder in folders]


def _sample(cases: Sequence[Case], fingerprints: Sequence[Fingerprint]) -> list[Case]:
    """Return a few usable cases, evenly spread over the dataset."""
    step = max(1, len(fingerprints) // TIMED_CASES)
    names = {fingerprint.case for fingerprint in fingerprints[::step]}
    return [case for case in cases if case["case"] in names][:TIMED_CASES]
