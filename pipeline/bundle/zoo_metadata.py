"""The rules of MONAI's model zoo for metadata.json.

Nothing is downloaded. The rules are those of `ci/verify_bundle.py` and
`ci/get_bundle_requirements.py` in github.com/Project-MONAI/model-zoo, as of October 2024, and of
MONAI's bundle specification.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

from jsonschema import Draft202012Validator
from packaging.requirements import InvalidRequirement, Requirement

from pipeline.bundle.findings import Finding
from pipeline.bundle.foreign.files import read_mapping
from pipeline.bundle.zoo_files import zoo_checkout
from pipeline.config import BundlePaths

METADATA = "configs/metadata.json"
SCHEMA = "metadata_schema.json"
PACKAGES = "required_packages_version"
OLD_PACKAGES = "optional_packages_version"  # its earlier name
# Package → the key of metadata.json that pins its version
PINS = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}
DESCRIPTIVE = (
    "name",
    "authors",
    "copyright",
    "intended_use",
    "data_source",
    "data_type",
    "references",
    "eval_metrics",
)
PLACEHOLDER = "to be named"  # what volseg writes into a card that its owner completes
DATA_FORMAT = "_data_format"
NETWORK_FORMAT = "network_data_format"
# What MONAI's verify_net_in_out reads on each side
TENSORS = {"inputs": "image", "outputs": "pred"}


def schema_findings(paths: BundlePaths) -> Iterator[Finding]:
    """Yield each place where metadata.json does not follow MONAI's schema, as volseg states it."""
    if not paths.metadata.is_file():
        yield Finding(
            level="error",
            where=METADATA,
            found="missing",
            expected="MONAI's metadata",
            action=f"`volseg bundle refresh {paths.folder}` writes it from spec and card",
        )
        return
    metadata = read_mapping(paths.metadata)
    schema = json.loads((files("pipeline.bundle") / "templates" / SCHEMA).read_text("utf-8"))
    validator = Draft202012Validator(schema)
    for error in sorted(validator.iter_errors(metadata), key=lambda error: error.json_path):
        key = error.json_path.removeprefix("$").removeprefix(".")
        yield Finding(
            level="error",
            where=f"{METADATA}, {key}" if key else METADATA,
            found=error.message,
        )
    if not metadata.keys() & {PACKAGES, OLD_PACKAGES}:
        yield Finding(
            level="error",
            where=f"{METADATA}, {PACKAGES}",
            found="missing",
            expected="name → version of the packages beyond MONAI, PyTorch and NumPy",
            action="add it; {} if there are none",
        )
    if not any(key.endswith(DATA_FORMAT) for key in metadata):
        yield Finding(
            level="error",
            where=f"{METADATA}, {NETWORK_FORMAT}",
            found="missing",
            expected="inputs and outputs of the network",
        )


def metadata_findings(paths: BundlePaths) -> Iterator[Finding]:
    """Yield what the zoo's CI refuses in metadata.json beyond its schema, and what it lacks."""
    if not paths.metadata.is_file():
        return
    metadata = read_mapping(paths.metadata)
    yield from _version_findings(paths, metadata)
    yield from _package_findings(metadata)
    yield from _description_findings(metadata)
    for side, name in TENSORS.items():
        yield from _tensor_findings(metadata, side, name)


def _version_findings(paths: BundlePaths, metadata: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield an error if the version has no entry in the changelog, and advice if it is used."""
    version, changelog = metadata.get("version"), _mapping(metadata.get("changelog"))
    if version is not None and version not in changelog:
        yield Finding(
            level="error",
            where=f"{METADATA}, changelog",
            found=f"has the versions {', '.join(map(str, changelog)) or 'none'}",
            expected=f"an entry for the version {version}",
            action="describe there what changed in it",
        )
    checkout = zoo_checkout(paths)
    if checkout is None:
        return
    published = read_mapping(checkout / "models" / "model_info.json")
    if f"{paths.folder.resolve().name}_v{version}" in published:
        yield Finding(
            level="advice",
            where=f"{METADATA}, version",
            found=f"the zoo has published {version}",
            expected="a new version if anything changed",
        )


def _package_findings(metadata: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield the versions of packages that pip, and so the zoo's CI, could not install."""
    for package, key in PINS.items():
        if isinstance(metadata.get(key), str):
            yield from _pin_findings(key, package, metadata[key])
    if not re.fullmatch(r"\d+(\.\d+)*", str(metadata.get("monai_version", "1"))):
        yield Finding(
            level="error",
            where=f"{METADATA}, monai_version",
            found=f"{metadata['monai_version']!r}",
            expected="numbers and dots only, which is what the zoo's CI can read",
        )
    for group in (PACKAGES, OLD_PACKAGES):
        for package, version in _mapping(metadata.get(group)).items():
            yield from _pin_findings(f"{group}.{package}", package, version)
    if OLD_PACKAGES in metadata:
        yield Finding(
            level="advice",
            where=f"{METADATA}, {OLD_PACKAGES}",
            found="the name of this key in earlier versions of MONAI",
            expected=PACKAGES,
            action="rename it",
        )


def _pin_findings(key: str, package: str, version: object) -> Iterator[Finding]:
    """Yield an error if `package==version` is nothing that pip understands."""
    try:
        Requirement(f"{package}=={version}")
    except InvalidRequirement:
        yield Finding(
            level="error",
            where=f"{METADATA}, {key}",
            found=f"{package}=={version} is no requirement of pip",
            expected="the name of a package and one version of it, such as 5.2.1",
        )


def _description_findings(metadata: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield advice if descriptions that users of the zoo see are missing or empty."""
    empty = [key for key in DESCRIPTIVE if metadata.get(key, "") in ("", PLACEHOLDER)]
    if empty:
        yield Finding(
            level="advice",
            where=METADATA,
            found=f"nothing in {', '.join(empty)}",
            expected="what a user of the model should know",
            action="complete it, in card.yaml if there is one, else in metadata.json",
        )


def _tensor_findings(metadata: Mapping[str, Any], side: str, name: str) -> Iterator[Finding]:
    """Yield advice on the description of the network's input, or of its output.

    Args:
        metadata: content of metadata.json.
        side: `inputs` or `outputs`.
        name: of the tensor.
    """
    if NETWORK_FORMAT not in metadata:
        return  # a bundle of another kind, or the schema reports it
    where = f"{METADATA}, {NETWORK_FORMAT}.{side}.{name}"
    tensors = _mapping(_mapping(metadata[NETWORK_FORMAT]).get(side))
    if not tensors:
        return  # the schema reports it
    if name not in tensors:
        yield Finding(
            level="advice",
            where=where,
            found="missing",
            expected="a tensor of this name, which MONAI's verify_net_in_out reads",
        )
        return
    tensor = _mapping(tensors[name])
    absent = [key for key in ("is_patch_data", "channel_def") if key not in tensor]
    if absent:
        yield Finding(
            level="advice",
            where=where,
            found=f"without {', '.join(absent)}",
            expected="all keys of MONAI's bundle specification",
        )
    count, names = tensor.get("num_channels"), _mapping(tensor.get("channel_def"))
    # more names than channels: one channel whose values are labels
    if names and isinstance(count, int) and len(names) < count:
        yield Finding(
            level="advice",
            where=f"{where}.channel_def",
            found=f"{len(names)} names for {count} channels",
            expected="a name for each channel",
        )


def _mapping(content: object) -> Mapping[str, Any]:
    """Return the content if it is a mapping, else an empty one: the schema reports its type."""
    return content if isinstance(content, Mapping) else {}
