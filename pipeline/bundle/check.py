"""Checks of a bundle: MONAI's own, without a network connection, and those of volseg."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigWorkflow, verify_metadata, verify_net_in_out

from pipeline.bundle.metadata import bundle_metadata
from pipeline.bundle.opening import find_bundle
from pipeline.bundle.trust import check_plain
from pipeline.bundle.wiring import WIRING, literal, wiring_origin, wiring_to_evaluate
from pipeline.config import BundlePaths, Run, Spec, load_run, load_spec
from pipeline.errors import ConfigError, describe_error
from pipeline.networks import build_network, read_state
from pipeline.transforms import crop_size
from pipeline.types import Case, PathOrStr

Check = Callable[["CheckedBundle"], None]
Workflow = Literal["inference", "train"]

SCHEMA = "metadata_schema.json"
# Keys of metadata.json that describe the machine where the bundle was made. They differ on another
# machine without anything being wrong.
ENVIRONMENT_KEYS = (
    "monai_version",
    "pytorch_version",
    "numpy_version",
    "required_packages_version",
)


@dataclass(frozen=True, slots=True)
class CheckedBundle:
    """A bundle under check, and whether wiring that volseg did not write may be evaluated."""

    paths: BundlePaths
    trust: bool


def check_bundle(bundle: PathOrStr, *, trust: bool = False) -> dict[str, str]:
    """Return the result of each check of a bundle: its name → what is wrong, empty if it passed.

    MONAI checks the properties that a workflow for inference and for training must have, the
    metadata against its schema, and the shapes of the network's input and output. volseg checks the
    spec, the weights against the spec, and whether the generated files are as this version would
    write them. Wiring of an earlier release is checked in its present form, the one that is used.

    Nothing of a bundle is evaluated whose wiring is not volseg's, unless it is trusted: the checks
    that would do so have not passed, and say that they did not run.

    Args:
        bundle: a folder, or the name of a shipped bundle.
        trust: whether wiring that volseg did not write may run.

    Raises:
        ConfigError: there is no such bundle.
    """
    checked = CheckedBundle(BundlePaths(find_bundle(bundle)), trust)
    checks: dict[str, Check] = {
        "spec": _check_spec,
        "weights fit the spec": _check_weights,
        "inference properties": _check_inference_properties,
        "training properties": _check_training_properties,
        "metadata against the schema": _check_metadata,
        "network input and output": _check_network_shapes,
        "generated files": _check_generated_files,
    }
    return {name: _failure(check, checked) for name, check in checks.items()}


def _failure(check: Check, checked: CheckedBundle) -> str:
    """Run one check and return its error message, empty if it passed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MONAI warns whenever it reads a configuration
            check(checked)
    except Exception as error:  # a broken bundle may raise anything; the other checks still run
        return describe_error(error)
    return ""


def _check_spec(checked: CheckedBundle) -> None:
    """Raise a ConfigError if the spec is missing or wrong."""
    load_spec(checked.paths.spec)


def _check_weights(checked: CheckedBundle) -> None:
    """Raise an error if weights do not fit their network of the spec, or are not finite."""
    spec, paths = load_spec(checked.paths.spec), checked.paths
    _check_state(spec, paths.weights)
    if spec.cascade_spec is not None:
        _check_state(spec.cascade_spec, paths.cascade_weights)


def _check_state(spec: Spec, path: Path) -> None:
    """Raise an error if the weights in a file do not fit a spec's network, or are not finite."""
    state = read_state(path)
    build_network(spec).load_state_dict(state, strict=True)
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ConfigError(f"models/{path.name}: NaN or infinity in {', '.join(broken)}")


def _check_inference_properties(checked: CheckedBundle) -> None:
    """Raise an error if the workflow for inference cannot be built or lacks a property of MONAI."""
    _check_properties(checked, "inference", ["inference.yaml"], {"dataset::data": []})


def _check_training_properties(checked: CheckedBundle) -> None:
    """Raise an error if the workflow for training cannot be built or lacks a property of MONAI.

    MONAI builds every part of the workflow. The training data need not be on this machine, so cases
    of noise replace them, and the settings that would read other files are left out.
    """
    _wiring(checked, WIRING)  # before anything else, so that the reason is named
    run = load_run(checked.paths.run)
    settings = replace(
        run, synthesis=None, splits=None, validate_every=0, keep="last", patience=None
    )
    overrides = {
        "settings": settings,
        "train::dataset::data": _noise_cases(checked.paths, run),
        "initialize": [],  # would seed the process and load the weights to start from
    }
    _check_properties(checked, "train", WIRING, overrides)


