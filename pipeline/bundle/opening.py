"""Bundles found by path or name, and opened for inference by their own wiring."""

from __future__ import annotations

import importlib.resources
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.bundle.foreign.files import foreign_configuration
from pipeline.bundle.foreign.model import open_foreign
from pipeline.bundle.overrides import overrides_text
from pipeline.bundle.wiring import read_wiring
from pipeline.config import BundlePaths
from pipeline.errors import ConfigError, ReadError, describe_error, find_pipeline_error
from pipeline.inference import CaseModel, Model, resolve_device
from pipeline.networks import read_state
from pipeline.types import PathOrStr

CAUSE_WIDTH = 240  # characters: torch lists every weight that does not fit


def shipped_bundles() -> Path:
    """Return the folder of the bundles that are installed with volseg.

    They are the data of the import package `volseg_bundles`, so that they are found however
    volseg was installed: in an environment, with `--user` or `--target`, or from a checkout.
    """
    return Path(str(importlib.resources.files("volseg_bundles")))


def find_bundle(name: PathOrStr) -> Path:
    """Return the folder of a bundle.

    Args:
        name: a path, which is tried first, or the name of a shipped bundle.

    Raises:
        ConfigError: there is no such bundle; the message lists the shipped ones.
    """
    shipped = shipped_bundles()
    for path in (Path(name), shipped / name):
        if BundlePaths(path).inference.is_file() or foreign_configuration(path) is not None:
            return path
    names = sorted(path.parent.parent.name for path in shipped.glob("*/configs/spec.yaml"))
    raise ConfigError(
        f"{name}: no such bundle; expected a folder with configs/inference.yaml (or .json, .yml), "
        f"or one of {', '.join(names)}"
    )


def open_for_cases(
    bundle: PathOrStr,
    *,
    overrides: Mapping[str, Any] | None = None,
    **settings: Any,
) -> CaseModel:
    """Return a bundle opened for inference: one of volseg's, or one in MONAI's form.

    Args:
        bundle: a folder, or the name of a shipped bundle.
        overrides: id → value in the configuration of a bundle in MONAI's form, from
            `parse_overrides`.
        settings: further arguments of `open_bundle`, which `open_foreign` takes too.

    Raises:
        ConfigError: there is no such bundle, it is not trusted, or it cannot be opened.
    """
    root = find_bundle(bundle)
    if foreign_configuration(root) is not None:
        return open_foreign(root, overrides=dict(overrides or {}), **settings)
    if overrides:
        raise ConfigError(
            f"{root}: --set {overrides_text(overrides)} is for bundles in MONAI's form; volseg's "
            "own have a spec and options"
        )
    return open_bundle(root, **settings)


def open_bundle(
    bundle: PathOrStr,
    *,
    device: str = "auto",
    overlap: float | None = None,
    volume: int | None = None,
    runtime: str = "auto",
    precision: str = "auto",
    max_memory: int | None = None,
    uncertainty: bool = False,
    probabilities: bool = False,
    labels_spacing: float | None = None,
    trust: bool = False,
) -> Model:
    """Return a bundle opened for inference by its own wiring.

    Wiring that volseg wrote is evaluated always, any other only if it is trusted, because it can
    run any code. Weights are tensors only and run nothing.

    Args:
        bundle: a folder, or the name of a shipped bundle.
        device: auto, cpu, cuda or mps.
        overlap: of neighbouring windows, a fraction; the spec's own by default.
        volume: which volume of 4D files, from 0.
        runtime: auto, torch or openvino; see `pipeline.inference.Runtime`.
        precision: auto, float32, bfloat16 or int8; see `pipeline.inference.Runtime`.
        max_memory: bytes of resident memory that the process may use; None for no limit.
        uncertainty: whether the uncertainty of each voxel is computed.
        probabilities: whether the probability of each output is computed in each voxel.
        labels_spacing: voxel size of the label maps, mm; each file's own by default.
        trust: whether wiring that volseg did not write may run.

    Raises:
        ConfigError: there is no such bundle, its parts do not fit together, or its wiring is not
            volseg's and not trusted.
    """
    root = find_bundle(bundle)
    parser = read_wiring(root, ["inference.yaml"], trust=trust)
    parser["device"] = resolve_device(device)
    try:
        parser["dataset"]["data"] = []
        parser["inferer"]["overlap"] = overlap
        parser["preprocessing"].update(volume=volume, labels_spacing=labels_spacing)
        parser["inversion"].update(uncertainty=uncertainty, probabilities=probabilities)
        if (runtime, precision) != ("auto", "auto"):
            if "runtime" not in parser:
                raise ConfigError(
                    f"{root}: its wiring has no `runtime`, so --runtime and --precision do not "
                    f"apply; refresh the bundle by `volseg bundle refresh --overwrite {root}`"
                )
            for part in ("runtime", "cascade"):
                if part in parser:
                    parser[part].update(runtime=runtime, precision=precision)
        parser.get_parsed_content("initialize")
        model: Model = parser.get_parsed_content("model")
    except Exception as error:
        known = find_pipeline_error(error) or _weights_problem(root)
        if known is not None:
            raise known from None
        cause = textwrap.shorten(describe_error(error), CAUSE_WIDTH, placeholder=" …")
        raise ConfigError(
            f"{root}: cannot be opened: {cause}; try `volseg bundle check {root}`"
        ) from error
    return replace(model, max_memory=max_memory)


def _weights_problem(root: Path) -> ConfigError | None:
    """Return the error of a file of weights that holds something else, None if it is not at fault.

    torch's own message recommends to load such a file without its protection.
    """
    weights = BundlePaths(root).weights
    if not weights.is_file():
        return None
    try:
        read_state(weights)
    except ReadError as error:
        return ConfigError(str(error))
    return None
