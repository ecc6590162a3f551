"""Evaluation: how well predictions agree with reference labels, each case on its file's own grid.

- `metrics`: metrics of two masks: Dice, surface distances, volumes.
- `scores`: rows of scores, their summary, and the comparison of two results.
- `evaluation`: segment and score the cases of a dataset.
- `quality_fit`: fits of the predicted Dice, and how good they are.
- `figures`: charts of Dice and of a training run.
- `overlays`: labels drawn over slices of a volume.
"""

from pipeline.evaluation.evaluation import Evaluation, evaluate, segment_and_score
from pipeline.evaluation.figures import draw_dice, draw_training_curves
from pipeline.evaluation.metrics import METRICS, TOLERANCE_MM, LabelScore, dice, score_masks
from pipeline.evaluation.overlays import ComparedCase, draw_overlay, draw_worst_cases
from pipeline.evaluation.quality_fit import (
    QualityCase,
    QualityScore,
    fit_quality,
    nested_quality,
    score_quality,
)
from pipeline.evaluation.scores import (
    Comparison,
    Mean,
    ScoreRow,
    SummaryRow,
    compare_scores,
    mean_dice_of_cases,
    read_scores,
    score_case,
    summarise_scores,
    worst_cases,
    write_scores,
)

__all__ = [
    "METRICS",
    "TOLERANCE_MM",
    "ComparedCase",
    "Comparison",
    "Evaluation",
    "LabelScore",
    "Mean",
    "QualityCase",
    "QualityScore",
    "ScoreRow",
    "SummaryRow",
    "compare_scores",
    "dice",
    "draw_dice",
    "draw_overlay",
    "draw_training_curves",
    "draw_worst_cases",
    "evaluate",
    "fit_quality",
    "mean_dice_of_cases",
    "nested_quality",
    "read_scores",
    "score_case",
    "score_masks",
    "score_quality",
    "segment_and_score",
    "summarise_scores",
    "worst_cases",
    "write_scores",
]
