"""The rules of MONAI's model zoo for the configurations of a bundle.

Nothing is evaluated. The ids are those of MONAI's properties of a workflow
(`monai.bundle.properties`) and of the zoo's `CONTRIBUTING.md`, as of October 2024.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser, ReferenceResolver
from monai.bundle.properties import InferProperties, TrainProperties
from monai.bundle.utils import ID_SEP_KEY
from monai.utils import BundleProperty, BundlePropertyConfig

from pipeline.bundle.findings import Finding
from pipeline.bundle.foreign.files import NAMES, foreign_configuration
from pipeline.bundle.zoo_metadata import NETWORK_FORMAT
from pipeline.config import BundlePaths

SUFFIXES = (".json", ".yaml", ".yml")
# What the zoo asks for by name. Of MONAI's required properties some of its bundles lack others
INFERENCE_IDS = ("bundle_root", "device", "network_def", "inferer")
TRAINING_IDS = {
    "train": ("trainer", "trainer::max_epochs", "dataset", "dataset::data", "handlers"),
    "validate": ("evaluator", "handlers", "dataset", "dataset::data"),
}
OUTPUT_DIR = "output_dir"
HOME = re.compile(r"(/home|/Users|[A-Za-z]:\\+Users)[/\\]+[^/\\\s'\"]+")
DUPLICATE = "Duplicate key"  # how MONAI's warning begins


def configuration_findings(paths: BundlePaths) -> Iterator[Finding]:
    """Yield what is wrong with the configurations as files, and with references in inference.

    Training and evaluation are often overlays, whose references lead to the file below them.
    """
    if not paths.configs.is_dir():
        return
    inference = inference_configuration(paths)
    if inference is None:
        yield Finding(
            level="error",
            where="configs/inference.json",
            found="missing",
            expected=f"the configuration for inference, under one of {', '.join(NAMES)}",
        )
    several = [name for name in NAMES if (paths.configs / name).is_file()]
    if len(several) > 1:
        yield Finding(
            level="advice",
            where="configs",
            found=f"has {' and '.join(several)}, of which tools take different ones",
            expected="one configuration for inference",
            action="rename the others",
        )
    unreadable = False
    for path in sorted(paths.configs.iterdir()):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            for finding in _file_findings(path):
                unreadable |= path == inference and finding.level == "error"
                yield finding
    if inference is not None and not unreadable:
        yield from _reference_findings(paths, inference)


def inference_configuration(paths: BundlePaths) -> Path | None:
    """Return the configuration for inference, None without one."""
    own = paths.inference if paths.inference.is_file() else None
    return foreign_configuration(paths.folder) or own


def _file_findings(path: Path) -> Iterator[Finding]:
    """Yield what is wrong with one configuration as a file."""
    where = f"configs/{path.name}"
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ConfigParser.load_config_file(path)
            text = path.read_text(encoding="utf-8")
    except (OSError, ValueError, yaml.YAMLError) as error:
        yield Finding(
            level="error",
            where=where,
            found=f"cannot be read: {' '.join(str(error).split())}",
            expected="JSON or YAML, as the ending of the name has it",
        )
        return
    for warning in caught:
        if str(warning.message).startswith(DUPLICATE):
            yield Finding(
                level="advice",
                where=where,
                found=str(warning.message),
                expected="each key once; only the last one counts",
            )
    home = HOME.search(text)
    if home:
        yield Finding(
            level="advice",
            where=where,
            found=f"the path {home[0]} on somebody's own machine",
            expected="paths below bundle_root or dataset_dir",
        )


def _reference_findings(paths: BundlePaths, path: Path) -> Iterator[Finding]:
    """Yield the references in a configuration that lead nowhere."""
    parser = ConfigParser()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns whenever it reads a configuration
        parser.read_config(path)
        if paths.metadata.is_file():
            parser.read_meta(paths.metadata)
        parser.parse()
    items = parser.ref_resolver.items
    for name, item in items.items():
        text = item.get_config()
        if not isinstance(text, str):
            continue  # what it holds has items of its own
        for reference in ReferenceResolver.match_refs_pattern(value=text):
            in_metadata = reference.split(ID_SEP_KEY)[0] == parser.meta_key
            if reference not in items and (paths.metadata.is_file() or not in_metadata):
                yield Finding(
                    level="error",
                    where=f"configs/{path.name}, {name}",
                    found=f"refers to @{reference}, which is not there",
                    expected="an id of the configuration",
                )


def id_findings(paths: BundlePaths, training: Sequence[Path]) -> Iterator[Finding]:
    """Yield the ids that the zoo and MONAI expect in a workflow and that are missing.

    Args:
        paths: the bundle.
        training: files of the configuration for training, later ones over earlier ones; empty if
            the bundle has none.
    """
    inference = inference_configuration(paths)
    if inference is not None:
        config = _load([inference])
        required: tuple[str, ...] = INFERENCE_IDS if _has_network(paths) else ()
        yield from _missing(config, f"configs/{inference.name}", required, "error")
        others = {*_required(InferProperties), OUTPUT_DIR} - set(required)
        yield from _missing(config, f"configs/{inference.name}", sorted(others), "advice")
    if not training:
        return
    config = _load(training)
    where = f"configs/{training[-1].name}"
    required = tuple(
        f"{part}::{name}"
        for part, names in TRAINING_IDS.items()
        if part in config
        for name in names
    )
    yield from _missing(config, where, required, "error")
    if "train" in config:  # else a script's or another tool's
        others = {*_required(TrainProperties), OUTPUT_DIR} - set(required)
        yield from _missing(config, where, sorted(others), "advice")


def _load(files: Sequence[Path]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: dict[str, Any] = ConfigParser.load_config_files([str(path) for path in files])
    return loaded


def _has_network(paths: BundlePaths) -> bool:
    """Return whether the metadata describe one network; the zoo's generators have several."""
    if not paths.metadata.is_file():
        return True
    return NETWORK_FORMAT in _load([paths.metadata])


def _required(properties: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the ids of the properties that MONAI requires."""
    return [
        known[BundlePropertyConfig.ID]
        for known in properties.values()
        if known[BundleProperty.REQUIRED]
    ]


def _missing(
    config: Mapping[str, Any], where: str, ids: Sequence[str], level: Any
) -> Iterator[Finding]:
    """Yield one finding for all ids that a configuration lacks."""
    missing = [name for name in ids if not _has(config, name)]
    if missing:
        yield Finding(
            level=level,
            where=where,
            found=f"without {', '.join(missing)}",
            expected="the ids by which the zoo's tests and other tools know a workflow",
            action="add or rename them",
        )


def _has(config: Any, name: str) -> bool:
    """Return whether a configuration has an id, as far as that is known without evaluation."""
    for key in name.split("::"):
        if isinstance(config, str) and config.startswith(("@", "%", "$")):
            return True  # leads elsewhere
        if not isinstance(config, Mapping) or key not in config:
            return False
        config = config[key]
    return True
