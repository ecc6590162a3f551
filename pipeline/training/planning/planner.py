"""Planning a training run: read the cases, choose settings, time a few steps, write the files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import BundlePaths, Run, Spec, TrainingPrecision, parse_config
from pipeline.errors import ConfigError
from pipeline.inference import resolve_device
from pipeline.io import Layout, Problem, find_pairs
from pipeline.training.planning.choices import (
    Choice,
    choose_duration,
    choose_larger_network,
    choose_settings,
    nested_values,
    steps_in_time,
    time_warnings,
    training_length,
)
from pipeline.training.planning.files import write_plan
from pipeline.training.planning.fingerprint import Fingerprint, take_fingerprints
from pipeline.training.planning.folds import make_folds
from pipeline.training.planning.presets import PresetName
from pipeline.training.planning.timing import TrainingTimes, time_training
from pipeline.types import Case

TIMED_CASES = 4  # number of cases that training steps are timed on
BUSY = 1.5  # load per core above which the measured times are those of a busy machine
MIN_CASES = 2  # one to train on, one to validate on


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A planned training run.

    Attributes:
        layout: layout of the dataset.
        cases: number of usable cases.
        problems: why other cases and files are not used.
        choices: all settings that were chosen, each with its reason.
        seconds: expected wall time of training one fold on this machine, at most the time limit.
        warnings: what the user should know before training, such as a time limit that is too short.
    """

    layout: Layout
    cases: int
    problems: list[Problem]
    choices: list[Choice]
    seconds: float
    warnings: list[str]


def plan_training(
    folders: Sequence[Path],
    path: Path,
    *,
    minutes: float,
    dims: int = 3,
    preset: PresetName = "balanced",
    start_progress: Callable[[int], Callable[[str], None]] = lambda _: lambda __: None,
) -> Plan:
    """Plan a training run for a dataset, and write the run and a bundle without weights.

    The bundle is the folder next to the run that has the same name without `.yaml`.

    Args:
        folders: the dataset's folder, or a folder of images and a folder of labels.
        path: YAML file of the run, which is written.
        minutes: largest wall time of training one fold on this machine, minutes, its reading and
            final validation included.
        dims: 2 for a network of slices, 3 for one of volumes.
        preset: how much of that time is spent on accuracy.
        start_progress: called with the number of cases before they are read; the function that it
            returns is called with the name of each case after it has been read.

    Raises:
        ConfigError: no labelled cases are found, fewer than `MIN_CASES` of them can be used, none
            of them has a labelled voxel, or run or spec already exist.
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
    if not any(fingerprint.has_foreground for fingerprint in fingerprints):
        raise ConfigError(
            f"{folders[0]}: none of {len(fingerprints)} label maps has a labelled voxel, expected "
            "structures to learn"
        )
    splits = make_folds(
        [fingerprint.case for fingerprint in fingerprints],
        subjects=layout.subjects,
        folds=layout.folds,
    )
    timed = _TimedPlan(
        location={"bundle": str(paths.folder), "dataset": _dataset_setting(folders)},
        cases=_sample(layout.cases, fingerprints),
        training_cases=len(splits[0]["train"]),
        validation_cases=len(splits[0]["val"]),
        minutes=minutes,
    )
    choices = choose_settings(
        fingerprints,
        layout.labels or _numbered_labels(fingerprints, layout.label_names),
        layout,
        "cpu" if resolve_device("auto").type == "cpu" else "gpu",
        dims,
        preset=preset,
        training_cases=timed.training_cases,
    )
    choices, times = timed.choose(choices, preset)
    steps = timed.steps_per_epoch(choices)
    epochs, seconds = training_length(minutes, steps, times)
    choices += choose_duration(minutes, epochs, steps, times)
    write_plan(path, timed.location, choices, splits, layout, problems)
    return Plan(
        layout=layout,
        cases=len(fingerprints),
        problems=problems,
        choices=choices,
        seconds=min(seconds, 60 * minutes),
        warnings=time_warnings(minutes, times) + _load_warnings(),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _TimedPlan:
    """What the times of a run depend on besides its settings.

    Attributes:
        location: the settings `bundle` and `dataset` of the run.
        cases: a few cases to time steps on.
        training_cases: number of cases that a fold trains on.
        validation_cases: number of cases that it holds out.
        minutes: time limit of the run, minutes.
    """

    location: dict[str, Any]
    cases: list[Case]
    training_cases: int
    validation_cases: int
    minutes: float

    def choose(
        self, choices: list[Choice], preset: PresetName
    ) -> tuple[list[Choice], TrainingTimes]:
        """Return the choices with as large a network as the time allows, and its times."""
        times = self._time(choices)
        steps = steps_in_time(self.minutes, times)
        larger = choose_larger_network(choices, steps, preset)
        if larger != choices:
            times = self._time(larger, [times.precision])
        return larger, times

    def steps_per_epoch(self, choices: Sequence[Choice]) -> int:
        run = self._run(choices)
        return max(1, self.training_cases * run.repeats // run.cases_per_step)

    def _run(self, choices: Sequence[Choice]) -> Run:
        # `epochs` is required, but follows from the times that are measured with this run
        content = {**nested_values(choices, "run."), **self.location, "epochs": 1}
        return parse_config(Run, content, "run")

    def _time(
        self, choices: Sequence[Choice], precisions: Sequence[TrainingPrecision] = ()
    ) -> TrainingTimes:
        return time_training(
            parse_config(Spec, nested_values(choices, "spec."), "spec"),
            self._run(choices),
            self.cases,
            training_cases=self.training_cases,
            validation_cases=self.validation_cases,
            precisions=precisions,
        )


def _load_warnings() -> list[str]:
    """Return a warning if other processes use the processor: then all times are too long."""
    if not hasattr(os, "getloadavg"):  # Windows
        return []
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    # planning itself loads all cores
    if load <= BUSY * cores:
        return []
    return [
        f"this machine is busy (load {load:.0f} on {cores} cores): the times above are longer than "
        "on a quiet one; plan again when it is quiet, or train under the same load"
    ]


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
