"""What the files of a bundle in MONAI's form say, without evaluating anything in them.

Such a bundle has `configs/inference.json` or `.yaml` and no spec of volseg's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import BundlePaths
from pipeline.errors import ConfigError
from pipeline.io import sha256
from pipeline.types import PathOrStr

NAMES = ("inference.json", "inference.yaml", "inference.yml")
WEIGHTS = (".pt", ".pth", ".ckpt", ".ts", ".safetensors", ".onnx", ".bin", ".npz")
IMAGE, LABEL = "image", "label"
# where MONAI writes files: these are volseg's to write
WRITERS = ("SaveImage", "SaveImaged", "SegmentationSaver", "MetricsSaver", "CheckpointSaver")
BACKGROUND = re.compile(r"background|unlabell?ed|unknown|nothing|^bg$|^none$", re.IGNORECASE)
HARD_CUDA = re.compile(r"""(['"])cuda(:\d+)?\1|\.cuda\(""")


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemFile:
    """One file of a case, as the bundle's dataset lists it.

    Attributes:
        name: of the file, in names of files and as the column of a manifest.
        key: entry of the item that holds it; several files with one key are a list there.
    """

    name: str
    key: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignFacts:
    """What the files of a bundle in MONAI's form say.

    Attributes:
        folder: the bundle's folder.
        configuration: its configuration for inference.
        config: content of the configuration, not evaluated.
        metadata: content of metadata.json; empty without one.
        files: the files of a case.
        names: name of each number in the metadata's `channel_def` of the output.
    """

    folder: Path
    configuration: Path
    config: dict[str, Any]
    metadata: Mapping[str, Any]
    files: tuple[ItemFile, ...]
    names: Mapping[int, str]

    @property
    def names_are_values(self) -> bool:
        """Whether the names are those of values in a label map.

        They can be those of overlapping channels, which the bundle's postprocessing paints with
        values of its own: 0 is then no background.
        """
        return 0 in self.names and bool(BACKGROUND.search(self.names[0]))

    @property
    def labels(self) -> dict[str, int]:
        """Name → value in label maps, background first; empty where the values are not known."""
        if not self.names_are_values:
            return {}
        repeated = list(self.names.values())
        return {
            name if repeated.count(name) == 1 else f"{name} ({value})": value
            for value, name in sorted(self.names.items())
        }

    @property
    def in_channels(self) -> int:
        """Channels of the network's input."""
        return int(_tensor(self.metadata, "inputs", IMAGE).get("num_channels") or len(self.files))

    @property
    def out_channels(self) -> int:
        """Channels of the network's output."""
        return int(_tensor(self.metadata, "outputs", "pred").get("num_channels") or 1)


def foreign_configuration(root: PathOrStr) -> Path | None:
    """Return the configuration of a bundle in MONAI's form; None for a bundle of volseg's."""
    paths = BundlePaths(root)
    if paths.spec.is_file():
        return None
    return next((paths.configs / name for name in NAMES if (paths.configs / name).is_file()), None)


def foreign_facts(root: PathOrStr) -> ForeignFacts:
    """Return what the files of a bundle in MONAI's form say.

    Raises:
        ConfigError: a file is missing or cannot be read.
    """
    configuration = foreign_configuration(root)
    if configuration is None:
        raise ConfigError(f"{root}: expected one of configs/{', configs/'.join(NAMES)}")
    config = read_mapping(configuration)
    path = BundlePaths(root).metadata
    metadata = read_mapping(path) if path.is_file() else {}
    return ForeignFacts(
        folder=Path(root),
        configuration=configuration,
        config=config,
        metadata=metadata,
        files=item_files(config, metadata),
        names=_output_names(metadata),
    )


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the content of a JSON or YAML file, not evaluated.

    Raises:
        ConfigError: it cannot be read, or is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def item_files(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> tuple[ItemFile, ...]:
    """Return the files of a case: one per key that is loaded, or one per channel of a lone key."""
    keys = [key for key in loaded_keys(config) if key != LABEL] or [IMAGE]
    if len(keys) > 1:
        return tuple(ItemFile(name=key, key=key) for key in keys)
    channels = _numbered(_tensor(metadata, "inputs", IMAGE).get("channel_def"))
    count = _tensor(metadata, "inputs", IMAGE).get("num_channels")
    if len(channels) > 1 and len(channels) == count:
        return tuple(ItemFile(name=name, key=keys[0]) for _, name in sorted(channels.items()))
    return (ItemFile(name=keys[0], key=keys[0]),)


def loaded_keys(config: Mapping[str, Any]) -> list[str]:
    """Return the keys of a case that a configuration loads from files, each once."""
    found: dict[str, None] = {}
    for _, node in parts(config):
        if target(node) == "LoadImaged":
            keys = node.get("keys", IMAGE)
            for key in keys if isinstance(keys, list) else [keys]:
                found[_plain_key(key, config)] = None
    return list(found)


def _plain_key(key: Any, config: Mapping[str, Any]) -> str:
    """Return what a reference such as `@image_key` leads to, as far as that needs no evaluation."""
    text = str(key)
    for _ in range(len(config)):
        if not text.startswith("@"):
            break
        text = str(config.get(text[1:], text[1:]))
    # such as $monai.utils.CommonKeys.IMAGE
    return text.rsplit(".", 1)[-1].lower() if text.startswith("$") else text


def parts(content: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the id and the content of each mapping in a configuration."""
    if isinstance(content, dict):
        yield path, content
        for key, value in content.items():
            yield from parts(value, f"{path}#{key}" if path else str(key))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from parts(value, f"{path}#{number}")


def texts(content: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the id and the text of each string in a configuration."""
    if isinstance(content, str):
        yield path, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from texts(value, f"{path}#{key}" if path else str(key))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from texts(value, f"{path}#{number}")


def target(node: Mapping[str, Any]) -> str:
    """Return the name of the class or function that a part of a configuration makes, if any."""
    return str(node.get("_target_", "")).rsplit(".", 1)[-1]


def hard_cuda(config: Mapping[str, Any]) -> dict[str, str]:
    """Return id → text of what asks for CUDA whether the machine has it or not."""
    return {
        path: text
        for path, text in texts(config)
        if "is_available" not in text and (HARD_CUDA.search(text) or text.startswith("cuda"))
    }


def weights_hash(root: PathOrStr) -> str:
    """Return the SHA-256 over all files of weights in a bundle: whichever its configuration reads.

    Raises:
        ConfigError: a file cannot be read.
    """
    folder = BundlePaths(root).weights.parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in WEIGHTS or not path.is_file():
            continue
        try:
            content = sha256(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        name = os.fsencode(path.relative_to(folder).as_posix())
        digest.update(name + b"\0" + content.encode() + b"\n")
    return digest.hexdigest()


def _tensor(metadata: Mapping[str, Any], side: str, name: str) -> Mapping[str, Any]:
    """Return what the metadata say of an input or output of the network; empty without a word."""
    found: Any = metadata
    for key in ("network_data_format", side, name):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _output_names(metadata: Mapping[str, Any]) -> dict[int, str]:
    output = _tensor(metadata, "outputs", "pred")
    return _numbered(output.get("channel_def") or output.get("label_def"))


def _numbered(names: Any) -> dict[int, str]:
    """Return number → name of a mapping whose keys are numbers in text; empty for anything else."""
    if not isinstance(names, Mapping):
        return {}
    numbers = {str(key): str(name).strip() for key, name in names.items()}
    return {int(key): name for key, name in numbers.items() if key.isdigit()}
