"""The parts of a bundle in MONAI's form, made by MONAI's parser from the bundle's configuration.

The configuration is changed in a few places first: the case comes from volseg, files are written by
volseg, and the device is the one that was asked for.
"""

from __future__ import annotations

import copy
import logging
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from logging import Logger
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.engines import Evaluator
from monai.handlers import CheckpointLoader
from monai.transforms import Compose

from pipeline.bundle.foreign.files import (
    LABEL,
    WRITERS,
    ForeignFacts,
    hard_cuda,
    loaded_keys,
    parts,
    target,
)
from pipeline.bundle.foreign.imports import BundleImports
from pipeline.bundle.overrides import apply_overrides
from pipeline.bundle.wiring import literal
from pipeline.errors import ConfigError, explicit_causes, find_pipeline_error
from pipeline.log import LOGGER

CAUSE_WIDTH = 400  # characters: torch lists every weight that does not fit
CUDA_DEVICE = re.compile(r"""torch\.device\(\s*(['"])cuda(:\d+)?\1\s*\)""")
UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")
INITIALIZE, EVALUATOR = "initialize", "evaluator"


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignParts:
    """The parts of a bundle in MONAI's form.

    Attributes:
        evaluator: MONAI's engine, with its network's weights loaded.
        preprocessing: transform of a case.
        postprocessing: transform of the network's output, without writers; None without one.
        collate: makes a batch of cases.
        warnings: what was changed and may change results, for each case.
    """

    evaluator: Evaluator
    preprocessing: Any
    postprocessing: Compose | None
    collate: Any
    warnings: tuple[str, ...]


def open_parts(
    facts: ForeignFacts,
    imports: BundleImports,
    overrides: Mapping[str, Any],
    device: torch.device,
    overlap: float | None = None,
) -> ForeignParts:
    """Return the parts of a bundle in MONAI's form, with the weights loaded.

    It runs the bundle's own code.

    Args:
        facts: of the bundle.
        imports: of the bundle's own modules.
        overrides: id → value, from `parse_overrides`.
        device: that computes.
        overlap: of neighbouring windows, a fraction; None for the bundle's own.

    Raises:
        ConfigError: a part cannot be made; the message says what to change.
    """
    config = copy.deepcopy(facts.config)
    apply_overrides(config, overrides, facts.configuration.name)
    changes = _take_over(config, facts, device, overlap)
    parser = ConfigParser(config)
    if facts.metadata:
        parser.read_meta(dict(facts.metadata))
    parser["bundle_root"] = literal(str(facts.folder.resolve()))
    if "device" in config:
        parser["device"] = device
    numbers = torch.serialization.safe_globals(_numpy_globals())
    # the last one, so that an error is not one that a filter made of a warning
    with imports.active(), _explained(facts, config, device), numbers, without_warnings():
        evaluator = parser.get_parsed_content(EVALUATOR)
        if not isinstance(evaluator, Evaluator):
            raise ConfigError(
                f"{facts.configuration}: `{EVALUATOR}` is {type(evaluator).__name__}, expected an "
                "evaluator of MONAI"
            )
        if INITIALIZE in config:
            parser.get_parsed_content(INITIALIZE)
        _load_once(evaluator)
        preprocessing = parser.get_parsed_content("dataset").transform
        postprocessing = _postprocessing(parser, config)
        collate = parser.get_parsed_content("dataloader").collate_fn
    _network(evaluator).eval()
    return ForeignParts(
        evaluator=evaluator,
        preprocessing=preprocessing,
        postprocessing=postprocessing,
        collate=collate,
        warnings=tuple(changes),
    )


def _take_over(
    config: dict[str, Any], facts: ForeignFacts, device: torch.device, overlap: float | None
) -> list[str]:
    """Change a configuration so that volseg gives the cases and writes, and return warnings."""
    for name in ("dataset", "dataloader", EVALUATOR):
        if not isinstance(config.get(name), dict):
            raise ConfigError(
                f"{facts.configuration}: expected a part `{name}`, as the bundles of MONAI's model "
                "zoo have it"
            )
    config["dataset"]["data"] = []
    config["dataloader"].update(num_workers=0, shuffle=False)
    if overlap is not None:
        _set_overlap(config, facts, overlap)
    for _, node in parts(config):
        if target(node) in WRITERS:
            node["_disabled_"] = True
        if target(node) == "LoadImaged" and LABEL in loaded_keys({"": node, **config}):
            node["allow_missing_keys"] = True  # what is segmented has no label yet
    if device.type != "cuda":
        _replace_cuda(config, device, facts)
    return _invert_labels_by_nearest(config, facts)


def _set_overlap(config: dict[str, Any], facts: ForeignFacts, overlap: float) -> None:
    inferer = config.get("inferer")
    if not isinstance(inferer, dict) or "overlap" not in inferer:
        raise ConfigError(
            f"{facts.configuration}: --overlap does not apply, its `inferer` has no overlap"
        )
    inferer["overlap"] = overlap


def _replace_cuda(config: dict[str, Any], device: torch.device, facts: ForeignFacts) -> None:
    """Replace devices of CUDA that are written into a configuration by the one that computes."""
    for path, text in hard_cuda(config).items():
        plain = str(device) if text.startswith("cuda") else text
        changed = CUDA_DEVICE.sub(f"torch.device('{device}')", plain)
        if changed == text:
            continue
        *place, last = path.split("#")
        node: Any = config
        for part in place:
            node = node[int(part) if isinstance(node, list) else part]
        node[int(last) if isinstance(node, list) else last] = changed
        LOGGER.info("%s: %s asks for CUDA, %s is used", facts.configuration, path, device)


