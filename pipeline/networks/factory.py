"""Networks built from a spec."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.config import Spec
from pipeline.networks.ensemble import Ensemble
from pipeline.networks.unet import UNet


def build_network(spec: Spec) -> nn.Module:
    """Return the network that the spec describes, with random weights: a U-Net or an ensemble."""
    size = spec.network.ensemble
    if size == 1:
        return build_unet(spec)
    members = [build_unet(spec) for _ in range(size)]
    return Ensemble(members, sigmoid=spec.output != "softmax")


def build_unet(spec: Spec) -> UNet:
    """Return a single U-Net with random weights, as the spec describes it.

    `network.ensemble` is ignored.
    """
    network = spec.network
    return UNet(
        spec.spatial_dims,
        len(spec.channels),
        len(spec.outputs),
        network.features,
        spec.strides,
        norm=network.norm,
        activation=network.activation,
        residual=network.residual,
        dropout=network.dropout,
        contraction_dropout=network.contraction_dropout,
        deep_supervision=network.deep_supervision,
        padding=network.padding,
        kernels=network.kernels,
    )


def channels_last(network: nn.Module) -> nn.Module:
    """Convert the network's kernels to channels_last order, in place, and return the network.

    Convolutions are fastest in this memory format: `torch.channels_last_3d` for a 3D network,
    `torch.channels_last` for a 2D one.
    """
    has_conv3d = any(isinstance(module, nn.Conv3d) for module in network.modules())
    order = torch.channels_last_3d if has_conv3d else torch.channels_last
    return network.to(memory_format=order)  # type: ignore[call-overload, no-any-return]
