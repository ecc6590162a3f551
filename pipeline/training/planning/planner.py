"""A plan on disk: the run's YAML, and a bundle that holds all but the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Run, Spec, parse_config
from pipeline.errors import ConfigError
from pipeline.inference import resolve_device
from pipeline.io import Layout, find_pairs, write_atomically, write_json
from pipeline.training.planning.choices import (
    Choice,
    choose_settings,
    commented_yaml,
    make_folds,
    nested_values,
    training_length,
)
from pipeline.training.planning.fingerprint import Fingerprint, Problem, take_fingerprints
from pipeline.training.planning.timing import TrainingTimes, time_training

SAMPLE = 4  # cases that the pace is measured on
MANY_STEPS = 200  # steps that an average of weights reaches back, at most; a tenth of the run if that is less


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What `plan` found and wrote.

    Attributes:
        layout: of the dataset.
        cases: that can be used.
        problems: (case, what is wrong) of the others, and of files that are no case.
        choices: each setting with its reason.
        seconds: that training one fold will take here.
    """

    layout: Layout
    cases: int
    problems: list[Problem]
    choices: list[Choice]
    seconds: float


def plan_training(
    places: Sequence[Path],
    path: Path,
    *,
    minutes: float,
    dims: int = 3,
    looked: Callable[[int], Callable[[str], None]] = lambda _: lambda __: None,
) -> Plan:
    """Surveys a dataset, chooses, measures, and writes `path` and the bundle beside it, a folder of its name.

    Args:
        places: a dataset's folder, or one of images and one of labels.
        path: the run's YAML.
        minutes: that training one fold may take.
        dims: 2 for a network of slices.
        looked: called with the number of cases; what it returns is called with each case's name once it was looked at.

    Raises:
        ConfigError: no dataset, too few cases that can be used, or files that are there already.
    """
    root = path.with_suffix("")
    for there in (path, root / "configs" / "spec.yaml"):
        if there.exists():
            raise ConfigError(f"{there}: is there already; choose another name, or move it away")
    layout = find_pairs(places)
    prints, wrong = take_fingerprints(layout.cases, layout.labels, looked(len(layout.cases)))
    problems = layout.problems + wrong
    if len(prints) < 2:
        raise ConfigError(
            f"{places[0]}: {len(prints)} of {len(layout.cases)} cases can be used, expected 2 or more\n"
            + problem_table(problems)
        )
    labels = layout.labels or _values(prints)
    splits = make_folds([p.case for p in prints])
    device = "cpu" if resolve_device("auto").type == "cpu" else "gpu"
    choices = choose_settings(prints, labels, layout.channels or ("MR",), device, dims)
    spec = parse_config(Spec, nested_values(choices, "spec."), "spec")
    settings = nested_values(choices, "run.") | {
        "bundle": str(root),
        "dataset": _spelt(places),
        "epochs": 1,
    }
    run = parse_config(Run, settings, "run")
    chosen = {p.case for p in prints[:: max(1, len(prints) // SAMPLE)]}
    training, validation = len(splits[0]["train"]), len(splits[0]["val"])
    measured = time_training(
        spec,
        run,
        [case for case in layout.cases if case["case"] in chosen][:SAMPLE],
        training,
        validation,
    )
    steps = max(1, training // run.cases_per_step)
    epochs, total = training_length(minutes, steps, measured)
    choices += _duration(minutes, epochs, steps, measured)
    _write(path, root, layout, choices, splits, settings)
    return Plan(layout=layout, cases=len(prints), problems=problems, choices=choices, seconds=total)


def problem_table(problems: Sequence[Problem]) -> str:
    """One line a problem."""
    width = max((len(case) for case, _ in problems), default=0)
    return "\n".join(f"{case:{width}}  {what}" for case, what in problems)


def _values(prints: Sequence[Fingerprint]) -> dict[str, int]:
    """Names of labels that nobody has named."""
    values = sorted({value for p in prints for value in p.voxels})
    return {"background": 0} | {f"label {value}": value for value in values}


def _spelt(places: Sequence[Path]) -> str | list[str]:
    return str(places[0]) if len(places) == 1 else [str(place) for place in places]


def _duration(minutes: float, epochs: int, steps: int, pace: TrainingTimes) -> list[Choice]:
    decay = round(1 - 1 / max(2, min(MANY_STEPS, epochs * steps // 10)), 4)
    measured = ", ".join(f"{seconds:.2f} s in {name}" for name, seconds in pace.steps.items())
    return [
        Choice(name="run.precision", value=pace.precision, why=f"the faster one here: a step takes {measured}"),
        Choice(name="run.epochs", value=epochs, why=f"{steps} steps of {pace.step:.2f} s each, measured here"),
        Choice(name="run.minutes", value=minutes, why="the most it may take; the learning rate falls in time"),
        Choice(name="run.ema_decay", value=decay, why="the weights that are kept are an average over the last steps"),
        Choice(name="run.validate_every", value=epochs, why="once, at the end; each time takes "
               f"{pace.validation:.0f} s"),
    ]  # fmt: skip


def _write(
    path: Path,
    root: Path,
    layout: Layout,
    choices: Sequence[Choice],
    splits: list[dict[str, list[str]]],
    settings: dict[str, Any],
) -> None:
    why = {choice.name.partition(".")[2]: choice.why for choice in choices}
    head = (
        "What these weights are trained to see and to say. Changing any of it makes them invalid."
    )
    write_atomically(
        root / "configs" / "spec.yaml",
        commented_yaml(nested_values(choices, "spec."), why, head).encode(),
    )
    write_json(root / "configs" / "splits.json", splits)
    card = {
        "name": root.name,
        "description": f"A U-Net that segments {', '.join(list(nested_values(choices, 'spec.')['labels'])[1:])}.",
        "task": "Segmentation of MR images",
        "authors": "to be named",
        "copyright": "to be named",
        "intended_use": "Research; not a medical device, not for diagnosis.",
        "data_source": f"{layout.kind}{', ' + layout.licence if layout.licence else ''}",
        "data_type": "NIfTI",
        "references": [],
        "eval_metrics": {},
        "changelog": {"0.1.0": "first weights"},
    }
    write_atomically(
        root / "configs" / "card.yaml",
        commented_yaml(card, {}, "What a reader should know: complete it.").encode(),
    )
    content = {
        "bundle": settings["bundle"],
        "dataset": settings["dataset"],
        "splits": str(root / "configs" / "splits.json"),
        "fold": 0,
        **nested_values(choices, "run."),
    }
    write_atomically(
        path,
        commented_yaml(content, why, "How the training goes: volseg train " + path.name).encode(),
    )
