"""FIXME."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any

from pipeline.config import Card, Spec, load_config, load_spec, smallest_size
from pipeline.io import write_json

WIRING = ("inference.yaml", "train.yaml")


SCHEMA_URL = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"


def bundle_metadata(root: Path) -> dict[str, Any]:
    """metadata.json of a bundle, from its spec and its card."""
    spec = load_spec(root / "configs" / "spec.yaml")
    card = asdict(load_config(Card, root / "configs" / "card.yaml", "card"))
    content: dict[str, Any] = {
        "schema": SCHEMA_URL,
        "version": list(card["changelog"])[-1],
        **card,
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {
            name: version(name) for name in ("volseg", "nibabel", "SimpleITK", "pytorch-ignite")
        },
        "image_classes": ", ".join(spec.channels),
        "label_classes": ", ".join(f"{value}: {name}" for name, value in spec.labels.items()),
        "pred_classes": ", ".join(f"{i}: {name}" for i, name in enumerate(spec.outputs)),
        "network_data_format": {
            "inputs": {"image": _input_format(spec)},
            "outputs": {"pred": _output_format(spec)},
        },
    }
    if not card["eval_metrics"]:
        del content["eval_metrics"]  # the schema allows none, and no empty one
    plain: dict[str, Any] = json.loads(
        json.dumps(content)
    )  # tuples become lists, as they are in the file
    return plain


def _input_format(spec: Spec) -> dict[str, Any]:
    return {
        "type": "image",
        "format": "magnitude",
        "modality": "MR",
        "num_channels": len(spec.channels),
        "spatial_shape": _spatial_shape(spec),
        "dtype": "float32",
        "value_range": [0, 1] if spec.intensity.method == "percentiles" else [],
        "is_patch_data": True,
        "channel_def": {str(i): name for i, name in enumerate(spec.channels)},
    }


def _output_format(spec: Spec) -> dict[str, Any]:
    return {
        "type": "image",
        "format": "segmentation",
        "num_channels": len(spec.outputs),
        "spatial_shape": _spatial_shape(spec, spec.margin),
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": True,
        "channel_def": {str(i): name for i, name in enumerate(spec.outputs)},
    }


def _spatial_shape(spec: Spec, less: tuple[int, ...] = (0, 0, 0)) -> list[str]:
    """Sizes as MONAI writes them, `16*n`, or `16*n+172` where convolutions are not padded."""
    shape = []
    for axis in range(spec.spatial_dims):
        strides = [stride[axis] for stride in spec.strides]
        step = prod(strides)
        rest = smallest_size(strides, padding=spec.network.padding) - step - less[axis]
        shape.append(f"{step}*n" + (f"{rest:+d}" if rest else ""))
    return shape


def refresh_bundle(root: Path) -> None:
    """Writes what is generated in a bundle: the wiring, as this version of volseg has it, and metadata.json."""
    for name in WIRING:
        shutil.copyfile(str(files("pipeline.bundle") / "templates" / name), root / "configs" / name)
    write_json(root / "configs" / "metadata.json", bundle_metadata(root))
