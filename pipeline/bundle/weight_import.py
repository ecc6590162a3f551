"""A published checkpoint as a complete bundle."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline.bundle.metadata import refresh_bundle
from pipeline.config import NetworkSpec
from pipeline.errors import ConfigError
from pipeline.io import sha256, write_atomically
from pipeline.networks import Kind, from_published, published_network, read_checkpoint, recognise
from pipeline.types import PathOrStr

NAMES: dict[Kind, str] = {
    "tutorial": "tutorial U-Net",
    "buda": "FLAIR abnormality U-Net (brain-segmentation-pytorch)",
}
BUDA = (
    "Buda, Saha, Mazurowski: Association of genomic subtypes of lower-grade gliomas with shape features automatically "
    "extracted by a deep learning algorithm. Computers in Biology and Medicine 109 (2019), doi:10.1016/j.compbiomed.2019.05.002"
)
RONNEBERGER = "Ronneberger, Fischer, Brox: U-Net. MICCAI 2015, doi:10.1007/978-3-319-24574-4_28"
WAY_IN: dict[Kind, str] = {
    "tutorial": "The checkpoint does not tell how its images were oriented, spaced and normalised: a z-score of the volume on "
    "its own grid is assumed. Correct configs/spec.yaml where your training did otherwise.",
    "buda": "Values under 10 % of a channel's maximum are set to 0, the volume is cut to what is left, its axial slices are "
    "padded to squares and resized to 256 × 256, clipped at percentiles 10 and 99 and brought to a z-score a channel. "
    "Channels are pre-contrast, FLAIR and post-contrast; FLAIR serves for those that have no file.",
}


def import_checkpoint(checkpoint: PathOrStr, output: PathOrStr) -> Kind:
    """Writes a bundle that segments with the weights of a published U-Net, recognised by its keys.

    Args:
        checkpoint: a file that `torch.save` wrote of a state dict.
        output: the bundle's folder, which must not hold a bundle.

    Returns:
        the kind that was recognised.

    Raises:
        PipelineError: no such checkpoint, of an unknown kind, or a folder that holds a bundle.
    """
    root = Path(output)
    if (root / "configs").exists():
        raise ConfigError(f"{root}: holds a bundle already; choose another folder")
    published = read_checkpoint(checkpoint)
    kind = recognise(published)
    state = from_published(published)
    spec = _spec(kind, *published_network(state))
    buffer = io.BytesIO()
    torch.save({name: tensor.detach().contiguous() for name, tensor in state.items()}, buffer)
    write_atomically(root / "models" / "model.pt", buffer.getvalue())
    source = f"{Path(checkpoint).name} (SHA-256 {sha256(Path(checkpoint))})"
    for name, content in {
        "spec": spec,
        "card": _card(kind, source),
        "run": _run(kind, root, len(spec["roi_size"])),
    }.items():
        write_atomically(
            root / "configs" / f"{name}.yaml",
            yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode(),
        )
    licence = f"The weights were imported from {source}.\nTheir licence is that of their source; ask there before you share.\n"
    write_atomically(root / "LICENSE", licence.encode())
    write_atomically(root / "docs" / "README.md", _readme(kind, source, str(output)).encode())
    refresh_bundle(root)
    return kind


def _spec(
    kind: Kind, dims: int, channels: int, outputs: int, network: NetworkSpec
) -> dict[str, Any]:
    """spec.yaml: for `buda` its own preprocessing, for `tutorial` what is usual."""
    sigmoid = kind == "buda" or outputs == 1
    structures = outputs if sigmoid else outputs - 1
    if structures < 1:
        raise ConfigError(
            f"the weights have {outputs} output channels: expected background and at least one structure"
        )
    spec: dict[str, Any] = {
        "labels": {"background": 0, **_structures(kind, structures)},
        "channels": _channels(kind, channels),
        "orientation": "PLS",  # rows run to the back and columns to the left, as pictures of axial slices are stored
        "spacing": [None, None, None],
        "roi_size": [256, 256] if dims == 2 else [96, 96, 32],
        "overlap": 0.5,
        "output": "sigmoid" if sigmoid else "softmax",
        "network": {"features": list(network.features), "norm": network.norm},
    }
    if dims == 2:
        spec["slice_axis"] = "S"
    if kind == "buda":
        spec["intensity"] = {"method": "percentiles_zscore", "lower": 10.0, "upper": 99.0}
        spec["crop_resize"] = {"floor": 0.1, "slice_size": 256, "axis": "S"}
        spec["largest_component"] = ["each"]
        if "FLAIR" in spec["channels"]:
            spec["fallback_channel"] = "FLAIR"
    return spec


def _structures(kind: Kind, count: int) -> dict[str, int]:
    if count == 1:
        return {"abnormality" if kind == "buda" else "structure": 1}
    return {f"structure_{i}": i for i in range(1, count + 1)}


def _channels(kind: Kind, count: int) -> list[str]:
    if kind == "buda" and count in (1, 3):
        return ["FLAIR"] if count == 1 else ["pre", "FLAIR", "post"]
    return [f"channel_{i}" for i in range(1, count + 1)]


def _card(kind: Kind, source: str) -> dict[str, Any]:
    return {
        "name": NAMES[kind],
        "description": f"{NAMES[kind]}, imported from {source}.",
        "task": "Segmentation of FLAIR abnormalities in brain MR images"
        if kind == "buda"
        else "Segmentation of MR images",
        "authors": "the authors of the weights",
        "copyright": "the authors of the weights",
        "intended_use": "Research; not a medical device, not for diagnosis.",
        "data_source": "TCGA lower-grade glioma, where the weights are the published ones"
        if kind == "buda"
        else "not known",
        "data_type": "NIfTI",
        "references": [BUDA, RONNEBERGER] if kind == "buda" else [RONNEBERGER],
        "eval_metrics": {},
        "changelog": {"0.1.0": f"imported from {source}"},
    }


def _run(kind: Kind, root: Path, dims: int) -> dict[str, Any]:
    """run.yaml, for training on; `buda` with the loss, rate and batch size that its code has."""
    common = {
        "bundle": str(root),
        "dataset": "data",
        "epochs": 100,
        "batch_size": 16 if dims == 2 else 2,
    }
    if kind == "buda":
        return {**common, "loss": "dice", "learning_rate": 1e-4, "weight_decay": 0.0}
    return {**common, "learning_rate": 1e-3}


def _readme(kind: Kind, source: str, name: str) -> str:
    text = f"# {NAMES[kind]}\n\nImported from {source}.\n\n{WAY_IN[kind]}\n"
    if kind == "buda":
        text += (
            "\nPublished Dice differ by source: the paper has a mean of 82 % and a median of 85 % over 110 patients, "
            "cross-validated; the code's README has 91 % and 92 % on the ten cases that also chose the model.\n"
        )
    return f"{text}\n```\nvolseg segment scans/ -o out/ -b {name}\n```\n"
