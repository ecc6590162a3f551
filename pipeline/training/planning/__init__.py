"""FIXME."""

from pipeline.training.planning.planner import plan_training, problem_table

__all__ = ["plan_training", "problem_table"]