def _check_properties(
    checked: CheckedBundle, workflow: Workflow, names: Sequence[str], overrides: dict[str, Any]
) -> None:
    """Build a workflow and raise a ConfigError if MONAI's `check_properties` misses any.

    Args:
        checked: the bundle.
        workflow: the kind of workflow, which decides what properties MONAI expects.
        names: the wiring files to read.
        overrides: ids of the wiring → what replaces them.
    """
    wiring = _wiring(checked, names)
    _check_metadata_is_plain(checked.paths)
    root = literal(str(checked.paths.folder))
    built = ConfigWorkflow(
        config_file=[str(path) for path in wiring],
        meta_file=str(checked.paths.metadata),
        logging_file=False,
        workflow_type=workflow,
        bundle_root=root,
        dataset_dir=root,
        **overrides,
    )
    built.initialize()
    missing = built.check_properties()
    if missing:
        raise ConfigError(
            f"{workflow}: MONAI's properties {', '.join(missing)} are missing or wrongly referenced"
        )


def _wiring(checked: CheckedBundle, names: Sequence[str]) -> list[Path]:
    """Return the wiring to evaluate.

    Raises:
        ConfigError: it is not volseg's and not trusted.
    """
    try:
        return wiring_to_evaluate(checked.paths.folder, names, trust=checked.trust)
    except ConfigError as error:
        raise ConfigError(f"not run, needs --trust: {error}") from error


def _check_metadata_is_plain(paths: BundlePaths) -> None:
    """Raise a ConfigError if metadata.json has a string that MONAI would evaluate.

    MONAI reads the metadata into the same parser as the wiring, and evaluates its properties.
    """
    if paths.metadata.is_file():  # MONAI names what is missing without it
        check_plain(json.loads(paths.metadata.read_text(encoding="utf-8")), str(paths.metadata))


def _noise_cases(paths: BundlePaths, run: Run) -> list[Case]:
    """Return as many cases of noise as one training step mixes, each with a labelled box."""
    spec = load_spec(paths.spec)
    shape = crop_size(spec)
    affine = np.diag([mm or 1.0 for mm in spec.spacing] + [1.0])
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    label = np.zeros(shape, dtype=np.int16)
    middle = tuple(slice(n // 4, n // 4 + max(1, n // 2)) for n in shape)
    label[middle] = list(spec.labels.values())[1]  # the first structure; background comes before it
    image, reference = nib.Nifti1Image(noise, affine), nib.Nifti1Image(label, affine)
    return [
        {"case": str(i), "image": [image] * len(spec.channels), "label": reference}
        for i in range(run.cases_per_step)
    ]


def _check_metadata(checked: CheckedBundle) -> None:
    """Raise an error if metadata.json does not follow MONAI's schema.

    The schema is a copy that is installed with volseg: MONAI would download it.
    """
    schema = files("pipeline.bundle") / "templates" / SCHEMA
    verify_metadata(meta_file=str(checked.paths.metadata), filepath=str(schema))


def _check_network_shapes(checked: CheckedBundle) -> None:
    """Raise an error if the network's input or output is not as metadata.json describes it."""
    [wiring] = _wiring(checked, ["inference.yaml"])
    _check_metadata_is_plain(checked.paths)
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(checked.paths.metadata),
        config_file=str(wiring),
        device="cpu",
        n=2,  # the n of sizes such as `16*n`
        bundle_root=literal(str(checked.paths.folder)),
    )


def _check_generated_files(checked: CheckedBundle) -> None:
    """Raise a ConfigError if the wiring or metadata.json differs from what volseg would write."""
    paths = checked.paths
    refresh = f"volseg bundle refresh {paths.folder}"
    problems, outdated = [], []
    for name in WIRING:
        match wiring_origin(paths.configs / name):
            case "edited":
                problems.append(
                    f"configs/{name} differs from the one that volseg {version('volseg')} writes, "
                    f"and runs only with --trust; `{refresh} --overwrite` replaces it"
                )
            case "released":
                outdated.append(
                    f"configs/{name} is that of an earlier release, and the present one is used "
                    "in its place"
                )
            case "missing":
                outdated.append(f"configs/{name} is missing")
            case "current":
                pass
    outdated += _outdated_metadata(paths)
    if outdated:
        problems.append(f"{'; '.join(outdated)}; `{refresh}` rewrites what is outdated")
    if problems:
        raise ConfigError("; ".join(problems))


def _outdated_metadata(paths: BundlePaths) -> list[str]:
    """Return what is wrong with metadata.json: nothing, or one message."""
    if not paths.metadata.is_file():
        return ["configs/metadata.json is missing"]
    stored = json.loads(paths.metadata.read_text(encoding="utf-8"))
    expected = bundle_metadata(paths.folder)
    keys = (stored.keys() | expected.keys()) - set(ENVIRONMENT_KEYS)
    changed = sorted(key for key in keys if stored.get(key) != expected.get(key))
    if not changed:
        return []
    return [f"configs/metadata.json: {', '.join(changed)} differ from the spec and the card"]
