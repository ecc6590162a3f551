"""FIXME."""

from pipeline.evaluation.figures import (
    draw_dice,
    draw_overlay,
    draw_training_curves,
    draw_worst_cases,
)
from pipeline.evaluation.metrics import dice, score_masks
from pipeline.evaluation.scores import compare_scores, score_case, summarise_scores, worst_cases

__all__ = [
    "compare_scores",
    "dice",
    "draw_dice",
    "draw_overlay",
    "draw_training_curves",
    "draw_worst_cases",
    "score_case",
    "score_masks",
    "summarise_scores",
    "worst_cases",
]
