"""The report of a training run, in Markdown (train/report.md), from the files of its bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import yaml

from pipeline.config import BundlePaths
from pipeline.evaluation import ScoreRow, mean_dice_of_cases, read_scores, worst_cases
from pipeline.io import read_csv, read_json
from pipeline.report.markdown import markdown_table

WORST_CASES = 5
SHOWN_EPOCHS = 12  # lines of the table of the course; history.csv has all
MAX_VALUE = 60  # characters of a setting's value in the table of the plan


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRecord:
    """What a bundle's files say of its training run.

    Attributes:
        name: name of the bundle's folder.
        run: content of run.yaml.
        spec: content of spec.yaml.
        plan: content of plan.json; empty if the run was not planned.
        history: rows of history.csv, column → text.
        scores: Dice of each validation case; empty without a validation.
    """

    name: str
    run: Mapping[str, Any]
    spec: Mapping[str, Any]
    plan: Mapping[str, Any]
    history: Sequence[Mapping[str, str]]
    scores: Sequence[ScoreRow]


def read_training_record(paths: BundlePaths) -> TrainingRecord:
    """Return what the files of a trained bundle say of its training run.

    Raises:
        ConfigError: run.yaml or spec.yaml is missing.
    """
    history = read_csv(paths.training / "history.csv")
    # the file may be that of an earlier run, which validated
    validated = any(row.get("dice") for row in history) and paths.validation_scores.is_file()
    return TrainingRecord(
        name=paths.folder.resolve().name,
        run=yaml.safe_load(paths.run.read_text(encoding="utf-8")),
        spec=yaml.safe_load(paths.spec.read_text(encoding="utf-8")),
        plan=_plan(paths),
        history=history,
        scores=read_scores(paths.validation_scores) if validated else [],
    )


def _plan(paths: BundlePaths) -> Mapping[str, Any]:
    """Return plan.json of a bundle, or of the bundle that it is a fold of; empty if none has it."""
    for owner in (paths, BundlePaths(paths.folder.parent.parent)):
        if owner.plan.is_file():
            content: Mapping[str, Any] = read_json(owner.plan)
            return content
    return {}


def training_page(record: TrainingRecord) -> str:
    """Return the report of a training run: result, worst cases, course and plan, as Markdown."""
    parts = [f"# Training of {record.name}", _introduction(record)]
    if record.scores:
        parts += ["## Scores", _scores(record), "## Worst cases", _worst(record.scores)]
    else:
        parts += ["## Scores", "The run did not score any case (`validate_every: 0`)."]
    parts += ["## Course", "![Loss, Dice, seconds and learning rate per epoch](progress.png)"]
    parts += [_course(record.history), "All epochs are in `history.csv`."]
    if record.plan:
        parts += ["## Plan", _plan_text(record)]
    return "\n\n".join(parts) + "\n"


def _introduction(record: TrainingRecord) -> str:
    training = sum(_number(row.get("seconds")) for row in record.history)
    validation = sum(_number(row.get("validation_seconds")) for row in record.history)
    dataset = record.run.get("dataset")
    folders = dataset if isinstance(dataset, str) else " and ".join(dataset or [])
    lines = [
        f"- Data: `{folders}`, fold {record.run.get('fold', 0)}.",
        f"- Structures: {', '.join(list(record.spec['labels'])[1:])}.",
        f"- Epochs: {len(record.history)}, in {training / 60:.1f} minutes of training and "
        f"{validation / 60:.1f} minutes of validation.",
    ]
    if record.run.get("minutes"):
        lines.append(f"- Time limit: {record.run['minutes']} minutes.")
    lines.append(
        f"- To repeat it: `volseg train {record.run['bundle']}/configs/run.yaml`, in the folder "
        "that its paths are relative to."
    )
    return "\n".join(lines)


def _scores(record: TrainingRecord) -> str:
    """Return a table of the validation cases' Dice, one line per label, the lowest mean first."""
    values: dict[str, list[float]] = {}
    for row in record.scores:
        found = values.setdefault(row.label, [])
        if row.score.dice == row.score.dice:  # not nan
            found.append(row.score.dice)
    scored = {label: found for label, found in values.items() if found}
    lines = []
    for label in sorted(scored, key=lambda name: fmean(scored[name])):
        found = scored[label]
        misses = sum(score == 0 for score in found)
        numbers = (fmean(found), median(found), min(found))
        lines.append([label, len(found), *(f"{number:.4f}" for number in numbers), misses])
    means = list(mean_dice_of_cases(record.scores).values())
    if len(scored) > 1 and means:
        numbers = (fmean(means), median(means), min(means))
        lines.append(["mean of labels", len(means), *(f"{x:.4f}" for x in numbers), ""])
    table = markdown_table(["label", "cases", "mean", "median", "lowest", "Dice 0"], lines)
    kept = "best" if record.run.get("keep") == "best" else "last"
    note = f"Dice of the held-out cases with the {kept} weights, each case on its own grid."
    if kept == "best":
        note += " These scores chose the weights, so they are optimistic."
    unscored = [label for label, found in values.items() if not found]
    if unscored:
        note += f" No held-out case has {', '.join(unscored)}."
    return f"{note}\n\n{table}"


