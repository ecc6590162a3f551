"""Evaluation of a model: segment labelled cases, score them and write tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.batch import Progress, output_path, segment_cases
from pipeline.errors import PipelineError
from pipeline.evaluation.figures import draw_dice
from pipeline.evaluation.metrics import TOLERANCE_MM
from pipeline.evaluation.overlays import ComparedCase, draw_worst_cases
from pipeline.evaluation.scores import (
    ScoreRow,
    SummaryRow,
    mean_dice_of_cases,
    score_case,
    summarise_scores,
    worst_cases,
    write_scores,
)
from pipeline.inference import CaseModel, Model
from pipeline.io import read, read_channels, read_label_map, write_csv, write_json
from pipeline.types import Case, PathOrStr

WORST_CASES = 3  # cases in worst.png: what goes wrong most, on one page


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Scores of a model on labelled cases.

    Attributes:
        scores: one row per case and label; a case that could not be segmented is scored as if its
            prediction were empty, one without a usable label map is not scored.
        summary: one row per label and, with several labels, one for their mean.
        failed: name of the case → why it could not be segmented or scored.
        tolerance_mm: tolerance of the surface Dice (`nsd`) in `scores`, mm.
    """

    scores: Sequence[ScoreRow]
    summary: Sequence[SummaryRow]
    failed: Mapping[str, str]
    tolerance_mm: float


def evaluate(
    model: CaseModel,
    cases: Sequence[Case],
    output_dir: PathOrStr,
    *,
    tolerance_mm: float = TOLERANCE_MM,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Segment labelled cases, score the predictions, and write tables and pictures.

    Predictions are compared with the label maps as read from their files. Written to `output_dir`,
    besides what `segment_cases` writes there, are scores.csv (one row per case and label),
    summary.csv and summary.json (means with bootstrap 95 % intervals, medians, counts), dice.png
    and worst.png (the cases with the lowest Dice).

    Args:
        model: opened bundle.
        cases: labelled cases, each with `image` and the path `label`.
        output_dir: folder of the results; created if it does not exist.
        tolerance_mm: tolerance of the surface Dice (`nsd`), mm.
        overwrite: whether cases that are already segmented are segmented again.
        progress: called with the row of each case after it has been segmented.

    Raises:
        ConfigError: the folder contains results of another model.
    """
    output = Path(output_dir)
    evaluation = segment_and_score(
        model,
        cases,
        output,
        tolerance_mm=tolerance_mm,
        overwrite=overwrite,
        progress=progress,
    )
    table = [row.columns() for row in evaluation.summary]
    write_scores(output / "scores.csv", evaluation.scores)
    write_csv(output / "summary.csv", table)
    write_json(
        output / "summary.json",
        {"tolerance_mm": tolerance_mm, "failed": dict(evaluation.failed), "labels": table},
    )
    if evaluation.scores:
        draw_dice(evaluation.scores, output / "dice.png", title=Path(model.root).resolve().name)
        _draw_worst(cases, evaluation, output, model)
    return evaluation


def segment_and_score(
    model: CaseModel,
    cases: Sequence[Case],
    output_dir: PathOrStr,
    *,
    tolerance_mm: float = TOLERANCE_MM,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Segment labelled cases and score the predictions, without writing scores or pictures.

    Only the files of `segment_cases` are written.

    Args:
        model: opened bundle.
        cases: labelled cases, each with `image` and the path `label`.
        output_dir: folder of the predictions; created if it does not exist.
        tolerance_mm: tolerance of the surface Dice (`nsd`), mm.
        overwrite: whether cases that are already segmented are segmented again.
        progress: called with the row of each case after it has been segmented.

    Raises:
        ConfigError: the folder contains results of another model.
    """
    output = Path(output_dir)
    results = segment_cases(model, cases, output, overwrite=overwrite, progress=progress)
    failed = {row.case: row.error for row in results if row.is_failure}
    structures, ignore_label = _structures(model, cases), _ignore_label(model)
    scores: list[ScoreRow] = []
    for case in cases:
        name = case["case"]
        # an older prediction may still be there, which is not this model's
        prediction = None if name in failed else output_path(output, name)
        try:
            scores += score_case(
                case,
                prediction,
                structures,
                ignore_label=ignore_label,
                tolerance_mm=tolerance_mm,
            )
        except PipelineError as error:
            failed[name] = f"{failed[name]}; {error}" if name in failed else str(error)
    return Evaluation(
        scores=scores,
        summary=summarise_scores(scores),
        failed=failed,
        tolerance_mm=tolerance_mm,
    )


def _structures(model: CaseModel, cases: Sequence[Case]) -> Mapping[str, int | Sequence[int]]:
    """Return the name of each structure that is scored, and its values in label maps.

    A bundle in MONAI's form may not say which values its labels have: those of the references are
    scored then.
    """
    if isinstance(model, Model):
        return model.spec.values_of
    named = {name: value for name, value in model.labels.items() if value}
    return named or {f"label {value}": value for value in _reference_values(cases)}


def _reference_values(cases: Sequence[Case]) -> list[int]:
    """Return the values in the reference label maps, as far as these can be read."""
    values: set[int] = set()
    for case in cases:
        with suppress(PipelineError):  # it is reported where it is scored
            values.update(read_label_map(case["label"]).voxels)
    return sorted(values - {0})


def _ignore_label(model: CaseModel) -> int | None:
    return model.spec.ignore_label if isinstance(model, Model) else None


def _draw_worst(
    cases: Sequence[Case], evaluation: Evaluation, output: Path, model: CaseModel
) -> None:
    """Write worst.png with the segmented cases of lowest Dice; write nothing if none is scored."""
    segmented = {case["case"]: case for case in cases if case["case"] not in evaluation.failed}
    rows = [row for row in evaluation.scores if row.case in segmented]
    dice_of_case = mean_dice_of_cases(rows)
    drawn = []
    for name in worst_cases(rows, WORST_CASES):
        case = segmented[name]
        drawn.append(
            ComparedCase(
                title=f"{name}, mean Dice {dice_of_case[name]:.3f}",
                image=read_channels(case["image"], len(model.channels))[0],
                prediction=read(output_path(output, name)),
                reference=read(case["label"]),
            )
        )
    if drawn:
        labels = model.labels
        if len(labels) < 2:
            values = _reference_values([segmented[name] for name in worst_cases(rows, WORST_CASES)])
            labels = {"background": 0, **{f"label {value}": value for value in values}}
        picture = output / "worst.png"
        draw_worst_cases(drawn, labels, picture, ignore_label=_ignore_label(model))
