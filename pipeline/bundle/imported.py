"""Writing a bundle whose weights come from elsewhere: what all of these have in common."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline.bundle.wiring import refresh_bundle
from pipeline.config import BundlePaths
from pipeline.io import write_atomically


def write_imported(
    paths: BundlePaths,
    *,
    spec: Mapping[str, Any],
    card: Mapping[str, Any],
    run: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
    source: str,
    readme: str,
) -> None:
    """Write all files of a bundle.

    Args:
        paths: the bundle.
        spec: content of spec.yaml.
        card: content of card.yaml, without what every import has.
        run: content of run.yaml, likewise.
        state: weights, which keep their precision, so that outputs equal the original ones.
        source: name and hash of the files that the weights come from.
        readme: text of docs/README.md.
    """
    buffer = io.BytesIO()
    torch.save({name: tensor.detach().contiguous() for name, tensor in state.items()}, buffer)
    write_atomically(paths.weights, buffer.getvalue())
    _write_yaml(paths.spec, spec)
    _write_yaml(paths.card, {**_card(source), **card})
    base = {"bundle": str(paths.folder), "dataset": "data", "epochs": 100}
    _write_yaml(paths.run, {**base, **run})
    write_atomically(paths.licence, _licence(source).encode())
    write_atomically(paths.readme, readme.encode())
    refresh_bundle(paths.folder)


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Write a configuration file, its keys in the order given."""
    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    write_atomically(path, text.encode())


def _card(source: str) -> dict[str, Any]:
    """Return what the card of every import has."""
    return {
        "authors": "the authors of the weights",
        "copyright": "the authors of the weights",
        "intended_use": "Research; not a medical device, not for diagnosis.",
        "eval_metrics": {},
        "changelog": {"0.1.0": f"imported from {source}"},
    }


def _licence(source: str) -> str:
    """Return the text of LICENSE."""
    return (
        f"The weights were imported from {source}.\n"
        "The licence of their source applies to them; check it before you share them.\n"
    )