def _worst(rows: Sequence[ScoreRow]) -> str:
    dice_of_case = mean_dice_of_cases(rows)
    lines = []
    for case in worst_cases(rows, WORST_CASES):
        of_case = [row for row in rows if row.case == case and row.score.dice == row.score.dice]
        lowest = min(of_case, key=lambda row: row.score.dice)
        lines.append(
            [case, f"{dice_of_case[case]:.4f}", f"{lowest.label}, {lowest.score.dice:.4f}"]
        )
    return markdown_table(["case", "mean Dice", "lowest label"], lines)


def _course(history: Sequence[Mapping[str, str]]) -> str:
    """Return a table of a few epochs, evenly spaced, the last one and validated ones first."""
    step = max(1, -(-len(history) // SHOWN_EPOCHS))
    shown = [row for number, row in enumerate(history, start=1) if number % step == 0]
    if history and (not shown or shown[-1] is not history[-1]):
        shown.append(history[-1])
    lines = []
    for row in shown:
        dice = f"{_number(row['dice']):.4f}" if row.get("dice") else ""
        seconds = [f"{_number(row.get(name)):.1f}" for name in ("seconds", "validation_seconds")]
        rate = f"{_number(row.get('learning_rate')):.2g}"
        lines.append([row["epoch"], f"{_number(row.get('loss')):.4f}", dice, rate, *seconds])
    header = ["epoch", "loss", "Dice", "learning rate", "training, s", "validation, s"]
    return markdown_table(header, lines)


def _plan_text(record: TrainingRecord) -> str:
    plan = record.plan
    left_out = plan.get("left_out", {})
    text = f"{plan.get('cases')} cases ({plan.get('dataset')}) were planned for."
    if left_out:
        named = "\n".join(f"- {case}: {reason}" for case, reason in left_out.items())
        text += f" {len(left_out)} files or cases were left out:\n\n{named}"
    lines = []
    for choice in plan.get("choices", []):
        part, _, key = choice["name"].partition(".")
        value = {"run": record.run, "spec": record.spec}[part].get(key)
        shown = _shown(choice["value"])
        if value != choice["value"]:
            shown = f"{_shown(value)} (planned: {shown})"
        lines.append([f"`{choice['name']}`", shown, choice["reason"]])
    return f"{text}\n\n{markdown_table(['setting', 'value', 'reason'], lines)}"


def _shown(value: Any) -> str:
    """Return the value of a setting as text, cut where it is long."""
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True
    )
    # PyYAML writes a line "..." after a scalar, the end of its document
    text = text.removesuffix("...\n").strip()
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 1]}…"


def _number(text: object) -> float:
    """Return the number in a cell of a table; 0 for an empty or missing one."""
    return float(str(text)) if text not in (None, "") else 0.0