def _invert_labels_by_nearest(config: dict[str, Any], facts: ForeignFacts) -> list[str]:
    """Have label maps inverted by the nearest voxel: between labels nothing can be interpolated."""
    warned = []
    for path, nodes in _lists(config):
        discrete = False
        for number, node in enumerate(nodes):
            if not isinstance(node, dict):
                continue
            if target(node) == "AsDiscreted" and (_true(node.get("argmax")) or _threshold(node)):
                discrete = True
            is_linear = target(node) == "Invertd" and not _true(node.get("nearest_interp", True))
            if discrete and is_linear:
                node["nearest_interp"] = True
                warned.append(
                    f"{facts.folder.name} inverts label values by linear interpolation "
                    f"({path}#{number}), which would give fractions of labels: the nearest voxel's "
                    "label is taken"
                )
    return warned


def _lists(content: Any, path: str = "") -> Iterator[tuple[str, list[Any]]]:
    if isinstance(content, list):
        yield path, content
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(content, list):
        items = enumerate(content)
    elif isinstance(content, dict):
        items = content.items()
    for key, value in items:
        yield from _lists(value, f"{path}#{key}" if path else str(key))


def _true(value: Any) -> bool:
    return str(value).lower().lstrip("$") == "true"


def _threshold(node: Mapping[str, Any]) -> bool:
    return node.get("threshold") is not None


def _numpy_globals() -> list[Any]:
    """Return what torch may make besides tensors: arrays of numbers, as DiNTS's checkpoints hold.

    None of them runs code that a file could choose.
    """
    from numpy._core import multiarray

    types = {np.dtype(code).type for code in "?bBhHiIlLqQefd"}
    dtypes = [type(np.dtype(one)) for one in types]
    return [multiarray._reconstruct, multiarray.scalar, np.ndarray, np.dtype, *dtypes]


def _load_once(evaluator: Evaluator) -> None:
    """Load the checkpoints that handlers would load again for every case, and drop the handlers."""
    started = evaluator._event_handlers[Events.STARTED]
    for loader in [entry[0] for entry in started if isinstance(entry[0], CheckpointLoader)]:
        loader(evaluator)
        evaluator.remove_event_handler(loader, Events.STARTED)


def _postprocessing(parser: ConfigParser, config: Mapping[str, Any]) -> Compose | None:
    named = config[EVALUATOR].get("postprocessing")
    if not isinstance(named, str) or not named.startswith("@"):
        return None
    found = parser.get_parsed_content(named[1:])
    return found if isinstance(found, Compose) else None


def _network(evaluator: Evaluator) -> torch.nn.Module:
    network: torch.nn.Module = evaluator.network
    return network


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keep the warnings of MONAI and of a bundle's own code quiet: they are for its author."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def without_logs_of_others() -> Iterator[None]:
    """Keep all loggers but volseg's quiet: Ignite logs an error's traceback several times."""
    known = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, Logger)]
    silenced = [
        logger
        for logger in [logging.root, *known]
        if not logger.disabled and logger.name.partition(".")[0] != LOGGER.name
    ]
    for logger in silenced:
        logger.disabled = True
    try:
        yield
    finally:
        for logger in silenced:
            logger.disabled = False


@contextmanager
def _explained(
    facts: ForeignFacts, config: Mapping[str, Any], device: torch.device
) -> Iterator[None]:
    """Raise a ConfigError in place of an error of MONAI's parser, which says what to change."""
    try:
        yield
    except Exception as error:
        known = find_pipeline_error(error)
        if known is not None:
            raise known from None
        *_, cause = explicit_causes(error)
        advice = _advice(facts, config, device, cause)
        shown = textwrap.shorten(f"{type(cause).__name__}: {cause}", CAUSE_WIDTH, placeholder=" …")
        raise ConfigError(f"{facts.configuration}: cannot be opened: {shown}; {advice}") from error


def _advice(
    facts: ForeignFacts, config: Mapping[str, Any], device: torch.device, cause: BaseException
) -> str:
    """Return what a user can do about an error of a bundle's own parts."""
    text = str(cause)
    unexpected = UNEXPECTED.search(text)
    if isinstance(cause, TypeError) and unexpected:
        ids = [path for path, node in parts(config) if unexpected[1] in node and target(node)]
        if ids:
            return (
                f"MONAI {version('monai')} has no such argument: --set {ids[0]}#{unexpected[1]}= "
                "removes it"
            )
    imports = ("ModuleNotFoundError", "OptionalImportError", "ImportError")
    if isinstance(cause, ImportError) or any(word in text for word in imports):
        needed = facts.metadata.get("required_packages_version") or facts.metadata.get(
            "optional_packages_version", {}
        )
        listed = ", ".join(f"{name} {number}" for name, number in dict(needed).items())
        return f"install what the bundle needs, by its metadata: {listed or 'nothing is listed'}"
    if isinstance(cause, FileNotFoundError):
        return (
            "weights are not part of the model zoo's repository: download the bundle by `python -m "
            "monai.bundle download`, or name another file by --set"
        )
    if "cuda" in text.lower() and device.type != "cuda":
        found = hard_cuda(config)
        listed = ", ".join(f"--set {path}=…" for path in found) or "--set"
        return f"it asks for CUDA, the device is {device}: change that by {listed}"
    return "--set ID=VALUE changes parts of the configuration"
