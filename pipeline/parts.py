"""The parts that a bundle's wiring (`inference.yaml`, `train.yaml`) may target.

This module is stable: a name in it keeps its arguments from version to version, so that a bundle
written by one version of volseg opens in the next. All other modules may change.
"""

from __future__ import annotations

from pipeline.batch import run_bundle
from pipeline.bundle import parse_spec
from pipeline.config import load_spec
from pipeline.inference import (
    LabelInversion,
    Model,
    Runtime,
    bundle_inferer,
    keep_freed_memory,
    load_cascade,
    streaming_iteration,
)
from pipeline.io import find_cases, training_cases, validation_cases
from pipeline.networks import build_loss, build_network
from pipeline.training import (
    Budget,
    CheckpointHandler,
    EncoderFreeze,
    History,
    TrainingInferer,
    Validation,
    build_optimizer,
    build_schedule,
    compile_network,
    data_parallel,
    initialise,
    prepare_batch,
    start_from,
    training_dataset,
    training_loader,
    weight_average,
)
from pipeline.training import load_bundle_run as load_run
from pipeline.transforms import preprocessing, training_transform

__all__ = [
    "Budget",
    "CheckpointHandler",
    "EncoderFreeze",
    "History",
    "LabelInversion",
    "Model",
    "Runtime",
    "TrainingInferer",
    "Validation",
    "build_loss",
    "build_network",
    "build_optimizer",
    "build_schedule",
    "bundle_inferer",
    "compile_network",
    "data_parallel",
    "find_cases",
    "initialise",
    "keep_freed_memory",
    "load_cascade",
    "load_run",
    "load_spec",
    "parse_spec",
    "prepare_batch",
    "preprocessing",
    "run_bundle",
    "start_from",
    "streaming_iteration",
    "training_cases",
    "training_dataset",
    "training_loader",
    "training_transform",
    "validation_cases",
    "weight_average",
]
