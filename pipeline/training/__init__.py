"""FIXME."""

from pipeline.training.checkpoint import CheckpointHandler
from pipeline.training.cross_validation import cross_validate
from pipeline.training.distributed import data_parallel, is_first_process, training_loader
from pipeline.training.history import History
from pipeline.training.optimisation import (
    Budget,
    TrainingInferer,
    build_optimizer,
    build_schedule,
    compile_network,
    initialise,
    prepare_batch,
    start_from,
    weight_average,
)
from pipeline.training.trainer import read_run, train_bundle, training_parser
from pipeline.training.validation import Validation

__all__ = [
    "Budget",
    "CheckpointHandler",
    "History",
    "TrainingInferer",
    "Validation",
    "build_optimizer",
    "build_schedule",
    "compile_network",
    "cross_validate",
    "data_parallel",
    "initialise",
    "is_first_process",
    "prepare_batch",
    "read_run",
    "start_from",
    "train_bundle",
    "training_loader",
    "training_parser",
    "weight_average",
]
