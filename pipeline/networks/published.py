"""State dicts of two published U-Nets, translated to the names of our `UNet` and back.

`tutorial`: blocks of two convolutions with bias, as in many tutorials (`encoder1.0.weight`,
`output.weight`). `buda`: brain-segmentation-pytorch, with batch norm and convolutions without bias
(`encoder1.enc1conv1.weight`, `conv.weight`). The original U-Net of 2015 has no PyTorch weights; a
spec describes it with `padding: false`.

References:
    Buda, Saha, Mazurowski: Association of genomic subtypes of lower-grade gliomas with shape
    features automatically extracted by a deep learning algorithm. Computers in Biology and
    Medicine 109 (2019), doi:10.1016/j.compbiomed.2019.05.002.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

import torch

from pipeline.config import NetworkSpec
from pipeline.errors import ConfigError

PublishedKind: TypeAlias = Literal["tutorial", "buda"]
"""Name of a published U-Net."""
State: TypeAlias = dict[str, torch.Tensor]
"""A state dict: name → tensor."""

FIRST_WEIGHTS: dict[PublishedKind, str] = {
    "tutorial": "encoder1.0.weight",
    "buda": "encoder1.enc1conv1.weight",
}
CONV = ("weight", "bias")
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class InferredUNet(NamedTuple):
    """U-Net settings inferred from the keys and tensor shapes of a state dict.

    The state dict has the names of `UNet`.

    Attributes:
        spatial_dims: 2 or 3.
        in_channels: number of channels of the image.
        out_channels: number of channels of the logits.
        network: channels per level and norm; all other settings have their defaults.
    """

    spatial_dims: int
    in_channels: int
    out_channels: int
    network: NetworkSpec


def recognise(state: Mapping[str, torch.Tensor]) -> PublishedKind:
    """Return the name of the published U-Net that a state dict belongs to, from its keys.

    Raises:
        ConfigError: the state dict belongs to none of them.
    """
    for kind, first in FIRST_WEIGHTS.items():
        if first in state:
            return kind
    known = ", ".join(f"{first} ({kind})" for kind, first in FIRST_WEIGHTS.items())
    raise ConfigError(
        f"unknown weights: expected one of the keys {known}; found {', '.join(list(state)[:5])}, …"
    )


def from_published(state: Mapping[str, torch.Tensor]) -> State:
    """Return a state dict of a published U-Net with the names of our `UNet`.

    Raises:
        ConfigError: the state dict belongs to no published U-Net that is known, or some of its
            names are missing or unknown.
    """
    names = key_pairs(recognise(state), _count_levels(state, "upconv{}.weight", first=1))
    return _renamed(state, {theirs: ours for ours, theirs in names.items()})


def to_published(state: Mapping[str, torch.Tensor], kind: PublishedKind) -> State:
    """Return a state dict of our `UNet` with the names of a published U-Net, for its own code.

    Args:
        state: state dict with the names of `UNet`.
        kind: name of the published U-Net.

    Raises:
        ConfigError: the published U-Net has no counterpart to parts of this network (another norm,
            residual blocks, deep supervision).
    """
    return _renamed(state, key_pairs(kind, _count_levels(state, "up.{}.weight", first=0)))


def published_network(state: Mapping[str, torch.Tensor]) -> InferredUNet:
    """Return the settings of the U-Net that a state dict belongs to, from its keys and shapes.

    Args:
        state: state dict with the names of `UNet`, from `from_published`.
    """
    levels = _count_levels(state, "up.{}.weight", first=0)
    first = state["encoder.0.body.0.weight"]
    blocks = [f"encoder.{level}" for level in range(levels)] + ["bottleneck"]
    features = tuple(int(state[f"{block}.body.0.weight"].shape[0]) for block in blocks)
    norm: Literal["batch"] | None = "batch" if "encoder.0.body.1.running_mean" in state else None
    return InferredUNet(
        spatial_dims=first.ndim - 2,
        in_channels=int(first.shape[1]),
        out_channels=int(state["output.weight"].shape[0]),
        network=NetworkSpec(features=features, norm=norm),
    )


def key_pairs(kind: PublishedKind, levels: int) -> dict[str, str]:
    """Return, for each entry of a U-Net's state dict, our name → the published name.

    With four poolings there are 46 entries for `tutorial` and 118 for `buda`.

    Args:
        kind: name of the published U-Net.
        levels: number of poolings.
    """
    block_pairs = _tutorial_block if kind == "tutorial" else _buda_block
    pairs: dict[str, str] = {}
    for level in range(levels):
        for part in ("encoder", "decoder"):
            pairs |= block_pairs(f"{part}.{level}", f"{part}{level + 1}", f"{part[:3]}{level + 1}")
        pairs |= _entries(f"up.{level}", f"upconv{level + 1}", CONV)
    pairs |= block_pairs("bottleneck", "bottleneck", "bottleneck")
    return pairs | _entries("output", "output" if kind == "tutorial" else "conv", CONV)


def _tutorial_block(ours: str, theirs: str, _short: str) -> dict[str, str]:
    """Return the pairs of one block: convolution, activation, convolution, activation."""
    return _entries(f"{ours}.body.0", f"{theirs}.0", CONV) | _entries(
        f"{ours}.body.2", f"{theirs}.2", CONV
    )


def _buda_block(ours: str, theirs: str, short: str) -> dict[str, str]:
    """Return the pairs of one block: twice convolution, norm, activation.

    Args:
        ours: our name of the block.
        theirs: published name of the block.
        short: prefix of the published names of its layers, such as `enc1`.
    """
    return {
        f"{ours}.body.0.weight": f"{theirs}.{short}conv1.weight",
        **_entries(f"{ours}.body.1", f"{theirs}.{short}norm1", BATCH_NORM),
        f"{ours}.body.3.weight": f"{theirs}.{short}conv2.weight",
        **_entries(f"{ours}.body.4", f"{theirs}.{short}norm2", BATCH_NORM),
    }


def _entries(ours: str, theirs: str, names: tuple[str, ...]) -> dict[str, str]:
    return {f"{ours}.{name}": f"{theirs}.{name}" for name in names}


def _count_levels(state: Mapping[str, torch.Tensor], pattern: str, *, first: int) -> int:
    """Return the number of levels: of consecutive numbers, from `first`, that give a known name."""
    count = 0
    while pattern.format(first + count) in state:
        count += 1
    return count


def _renamed(state: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> State:
    """Return a state dict with new names, given old → new; all names have to match."""
    missing = sorted(names.keys() - state.keys())
    unexpected = sorted(state.keys() - names.keys())
    found = []
    if missing:
        found.append(f"missing {', '.join(missing[:5])}")
    if unexpected:
        found.append(f"not expected {', '.join(unexpected[:5])}")
    if found:
        raise ConfigError(
            f"the weights do not fit: {'; '.join(found)}; expected {len(names)} entries, found "
            f"{len(state)}"
        )
    return {names[name]: tensor for name, tensor in state.items()}
