"""The network of a bundle in MONAI's form against its metadata."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from monai.bundle import verify_net_in_out

from pipeline.bundle.findings import Finding
from pipeline.bundle.foreign.files import foreign_facts, hard_cuda
from pipeline.bundle.foreign.imports import BundleImports
from pipeline.bundle.trust import require_trust
from pipeline.bundle.wiring import literal
from pipeline.bundle.zoo_files import download_command, large_files
from pipeline.bundle.zoo_metadata import NETWORK_FORMAT
from pipeline.config import BundlePaths
from pipeline.errors import ConfigError, describe_error, explicit_causes

NETWORK = "network_def"


def network_findings(paths: BundlePaths, *, trust: bool) -> Iterator[Finding]:
    """Yield what is wrong with the output of the network for the input that the metadata describe.

    The network is a part of the configuration, so that this evaluates it. Where this machine lacks
    what the network needs, that is advice: the zoo's CI installs what the metadata name.

    Args:
        paths: the bundle.
        trust: whether code of the bundle may run.
    """
    try:
        facts = foreign_facts(paths.folder)
    except ConfigError:
        return  # the checks of the files report it
    where = f"configs/{facts.configuration.name}"
    try:
        require_trust(paths.folder, [facts.configuration], trust=trust)
    except ConfigError:
        yield Finding(
            level="advice",
            where=where,
            found="the network was not computed, because that runs code of the bundle",
            action="look at its files, then check it with --trust",
        )
        return
    formats = facts.metadata.get(NETWORK_FORMAT, {})
    if "image" not in formats.get("inputs", {}) or "pred" not in formats.get("outputs", {}):
        return  # MONAI's check reads these two
    try:
        with BundleImports(paths.folder).active():
            verify_net_in_out(
                net_id=NETWORK,
                meta_file=str(paths.metadata),
                config_file=str(facts.configuration),
                device="cpu",
                bundle_root=literal(str(paths.folder)),
            )
    except Exception as error:  # code of somebody else
        *_, cause = explicit_causes(error)
        action = _what_is_missing(cause, paths, facts.config, facts.metadata)
        if action is None:
            raise
        yield Finding(
            level="advice",
            where=where,
            found=f"the network cannot be computed here: {describe_error(error)}",
            action=action,
        )


def _what_is_missing(
    cause: BaseException,
    paths: BundlePaths,
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> str | None:
    """Return what to do about an error that this machine explains; None if the bundle does."""
    if isinstance(cause, ImportError):
        return "install the packages that configs/metadata.json names"
    if isinstance(cause, FileNotFoundError):
        name = Path(str(cause.filename)).name
        listed = [Path(file.path).name for file in large_files(paths)]
        return f"download it: {download_command(paths)}" if name in listed else None
    if not torch.cuda.is_available() and "CUDA" in str(cause) and hard_cuda(config):
        return "check it where there is a GPU"
    named = metadata.get("monai_version")
    if isinstance(cause, TypeError | AttributeError) and named != version("monai"):
        return (
            f"the bundle names MONAI {named}, and this is {version('monai')}: check it with that, "
            "or change its configuration"
        )
    return None
