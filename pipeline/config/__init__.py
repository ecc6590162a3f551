"""FIXME."""

from pipeline.config.card import Card
from pipeline.config.parser import load_config, parse_config, read_yaml
from pipeline.config.paths import BundlePaths
from pipeline.config.run import (
    TRAINING_PRECISIONS,
    Augment,
    Run,
    Synthesis,
    TrainingPrecision,
    load_run,
)
from pipeline.config.spec import (
    ALL,
    AXES,
    EACH,
    CropResize,
    Intensity,
    NetworkSpec,
    Spec,
    load_spec,
)
from pipeline.config.unet_sizes import (
    nearest_valid_sizes,
    output_size,
    smallest_size,
    valid_size_near,
)

__all__ = [
    "ALL",
    "AXES",
    "EACH",
    "TRAINING_PRECISIONS",
    "Augment",
    "BundlePaths",
    "Card",
    "CropResize",
    "Intensity",
    "NetworkSpec",
    "Run",
    "Spec",
    "Synthesis",
    "TrainingPrecision",
    "load_config",
    "load_run",
    "load_spec",
    "nearest_valid_sizes",
    "output_size",
    "parse_config",
    "read_yaml",
    "smallest_size",
    "valid_size_near",
]
