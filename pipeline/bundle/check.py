"""Checks of a bundle, offline: MONAI's own, the rules of its model zoo, and those of volseg."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigWorkflow, verify_net_in_out

from pipeline.bundle.findings import CheckReport, Finding
from pipeline.bundle.foreign.network_check import network_findings
from pipeline.bundle.metadata import bundle_metadata
from pipeline.bundle.opening import find_bundle
from pipeline.bundle.trust import check_plain
from pipeline.bundle.wiring import WIRING, literal, wiring_origin, wiring_to_evaluate
from pipeline.bundle.zoo_configs import configuration_findings, id_findings
from pipeline.bundle.zoo_files import file_findings, large_file_findings, weights_findings
from pipeline.bundle.zoo_metadata import metadata_findings, schema_findings
from pipeline.config import BundlePaths, Run, Spec, load_run, load_spec
from pipeline.errors import ConfigError, describe_error
from pipeline.networks import build_network, read_state
from pipeline.transforms import crop_size
from pipeline.types import Case, PathOrStr

Check = Callable[["CheckedBundle"], Iterable[Finding] | None]
Workflow = Literal["inference", "train"]

NETWORK = "network_def"
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

    @property
    def is_own(self) -> bool:
        """Whether it is one of volseg's, with a spec and volseg's wiring, or meant to be."""
        known = self.paths.spec.is_file() or self.paths.card.is_file()
        return known or wiring_origin(self.paths.inference) in ("current", "released")

    @property
    def training(self) -> list[Path]:
        """Files of the configuration for training, later ones over earlier ones."""
        names = WIRING if self.is_own else ("train.json", "train.yaml", "train.yml")
        found = [self.paths.configs / name for name in names]
        found = [path for path in found if path.is_file()]
        return found if self.is_own else found[:1]


def check_bundle(bundle: PathOrStr, *, trust: bool = False) -> CheckReport:
    """Return what is wrong with a bundle, check by check.

    The rules of MONAI's model zoo hold for every bundle: its files, its large files, its metadata,
    its configurations and their ids. They evaluate nothing. MONAI checks the properties that a
    workflow for inference and for training must have, and the shapes of the network's input and
    output. volseg checks the spec, the weights against the spec, and whether the generated files
    are as this version would write them. Wiring of an earlier release is checked in its present
    form, the one that is used.

    Nothing of a bundle is evaluated whose wiring is not volseg's, unless it is trusted: the checks
    that would do so have not passed, and their findings are that they did not run.

    Args:
        bundle: a folder, or the name of a shipped bundle.
        trust: whether wiring that volseg did not write may run.

    Raises:
        ConfigError: there is no such bundle.
    """
    folder = Path(bundle)
    if not BundlePaths(folder).configs.is_dir():
        folder = find_bundle(bundle)
    checked = CheckedBundle(BundlePaths(folder), trust)
    checks = OWN_CHECKS if checked.is_own else FOREIGN_CHECKS
    return CheckReport({name: _findings(check, checked) for name, check in checks.items()})


def _findings(check: Check, checked: CheckedBundle) -> tuple[Finding, ...]:
    """Run one check and return what it found."""
    found: list[Finding] = []
    try:
        with warnings.catch_warnings(), _no_log_of_monai():
            warnings.simplefilter("ignore")  # MONAI warns whenever it reads a configuration
            found.extend(check(checked) or ())
    except Exception as error:  # a broken bundle may raise anything; the other checks still run
        found.append(Finding(level="error", found=describe_error(error)))
    return tuple(found)


@contextmanager
def _no_log_of_monai() -> Iterator[None]:
    """Keep MONAI's notes on each step off the terminal; its loggers write to stderr themselves."""
    loggers = [logging.getLogger(f"monai.bundle.{name}") for name in ("scripts", "workflows")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _check_spec(checked: CheckedBundle) -> None:
    """Raise a ConfigError if the spec is missing or wrong."""
    load_spec(checked.paths.spec)


def _check_weights(checked: CheckedBundle) -> Iterator[Finding]:
    """Raise an error if weights do not fit their network of the spec, or are not finite."""
    missing = list(weights_findings(checked.paths))
    if missing:
        yield from missing
        return
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
    overrides: dict[str, Any] = {"dataset::data": []}
    if not checked.paths.weights.is_file():  # that is a finding of its own
        overrides["initialize"] = []
    _check_properties(checked, "inference", ["inference.yaml"], overrides)


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


def _check_network_shapes(checked: CheckedBundle) -> None:
    """Raise an error if the network's input or output is not as metadata.json describes it."""
    [wiring] = _wiring(checked, ["inference.yaml"])
    _check_metadata_is_plain(checked.paths)
    verify_net_in_out(
        net_id=NETWORK,
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


def _check_torchscript(checked: CheckedBundle) -> Iterator[Finding]:
    """Yield advice if PyTorch cannot compile the network, which the zoo's CI wants to export."""
    network = build_network(load_spec(checked.paths.spec)).eval()
    try:
        torch.jit.script(network)
    except Exception as error:  # the compiler of TorchScript raises many kinds
        yield Finding(
            level="advice",
            found=f"the network cannot be compiled: {str(error).strip().splitlines()[0]}",
            expected="a network that MONAI's ckpt_export takes",
            action=(
                "have the zoo add the bundle to exclude_verify_torchscript_list; "
                "`volseg export --to torchscript` traces the network instead"
            ),
        )


ZOO_CHECKS: dict[str, Check] = {
    "files": lambda checked: file_findings(checked.paths),
    "large files": lambda checked: large_file_findings(checked.paths),
    "metadata against the schema": lambda checked: schema_findings(checked.paths),
    "metadata": lambda checked: metadata_findings(checked.paths),
    "configurations": lambda checked: configuration_findings(checked.paths),
    "ids": lambda checked: id_findings(checked.paths, checked.training),
}
OWN_CHECKS: dict[str, Check] = {
    "spec": _check_spec,
    "weights fit the spec": _check_weights,
    **ZOO_CHECKS,
    "inference properties": _check_inference_properties,
    "training properties": _check_training_properties,
    "network input and output": _check_network_shapes,
    "TorchScript": _check_torchscript,
    "generated files": _check_generated_files,
}
FOREIGN_CHECKS: dict[str, Check] = {
    "weights": lambda checked: weights_findings(checked.paths),
    **ZOO_CHECKS,
    "network input and output": lambda checked: network_findings(
        checked.paths, trust=checked.trust
    ),
}
