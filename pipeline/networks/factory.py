"""Networks built from a spec."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.config import Spec
from pipeline.networks.ensemble import Ensemble
from pipeline.networks.strided_unet import StridedUNet
from pipeline.networks.unet import UNet


def build_network(spec: Spec) -> nn.Module:
    """Return the network that the spec describes, with random weights: a U-Net or an ensemble."""
    size = spec.network.ensemble
    if size == 1:
        return build_unet(spec)
    members = [build_unet(spec) for _ in range(size)]
    return Ensemble(
        members,
        sigmoid=spec.output != "softmax",
        average_logits=spec.network.ensemble_average == "logits",
    )


def build_unet(spec: Spec) -> UNet | StridedUNet:
    """Return a single U-Net with random weights, as the spec describes it.

    `network.ensemble` is ignored.
    """
    network = spec.network
    if network.encoder_blocks is not None and network.decoder_convolutions is not None:
        return StridedUNet(
            spec.spatial_dims,
            len(spec.channels),
            len(spec.outputs),
            network.features,
            spec.strides,
            _kernels(spec),
            network.encoder_blocks,
            network.decoder_convolutions,
            residual=network.architecture == "residual_encoder_unet",
            norm=network.norm,
            activation=network.activation,
            conv_bias=network.conv_bias,
            deep_supervision=network.deep_supervision,
        )
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


def _kernels(spec: Spec) -> list[tuple[int, ...]]:
    """Return the kernel size of each level, one number per spatial axis."""
    kernels = spec.network.kernels or (3,) * len(spec.network.features)
    return [(k,) * spec.spatial_dims if isinstance(k, int) else k for k in kernels]


def channels_last(network: nn.Module) -> nn.Module:
    """Convert the network's kernels to channels_last order, in place, and return the network.

    Convolutions are fastest in this memory format: `torch.channels_last_3d` for a 3D network,
    `torch.channels_last` for a 2D one.
    """
    has_conv3d = any(isinstance(module, nn.Conv3d) for module in network.modules())
    order = torch.channels_last_3d if has_conv3d else torch.channels_last
    return network.to(memory_format=order)  # type: ignore[call-overload, no-any-return]
