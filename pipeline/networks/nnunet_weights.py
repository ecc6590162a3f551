"""State dicts of nnU-Net's PlainConvUNet and ResidualEncoderUNet, with the names of `StridedUNet`.

Those state dicts hold each tensor up to four times: the decoder repeats the encoder, and each
convolution with its norm is repeated in a list `all_modules`. Only one of them is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from pipeline.errors import ConfigError

REPEATED = re.compile(r"^decoder\.encoder\.|\.all_modules\.\d+\.")
COMPILED = "_orig_mod."  # torch.compile puts this before each name

# their names → ours; levels of the decoder are numbered from the bottom there, from the top here
ENCODER_NAMES = (
    (r"encoder\.stem\.convs\.(\d+)\.", r"stem.\1."),
    (r"encoder\.stages\.(\d+)\.0\.convs\.(\d+)\.", r"encoder.\1.\2."),
    (r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.conv1\.", r"encoder.\1.\2.first."),
    (r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.conv2\.", r"encoder.\1.\2.second."),
    (r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.skip\.\d+\.", r"encoder.\1.\2.projection."),
)
DECODER_NAME = re.compile(r"decoder\.(stages|transpconvs|seg_layers)\.(\d+)\.(?:convs\.)?(.+)")


def from_nnunet(
    state: Mapping[str, torch.Tensor], levels: int, deep_outputs: int
) -> dict[str, torch.Tensor]:
    """Return a state dict of nnU-Net's networks with the names of `StridedUNet`.

    Args:
        state: state dict of a PlainConvUNet or a ResidualEncoderUNet.
        levels: number of levels of the network.
        deep_outputs: number of lower levels whose outputs for deep supervision are kept.

    Raises:
        ConfigError: a name belongs to neither network.
    """
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix(COMPILED)
        if REPEATED.search(name):
            continue
        ours = _our_name(name, levels, deep_outputs)
        if ours is not None:
            renamed[ours] = tensor
    return renamed


def _our_name(name: str, levels: int, deep_outputs: int) -> str | None:
    """Return our name of an entry, None for an output that is not kept."""
    found = DECODER_NAME.fullmatch(name)
    if found is not None:
        kind, number, rest = found.groups()
        level = levels - 2 - int(number)
        if kind != "seg_layers":
            return f"{'decoder' if kind == 'stages' else 'up'}.{level}.{rest}"
        if level == 0:
            return f"output.{rest}"
        return f"deep_outputs.{level - 1}.{rest}" if level <= deep_outputs else None
    for pattern, ours in ENCODER_NAMES:
        changed, count = re.subn(f"^{pattern}", ours, name)
        if count:
            return changed
    raise ConfigError(
        f"unknown weights: {name} is no name of nnU-Net's PlainConvUNet or ResidualEncoderUNet"
    )
