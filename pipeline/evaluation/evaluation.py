"""Evaluation of a model: segment labelled cases, score them and write tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.batch import Progress, output_path, segment_cases
from pipeline.evaluation.figures import draw_dice
from pipeline.evaluation.metrics import TOLERANCE_MM
from pipeline.evaluation.overlays import ComparedCase, draw_worst_cases
from pipeline.evaluation.scores import (
    ScoreRow,
    SummaryRow,
    score_case,
    summarise_scores,
    worst_cases,
    write_scores,
)
from pipeline.inference import Model
from pipeline.io import read, write_json
from pipeline.types import Case, PathOrStr

WORST_CASES = 3  # cases in worst.png: what goes wrong most, on one page


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Scores of a model on labelled cases.

    Attributes:
        scores: one row per case and label; a case that failed is scored as if its prediction were
            empty.
        summary: one row per label and, with several labels, one for their mean.
        failed: name of the case → why it could not be segmented.
        tolerance_mm: tolerance of the surface Dice (`nsd`) in `scores`, mm.
    """

    scores: Sequence[ScoreRow]
    summary: Sequence[SummaryRow]
    failed: Mapping[str, str]
    tolerance_mm: float


def evaluate(
    model: Model,
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
    summary.json (means with bootstrap 95 % intervals), dice.png (Dice of each case) and worst.png
    (the cases with the lowest Dice).

    Args:
        model: opened bundle.
        cases: labelled cases, each with `image` and the path `label`.
        output_dir: folder of the results; created if it does not exist.
        tolerance_mm: tolerance of the surface Dice (`nsd`), mm.
        overwrite: whether cases that are already segmented are segmented again.
        progress: called with the row of each case after it has been segmented.

    Raises:
        ConfigError: the folder contains results of another model.
        GeometryError: an image and its label map are on different grids.
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
    write_scores(output / "scores.csv", evaluation.scores)
    write_json(
        output / "summary.json",
        {
            "tolerance_mm": tolerance_mm,
            "labels": [row.columns() for row in evaluation.summary],
        },
    )
    draw_dice(evaluation.scores, output / "dice.png", title=Path(model.root).resolve().name)
    _draw_worst(cases, evaluation.scores, output, model.spec.labels)
    return evaluation


def segment_and_score(
    model: Model,
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
        GeometryError: an image and its label map are on different grids.
    """
    output = Path(output_dir)
    results = segment_cases(model, cases, output, overwrite=overwrite, progress=progress)
    scores: list[ScoreRow] = []
    for case in cases:
        prediction = output_path(output, case["case"])
        scores += score_case(case, prediction, model.spec.labels, tolerance_mm=tolerance_mm)
    return Evaluation(
        scores=scores,
        summary=summarise_scores(scores),
        failed={row.case: row.error for row in results if row.is_failure},
        tolerance_mm=tolerance_mm,
    )


def _draw_worst(
    cases: Sequence[Case], scores: Sequence[ScoreRow], output: Path, names: Mapping[str, int]
) -> None:
    """Write worst.png with the segmented cases of lowest Dice; write nothing if none is scored."""
    segmented = {}
    for case in cases:
        if output_path(output, case["case"]).is_file():
            segmented[case["case"]] = case
    drawn = []
    for name in worst_cases([row for row in scores if row.case in segmented], WORST_CASES):
        image = segmented[name]["image"]
        first_channel = image[0] if isinstance(image, list | tuple) else image
        drawn.append(
            ComparedCase(
                title=name,
                image=read(first_channel),
                prediction=read(output_path(output, name)),
                reference=read(segmented[name]["label"]),
            )
        )
    if drawn:
        draw_worst_cases(drawn, names, output / "worst.png")
