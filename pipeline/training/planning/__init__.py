"""Planning: a spec and a run for a new dataset and this machine, each choice with its reason.

- `fingerprint`: what the cases are like, and what is wrong with them.
- `choices`: spec and run from the fingerprints.
- `folds`: the splits of a cross-validation.
- `timing`: how long training takes on this machine.
- `files`: the planned run and bundle as files.
- `planner`: the whole plan.
- `skeleton`: a new bundle without weights and without a dataset.
"""

from pipeline.training.planning.planner import Plan, plan_training, problem_table
from pipeline.training.planning.skeleton import Draft, new_bundle, parse_labels

__all__ = [
    "Draft",
    "Plan",
    "new_bundle",
    "parse_labels",
    "plan_training",
    "problem_table",
]
