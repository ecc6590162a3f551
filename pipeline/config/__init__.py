"""Configuration files as frozen dataclasses, and the paths of the files in a bundle.

- `parser`: YAML to dataclasses, with errors that hold the path to the key.
- `checks`: the check that specs and runs use for their values.
- `spec`: inputs and outputs that weights were trained for (configs/spec.yaml).
- `run`: how one training run goes (configs/run.yaml).
- `card`: the description of a bundle for people (configs/card.yaml).
- `paths`: the paths of all files in a bundle.
- `unet_sizes`: the input sizes that a U-Net accepts, and its output sizes.
"""

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
    RENAMED_SPEC_KEYS,
    CropResize,
    Intensity,
    NetworkSpec,
    OutputKind,
    Spec,
    SplineResampling,
    load_spec,
    spec_fingerprint,
)
from pipeline.config.unet_sizes import (
    margin,
    nearest_valid_sizes,
    output_size,
    smallest_size,
    valid_size_near,
)

__all__ = [
    "ALL",
    "AXES",
    "EACH",
    "RENAMED_SPEC_KEYS",
    "TRAINING_PRECISIONS",
    "Augment",
    "BundlePaths",
    "Card",
    "CropResize",
    "Intensity",
    "NetworkSpec",
    "OutputKind",
    "Run",
    "Spec",
    "SplineResampling",
    "Synthesis",
    "TrainingPrecision",
    "load_config",
    "load_run",
    "load_spec",
    "margin",
    "nearest_valid_sizes",
    "output_size",
    "parse_config",
    "read_yaml",
    "smallest_size",
    "spec_fingerprint",
    "valid_size_near",
]
