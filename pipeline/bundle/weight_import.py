"""Published checkpoints as complete bundles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.bundle.imported import write_imported
from pipeline.config import BundlePaths
from pipeline.errors import ConfigError
from pipeline.io import sha256
from pipeline.networks import (
    InferredUNet,
    PublishedKind,
    from_published,
    published_network,
    read_checkpoint,
    recognise,
)
from pipeline.types import PathOrStr


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedNetwork:
    """What a checkpoint of a published U-Net does not contain, and its bundle needs.

    Attributes:
        name: for readers.
        task: of the bundle's card.
        data_source: of the bundle's card.
        references: of the bundle's card.
        preprocessing_note: of the bundle's README, how images are prepared for the network.
        score_note: of the bundle's README, the published scores; empty without any.
        structure: name of the label if the network segments a single one.
        channels: the names of the input channels, for each number of channels with usual names.
        sigmoid: whether the outputs are sigmoids, however many they are; otherwise a single output
            is a sigmoid and several are a softmax.
        spec: keys of spec.yaml in addition to those that every import has.
        fallback_channel: the channel that also serves for those without a file, where there is one.
        run: keys of run.yaml in addition to those that every import has.
    """

    name: str
    task: str
    data_source: str
    references: tuple[str, ...]
    preprocessing_note: str
    score_note: str = ""
    structure: str
    channels: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    sigmoid: bool
    spec: Mapping[str, Any] = field(default_factory=dict)
    fallback_channel: str | None = None
    run: Mapping[str, Any]


RONNEBERGER_2015 = (
    "Ronneberger, Fischer, Brox: U-Net. MICCAI 2015, doi:10.1007/978-3-319-24574-4_28"
)
BUDA_2019 = (
    "Buda, Saha, Mazurowski: Association of genomic subtypes of lower-grade gliomas with shape "
    "features automatically extracted by a deep learning algorithm. Computers in Biology and "
    "Medicine 109 (2019), doi:10.1016/j.compbiomed.2019.05.002"
)

PUBLISHED_NETWORKS: dict[PublishedKind, PublishedNetwork] = {
    "tutorial": PublishedNetwork(
        name="tutorial U-Net",
        task="Segmentation of MR images",
        data_source="not known",
        references=(RONNEBERGER_2015,),
        preprocessing_note=(
            "The checkpoint does not record how its images were oriented, resampled and "
            "normalised. A z-score of each volume on its own grid is assumed. Correct "
            "configs/spec.yaml if your training did otherwise."
        ),
        structure="structure",
        sigmoid=False,
        run={"learning_rate": 1e-3},
    ),
    "buda": PublishedNetwork(
        name="FLAIR abnormality U-Net (brain-segmentation-pytorch)",
        task="Segmentation of FLAIR abnormalities in brain MR images",
        data_source="TCGA lower-grade glioma, where the weights are the published ones",
        references=(BUDA_2019, RONNEBERGER_2015),
        preprocessing_note=(
            "Values under 10 % of a channel's maximum are set to 0, and the volume is cropped to "
            "the rest. Its axial slices are padded to squares, resized to 256 × 256, clipped at "
            "percentiles 10 and 99, and normalised to a z-score per channel. The channels are "
            "pre-contrast, FLAIR and post-contrast; FLAIR is used for channels without a file."
        ),
        score_note=(
            "Published Dice differ by source: the paper has a mean of 82 % and a median of 85 % "
            "over 110 patients, cross-validated; the code's README has 91 % and 92 % on the ten "
            "cases that also chose the model."
        ),
        structure="abnormality",
        channels={1: ("FLAIR",), 3: ("pre", "FLAIR", "post")},
        sigmoid=True,
        # the preprocessing and postprocessing of the published code
        spec={
            "intensity": {"method": "percentiles_zscore", "lower": 10.0, "upper": 99.0},
            "crop_resize": {"floor": 0.1, "slice_size": 256, "axis": "S"},
            "largest_component": ["each"],
        },
        fallback_channel="FLAIR",
        # the published training: Dice loss, Adam with this rate and without weight decay
        run={"loss": "dice", "learning_rate": 1e-4, "weight_decay": 0.0},
    ),
}


def import_checkpoint(checkpoint: PathOrStr, output: PathOrStr) -> PublishedNetwork:
    """Write a bundle with the weights of a published U-Net and return which network it is.

    Args:
        checkpoint: a file of a state dict, written by `torch.save`; its keys name the network.
        output: the bundle's folder, which must not contain a bundle.

    Raises:
        PipelineError: the checkpoint cannot be read or is of no known network, or the folder
            contains a bundle.
    """
    paths = BundlePaths(output)
    if paths.configs.exists():
        raise ConfigError(f"{paths.folder}: contains a bundle already; choose another folder")
    checkpoint_state = read_checkpoint(checkpoint)
    published = PUBLISHED_NETWORKS[recognise(checkpoint_state)]
    state = from_published(checkpoint_state)
    shape = published_network(state)
    spec = _spec(published, shape)
    source = f"{Path(checkpoint).name} (SHA-256 {sha256(Path(checkpoint))})"
    write_imported(
        paths,
        spec=spec,
        card=_card(published, source),
        run=_run(published, shape.spatial_dims),
        state=state,
        source=source,
        readme=_readme(published, source, str(output)),
    )
    return published


def _spec(published: PublishedNetwork, shape: InferredUNet) -> dict[str, Any]:
    """Return the content of spec.yaml.

    Raises:
        ConfigError: the output has no channel for a structure.
    """
    sigmoid = published.sigmoid or shape.out_channels == 1
    # a softmax has a channel for the background too
    structures = shape.out_channels if sigmoid else shape.out_channels - 1
    if structures < 1:
        raise ConfigError(
            f"the weights have {shape.out_channels} output channels: expected background and at "
            "least one structure"
        )
    channel_names = _channel_names(published, shape.in_channels)
    spec: dict[str, Any] = {
        "labels": {"background": 0, **_structure_labels(published, structures)},
        "channels": channel_names,
        # pictures of axial slices have their rows from front to back and their columns from
        # the patient's right to left
        "orientation": "PLS",
        "spacing": [None, None, None],  # the file's own
        "roi_size": [256, 256] if shape.spatial_dims == 2 else [96, 96, 32],
        "overlap": 0.5,
        "output": "sigmoid" if sigmoid else "softmax",
        "network": {"features": list(shape.network.features), "norm": shape.network.norm},
    }
    if shape.spatial_dims == 2:
        spec["slice_axis"] = "S"
    spec |= published.spec
    if published.fallback_channel in channel_names:
        spec["fallback_channel"] = published.fallback_channel
    return spec


def _structure_labels(published: PublishedNetwork, count: int) -> dict[str, int]:
    """Return name → output value of each structure."""
    if count == 1:
        return {published.structure: 1}
    return {f"structure_{i}": i for i in range(1, count + 1)}


def _channel_names(published: PublishedNetwork, count: int) -> list[str]:
    """Return the names of the input channels, numbered where there are no usual ones."""
    numbered = tuple(f"channel_{i}" for i in range(1, count + 1))
    return list(published.channels.get(count, numbered))


def _card(published: PublishedNetwork, source: str) -> dict[str, Any]:
    """Return what the bundle's card has in addition to that of every import.

    Args:
        published: which network it is.
        source: name and hash of the checkpoint.
    """
    return {
        "name": published.name,
        "description": f"{published.name}, imported from {source}.",
        "task": published.task,
        "data_source": published.data_source,
        "data_type": "NIfTI",
        "references": list(published.references),
    }


def _run(published: PublishedNetwork, dims: int) -> dict[str, Any]:
    """Return what run.yaml has in addition, for training that continues from the weights.

    Args:
        published: which network it is.
        dims: spatial dimensions, 2 or 3.
    """
    # slices as in brain-segmentation-pytorch; windows
    return {"batch_size": 16 if dims == 2 else 2, **published.run}


def _readme(published: PublishedNetwork, source: str, bundle: str) -> str:
    """Return the text of docs/README.md.

    Args:
        published: which network it is.
        source: name and hash of the checkpoint.
        bundle: the path of the bundle, as the user gave it.
    """
    sections = [
        f"# {published.name}",
        f"Imported from {source}.",
        published.preprocessing_note,
        published.score_note,
        f"```\nvolseg segment scans/ -o out/ -b {bundle}\n```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"
