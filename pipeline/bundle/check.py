"""Whether a bundle is whole: MONAI's own checks, offline, and what only volseg can know."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigWorkflow, verify_metadata, verify_net_in_out

from pipeline.bundle.metadata import WIRING, bundle_metadata
from pipeline.bundle.opening import find_bundle
from pipeline.config import Run, load_run, load_spec
from pipeline.errors import ConfigError, root_cause
from pipeline.networks import build_network
from pipeline.transforms import crop_size
from pipeline.types import Case, PathOrStr

SCHEMA = "metadata_schema.json"
VERSIONS = (
    "monai_version",
    "pytorch_version",
    "numpy_version",
    "required_packages_version",
)  # of where it was made


def check_bundle(bundle: PathOrStr) -> dict[str, str]:
    """What is wrong with a bundle: check → the reason, empty where it passed.

    MONAI's own checks (workflow properties for inference and training, metadata against its schema, the network's inputs and
    outputs), and ours (weights against the spec, generated files as they would be generated now).

    Raises:
        ConfigError: no such bundle.
    """
    root = find_bundle(bundle)
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
        return root_cause(error)
    return ""


def _check_spec(root: Path) -> None:
    load_spec(root / "configs" / "spec.yaml")


def _check_weights(root: Path) -> None:
    state = torch.load(root / "models" / "model.pt", map_location="cpu", weights_only=True)
    build_network(load_spec(root / "configs" / "spec.yaml")).load_state_dict(state, strict=True)
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ConfigError(f"models/model.pt: NaN or infinity in {', '.join(broken)}")


def _check_properties(root: Path, kind: str) -> None:
    """MONAI's `check_properties`, which makes every part of the workflow: training needs a case, so it gets a made-up one."""
    names = ["inference.yaml"] if kind == "inference" else list(WIRING)
    overrides: dict[str, Any] = {"dataset::data": []}
    if kind == "train":  # without what starts a run and without its data, which need not be here
        run = load_run(root / "configs" / "run.yaml")
        plain = replace(
            run, synthesis=None, splits=None, validate_every=0, keep="last", patience=None
        )
        overrides = {
            "settings": plain,
            "train::dataset::data": _made_up_cases(root, run),
            "initialize": [],
        }
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
        raise ConfigError(
            f"{kind}: MONAI's properties {', '.join(missing)} are missing or wrongly referenced"
        )


def _made_up_cases(root: Path, run: Run) -> list[Case]:
    """As many cases of noise as one step mixes, each with a label in its middle."""
    spec = load_spec(root / "configs" / "spec.yaml")
    affine = np.diag([mm or 1.0 for mm in spec.spacing] + [1.0])
    shape = crop_size(spec)
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    label = np.zeros(shape, dtype=np.int16)
    label[tuple(slice(n // 4, n // 4 + max(1, n // 2)) for n in shape)] = list(
        spec.labels.values()
    )[1]
    image, reference = nib.Nifti1Image(noise, affine), nib.Nifti1Image(label, affine)
    return [
        {"case": str(i), "image": [image] * len(spec.channels), "label": reference}
        for i in range(run.cases_per_step)
    ]


def _check_metadata(root: Path) -> None:
    schema = str(files("pipeline.bundle") / "templates" / SCHEMA)
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
        if (root / "configs" / name).read_text("utf-8") != (
            files("pipeline.bundle") / "templates" / name
        ).read_text("utf-8"):
            raise ConfigError(
                f"configs/{name} differs from the one that volseg {version('volseg')} writes"
            )
    stored = json.loads((root / "configs" / "metadata.json").read_text("utf-8"))
    fresh = bundle_metadata(root)
    changed = sorted(
        key
        for key in stored.keys() | fresh.keys()
        if stored.get(key) != fresh.get(key) and key not in VERSIONS
    )
    if changed:
        raise ConfigError(
            f"configs/metadata.json: {', '.join(changed)} differ from the spec and the card"
        )
