"""Training: runs of a bundle's weights, their checkpoints and validation, and cross-validation.

- `trainer`: one run, from its YAML to a complete bundle.
- `optimisation`: initialisation, optimizer, learning rate, time limit, average of the weights.
- `transfer`: weights of another network to start from, and a frozen encoder.
- `case_cache`: the training cases that stay in memory.
- `precision`: float32 or bfloat16 arithmetic.
- `checkpoint`: resuming an interrupted run.
- `validation`: scores of whole cases during a run.
- `history`: the table and the figure of a run.
- `distributed`: one run in several processes.
- `cross_validation`: every fold of a run, joined to an ensemble.
- `planning/`: a spec and a run for a new dataset.
"""

from pipeline.training.case_cache import CaseCache, training_dataset
from pipeline.training.checkpoint import CheckpointHandler
from pipeline.training.cross_validation import cross_validate
from pipeline.training.distributed import data_parallel, is_first_process, training_loader
from pipeline.training.history import EpochRow, History
from pipeline.training.optimisation import (
    Budget,
    build_optimizer,
    build_schedule,
    compile_network,
    initialise,
    prepare_batch,
    weight_average,
)
from pipeline.training.precision import TrainingInferer, emulates_bfloat16
from pipeline.training.trainer import read_run, train, train_bundle
from pipeline.training.transfer import EncoderFreeze, load_bundle_run, start_from
from pipeline.training.validation import Validation

__all__ = [
    "Budget",
    "CaseCache",
    "CheckpointHandler",
    "EncoderFreeze",
    "EpochRow",
    "History",
    "TrainingInferer",
    "Validation",
    "build_optimizer",
    "build_schedule",
    "compile_network",
    "cross_validate",
    "data_parallel",
    "emulates_bfloat16",
    "initialise",
    "is_first_process",
    "load_bundle_run",
    "prepare_batch",
    "read_run",
    "start_from",
    "train",
    "train_bundle",
    "training_dataset",
    "training_loader",
    "weight_average",
]
