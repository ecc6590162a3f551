"""A MONAI bundle: its folder, its wiring, its metadata; opened, filled and checked."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import warnings
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from pipeline import config
from pipeline import spec as specs
from pipeline.engine import Model, device_of
from pipeline.errors import ConfigError, mendable
from pipeline.report import write_json
from pipeline.sizes import smallest_size
from pipeline.spec import Spec
from pipeline.types import PathOrStr

WIRING = ("inference.yaml", "train.yaml")
SCHEMA_URL = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
CHECKOUT_BUNDLES = Path(__file__).parent.parent / "bundles"
INSTALLED_BUNDLES = Path(sys.prefix) / "share" / "volseg" / "bundles"


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What a reader should know of a bundle and no program needs: the part of metadata.json that is written by hand.

    Attributes:
        eval_metrics: name → mean over cases, as measured by the commands in the bundle's README; none where not measured.
        changelog: version → what changed; the last version is the bundle's.
    """

    name: str
    description: str
    task: str
    authors: str
    copyright: str
    intended_use: str
    data_source: str
    data_type: str
    references: tuple[str, ...]
    eval_metrics: dict[str, float]
    changelog: dict[str, str]

    def __post_init__(self) -> None:
        if not self.changelog:
            raise ConfigError("card.changelog: expected at least one version, got none")


def find(name: PathOrStr) -> Path:
    """The folder of a bundle, given as a path or by the name of one that ships.

    Raises:
        ConfigError: no such bundle; the message lists those that ship.
    """
    for path in (Path(name), CHECKOUT_BUNDLES / name, INSTALLED_BUNDLES / name):
        if (path / "configs" / "inference.yaml").is_file():
            return path
    shipped = sorted(
        p.parent.parent.name for root in (CHECKOUT_BUNDLES, INSTALLED_BUNDLES) for p in root.glob("*/configs/spec.yaml")
    )
    raise ConfigError(f"{name}: no such bundle; expected a folder with configs/inference.yaml, or one of {', '.join(shipped)}")


def open_model(
    bundle: PathOrStr,
    *,
    device: str = "auto",
    overlap: float | None = None,
    volume: int | None = None,
    runtime: str = "auto",
    precision: str = "auto",
    max_memory: int | None = None,
    uncertainty: bool = False,
    labels_spacing: float | None = None,
) -> Model:
    """A bundle opened for inference, by its own wiring.

    Args:
        bundle: a folder, or the name of a bundle that ships.
        device: auto, cpu, cuda or mps.
        overlap: of windows, instead of the spec's.
        volume: which volume of 4D files, from 0.
        runtime: auto, torch or openvino; see `pipeline.runtime.Runtime`.
        precision: auto, float32, bfloat16 or int8; likewise.
        max_memory: bytes that the process may come to hold.
        uncertainty: whether each voxel's uncertainty is wanted.
        labels_spacing: of the label maps' voxels, mm, instead of each file's own.

    Raises:
        ConfigError: no such bundle, or one whose parts do not fit together.
    """
    root = find(bundle)
    parser = ConfigParser()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns at every read that configurations run code
        parser.read_config(root / "configs" / "inference.yaml")
    parser["bundle_root"] = str(root)
    parser["device"] = device_of(device)
    try:
        parser["dataset"]["data"] = []
        parser["inferer"]["overlap"] = overlap
        parser["preprocessing"].update(volume=volume, labels_spacing=labels_spacing)
        if uncertainty:
            parser["finish"]["uncertainty"] = True
        if (runtime, precision) != ("auto", "auto"):
            if "runtime" not in parser:
                raise ConfigError("its wiring has no `runtime`, so --runtime and --precision do not apply; refresh the bundle")
            parser["runtime"].update(runtime=runtime, precision=precision)
        parser.get_parsed_content("initialize")
        model: Model = parser.get_parsed_content("model")
    except Exception as error:
        cause = textwrap.shorten(root_cause(error), 240, placeholder=" …")  # torch lists every weight that does not fit
        raise mendable(error) or ConfigError(f"{root}: cannot be opened: {cause}; try `volseg check {root}`") from error
    return replace(model, max_memory=max_memory, uncertainty=uncertainty)


def metadata(root: Path) -> dict[str, Any]:
    """metadata.json of a bundle, from its spec and its card."""
    spec = specs.load(root / "configs" / "spec.yaml")
    card = asdict(config.load(Card, root / "configs" / "card.yaml", "card"))
    content: dict[str, Any] = {
        "schema": SCHEMA_URL,
        "version": list(card["changelog"])[-1],
        **card,
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {name: version(name) for name in ("volseg", "nibabel", "SimpleITK", "pytorch-ignite")},
        "image_classes": ", ".join(spec.channels),
        "label_classes": ", ".join(f"{value}: {name}" for name, value in spec.labels.items()),
        "pred_classes": ", ".join(f"{i}: {name}" for i, name in enumerate(spec.outputs)),
        "network_data_format": {"inputs": {"image": _input_format(spec)}, "outputs": {"pred": _output_format(spec)}},
    }
    if not card["eval_metrics"]:
        del content["eval_metrics"]  # the schema allows none, and no empty one
    plain: dict[str, Any] = json.loads(json.dumps(content))  # tuples become lists, as they are in the file
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


def refresh(root: Path) -> None:
    """Writes what is generated in a bundle: the wiring, as this version of volseg has it, and metadata.json."""
    for name in WIRING:
        shutil.copyfile(str(files("pipeline") / "wiring" / name), root / "configs" / name)
    write_json(root / "configs" / "metadata.json", metadata(root))


def root_cause(error: BaseException) -> str:
    """What went wrong at the bottom of wrapped errors."""
    known = mendable(error)
    while known is None and error.__cause__ is not None:
        error = error.__cause__
    return str(known or f"{type(error).__name__}: {error}")
