"""The metadata of a bundle, in the format that MONAI specifies, from its spec and its card."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from math import prod
from typing import Any

from pipeline.bundle.trust import check_plain
from pipeline.config import BundlePaths, Card, Spec, load_config, load_spec, smallest_size
from pipeline.types import PathOrStr

SCHEMA_URL = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
REQUIRED_PACKAGES = ("volseg", "nibabel", "SimpleITK", "pytorch-ignite")


def bundle_metadata(root: PathOrStr) -> dict[str, Any]:
    """Return the content of a bundle's metadata.json, from its spec and its card.

    Args:
        root: the bundle's folder, with spec.yaml and card.yaml.

    Raises:
        ConfigError: the spec or the card is missing or wrong, or has a text that MONAI's parser
            would evaluate.
    """
    paths = BundlePaths(root)
    spec = load_spec(paths.spec)
    card = asdict(load_config(Card, paths.card, "card"))
    content: dict[str, Any] = {
        "schema": SCHEMA_URL,
        "version": list(card["changelog"])[-1],
        **card,
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],  # without the build, such as +cu128
        "numpy_version": version("numpy"),
        "required_packages_version": {name: version(name) for name in REQUIRED_PACKAGES},
        "image_classes": ", ".join(spec.channels),
        "label_classes": ", ".join(f"{value}: {name}" for name, value in spec.labels.items()),
        "pred_classes": ", ".join(f"{i}: {name}" for i, name in enumerate(spec.outputs)),
        "network_data_format": {
            "inputs": {"image": _input_format(spec)},
            "outputs": {"pred": _output_format(spec)},
        },
    }
    if not card["eval_metrics"]:
        del content["eval_metrics"]  # the schema makes the key optional, but refuses an empty one
    # Tuples become lists, so that the content compares equal to what is read from the file.
    plain: dict[str, Any] = json.loads(json.dumps(content))
    check_plain(plain, "metadata")
    return plain


def _input_format(spec: Spec) -> dict[str, Any]:
    """Return MONAI's description of the network's input."""
    return {
        "type": "image",
        "format": "magnitude",
        "modality": "MR",
        "num_channels": len(spec.channels),
        "spatial_shape": _spatial_shape(spec, (0,) * spec.spatial_dims),
        "dtype": "float32",
        # only clipping at percentiles gives fixed limits; a z-score has none
        "value_range": [0, 1] if spec.intensity.method == "percentiles" else [],
        "is_patch_data": True,
        "channel_def": {str(i): name for i, name in enumerate(spec.channels)},
    }


def _output_format(spec: Spec) -> dict[str, Any]:
    """Return MONAI's description of the network's output.

    The numbers of `channel_def` are values of the label map, in ascending order, as in MONAI's own
    bundle vista3d, because MONAI Label takes them for the values. Regions have none; there they are
    the numbers of the channels.
    """
    names = dict(enumerate(spec.outputs))
    if spec.output != "regions":
        names = {value: name for name, value in spec.labels.items()}
    return {
        "type": "image",
        "format": "segmentation",
        "num_channels": len(spec.outputs),
        "spatial_shape": _spatial_shape(spec, spec.margin),
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": True,
        "channel_def": {str(value): names[value] for value in sorted(names)},
    }


def _spatial_shape(spec: Spec, margin: tuple[int, ...]) -> list[str]:
    """Return the valid sizes along each axis in MONAI's notation, such as `16*n`.

    Without padding a valid size is no multiple of the strides: `16*n+172`, n from 1.

    Args:
        spec: of the network.
        margin: voxels along each axis by which the output is smaller than the input; 0 for the
            input itself.
    """
    shape = []
    for axis in range(spec.spatial_dims):
        strides = [stride[axis] for stride in spec.strides]
        step = prod(strides)
        offset = smallest_size(strides, padding=spec.network.padding) - step - margin[axis]
        shape.append(f"{step}*n" + (f"{offset:+d}" if offset else ""))
    return shape
