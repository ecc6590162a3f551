"""A MONAI bundle: its folder, its wiring, its metadata; opened, filled and checked."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata, verify_net_in_out

from pipeline import augment, config, network
from pipeline import run as runs
from pipeline import spec as specs
from pipeline.engine import Model
from pipeline.errors import ConfigError, mendable
from pipeline.report import write_json
from pipeline.spec import Spec
from pipeline.types import Case, PathOrStr

VERSIONS = ("monai_version", "pytorch_version", "numpy_version", "required_packages_version")  # of where it was made
WIRING = ("inference.yaml", "train.yaml")
SCHEMA = "metadata_schema.json"
SCHEMA_URL = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
CHECKOUT_BUNDLES = Path(__file__).parent.parent / "bundles"
INSTALLED_BUNDLES = Path(sys.prefix) / "share" / "volseg" / "bundles"


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What a reader should know of a bundle and no program needs: the part of metadata.json that is written by hand.

    Attributes:
        eval_metrics: name → mean over cases, as measured by the commands in the bundle's README.
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


def device_of(name: str) -> torch.device:
    """The device of a name: `auto` takes a GPU where there is one.

    Raises:
        ConfigError: a device that this machine does not have.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if has[device])
    if not has.get(name.split(":")[0], False):
        raise ConfigError(f"device {name}: not on this machine; it has {', '.join(d for d in has if has[d])}")
    return torch.device(name)


def open_model(bundle: PathOrStr, *, device: str = "auto", overlap: float | None = None, volume: int | None = None) -> Model:
    """A bundle opened for inference, by its own wiring.

    Args:
        bundle: a folder, or the name of a bundle that ships.
        device: auto, cpu, cuda or mps.
        overlap: of windows, instead of the spec's.
        volume: which volume of 4D files, from 0.

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
        parser["preprocessing"]["volume"] = volume
        parser.get_parsed_content("initialize")
        model: Model = parser.get_parsed_content("model")
    except Exception as error:
        raise mendable(error) or ConfigError(
            f"{root}: cannot be opened: {_root_cause(error)}; try `volseg check {root}`"
        ) from error
    return model


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
        "pred_classes": ", ".join(f"{i}: {name}" for i, name in enumerate(spec.labels)),
        "network_data_format": {"inputs": {"image": _input_format(spec)}, "outputs": {"pred": _output_format(spec)}},
    }
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
        "num_channels": len(spec.labels),
        "spatial_shape": _spatial_shape(spec),
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": True,
        "channel_def": {str(i): name for i, name in enumerate(spec.labels)},
    }


def _spatial_shape(spec: Spec) -> list[str]:
    steps = [1] * spec.spatial_dims
    for stride in spec.strides:
        steps = [step * s for step, s in zip(steps, stride, strict=True)]
    return [f"{step}*n" for step in steps]


def refresh(root: Path) -> None:
    """Writes what is generated in a bundle: the wiring, as this version of volseg has it, and metadata.json."""
    for name in WIRING:
        shutil.copyfile(str(files("pipeline") / "wiring" / name), root / "configs" / name)
    write_json(root / "configs" / "metadata.json", metadata(root))


def check(bundle: PathOrStr) -> dict[str, str]:
    """What is wrong with a bundle: check → the reason, empty where it passed.

    MONAI's own checks (workflow properties for inference and training, metadata against its schema, the network's inputs and
    outputs), and ours (weights against the spec, generated files as they would be generated now).

    Raises:
        ConfigError: no such bundle.
    """
    root = find(bundle)
    checks: dict[str, Callable[[Path], None]] = {
        "spec": _check_spec,
        "weights fit the spec": _check_weights,
        "inference properties": lambda root: _check_properties(root, "inference"),
        "training properties": lambda root: _check_properties(root, "train"),
        "metadata against the schema": _check_metadata,
        "network input and output": _check_net,
        "generated files": _check_generated,
    }
    return {name: _reason(test, root) for name, test in checks.items()}


def _reason(test: Callable[[Path], None], root: Path) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            test(root)
    except Exception as error:
        return _root_cause(error)
    return ""


def _root_cause(error: BaseException) -> str:
    known = mendable(error)
    while known is None and error.__cause__ is not None:
        error = error.__cause__
    return str(known or f"{type(error).__name__}: {error}")


def _check_spec(root: Path) -> None:
    specs.load(root / "configs" / "spec.yaml")


def _check_weights(root: Path) -> None:
    state = torch.load(root / "models" / "model.pt", map_location="cpu", weights_only=True)
    network.from_spec(specs.load(root / "configs" / "spec.yaml")).load_state_dict(state, strict=True)
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ConfigError(f"models/model.pt: NaN or infinity in {', '.join(broken)}")


def _check_properties(root: Path, kind: str) -> None:
    """MONAI's `check_properties`, which makes every part of the workflow: training needs a case, so it gets a made-up one."""
    names = ["inference.yaml"] if kind == "inference" else list(WIRING)
    overrides: dict[str, Any] = {"dataset::data": []}
    if kind == "train":  # without what starts a run: the weights that it started from need not be here
        overrides = {"train::dataset::data": _made_up_cases(root), "initialize": []}
    workflow = ConfigWorkflow(
        config_file=[str(root / "configs" / name) for name in names],
        meta_file=str(root / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type=kind,
        bundle_root=str(root),
        dataset_dir=str(root),
        **overrides,
    )
    workflow.initialize()
    missing = workflow.check_properties()
    if missing:
        raise ConfigError(f"{kind}: MONAI's properties {', '.join(missing)} are missing or wrongly referenced")


def _made_up_cases(root: Path) -> list[Case]:
    """As many cases of noise as one step mixes, each with a label in its middle."""
    spec = specs.load(root / "configs" / "spec.yaml")
    affine = np.diag([mm or 1.0 for mm in spec.spacing] + [1.0])
    shape = augment.crop_size(spec)
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    label = np.zeros(shape, dtype=np.int16)
    label[tuple(slice(n // 4, n // 4 + max(1, n // 2)) for n in shape)] = list(spec.labels.values())[1]
    image, reference = nib.Nifti1Image(noise, affine), nib.Nifti1Image(label, affine)
    run = runs.load(root / "configs" / "run.yaml")
    return [{"case": str(i), "image": [image] * len(spec.channels), "label": reference} for i in range(run.cases_per_step)]


def _check_metadata(root: Path) -> None:
    schema = str(files("pipeline") / "wiring" / SCHEMA)
    verify_metadata(meta_file=str(root / "configs" / "metadata.json"), filepath=schema)


def _check_net(root: Path) -> None:
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(root / "configs" / "metadata.json"),
        config_file=str(root / "configs" / "inference.yaml"),
        device="cpu",
        n=2,
        bundle_root=str(root),
    )


def _check_generated(root: Path) -> None:
    for name in WIRING:
        if (root / "configs" / name).read_text("utf-8") != (files("pipeline") / "wiring" / name).read_text("utf-8"):
            raise ConfigError(f"configs/{name} differs from the one that volseg {version('volseg')} writes")
    stored = json.loads((root / "configs" / "metadata.json").read_text("utf-8"))
    fresh = metadata(root)
    changed = sorted(key for key in stored.keys() | fresh.keys() if stored.get(key) != fresh.get(key) and key not in VERSIONS)
    if changed:
        raise ConfigError(f"configs/metadata.json: {', '.join(changed)} differ from the spec and the card")
