"""`run.json`: which model made the results of a folder, with which settings and versions."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.batch.outputs import RUN
from pipeline.config import BundlePaths
from pipeline.errors import ConfigError
from pipeline.inference import Model
from pipeline.io import sha256, write_json

PACKAGES = ("volseg", "monai", "torch", "nibabel", "SimpleITK", "pytorch-ignite", "numpy")


def identity(model: Model) -> dict[str, str]:
    """Return what must be equal for results to belong together: weights, spec and settings."""
    paths, reader = BundlePaths(model.root), model.preprocessing.reader
    return {
        "bundle": paths.folder.resolve().name,
        "weights_sha256": sha256(paths.weights),
        "spec_sha256": sha256(paths.spec),
        "overlap": str(getattr(model.inferer, "overlap", "")),
        "precision": str(getattr(model.network, "precision", "")),
        "volume": str(reader.volume),
        "labels_spacing": str(reader.labels_spacing),
    }


def write_run(model: Model, output_dir: Path) -> None:
    """Write `run.json`.

    `computed` holds what really ran: runtime, precision, device and processor. It is null until the
    network has computed its first window.
    """
    description = getattr(model.network, "description", None)
    content: dict[str, Any] = {
        **identity(model),
        "computed": asdict(description) if description is not None else None,
        "command": sys.argv,
        "versions": {name: version(name) for name in PACKAGES},
    }
    write_json(output_dir / RUN, content)


def holds_other_results(output_dir: Path, model: Model, *, overwrite: bool) -> bool:
    """Return whether a folder holds results of another model or setting, to be replaced.

    Raises:
        ConfigError: it does, and may not be overwritten.
    """
    path = output_dir / RUN
    if not path.is_file():
        return False
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key, value in identity(model).items() if before.get(key) != value]
    if changed and not overwrite:
        found = ", ".join(f"{key} {before.get(key)}" for key in changed)
        raise ConfigError(
            f"{output_dir}: holds results of another model or setting ({found}); "
            "choose another folder, or --overwrite"
        )
    return bool(changed)
